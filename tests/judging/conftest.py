"""A pair of tiny-flux and what its conversion will be, made once."""

from __future__ import annotations

import pytest
import torch
from bundle.conftest import bundles, modules_cache, own_bundle, parts, quantised  # noqa: F401  fixtures

from dcgen_convert.api.order import resolve
from dcgen_convert.judging import pair as pairs


@pytest.fixture(scope="session")
def pair(weights) -> pairs.ModelPair:
    resolved = resolve("tiny-flux", {"ae": "tiny-dc-ae-f32", "sets": ["bundle.steps=3"]})
    return pairs.of_source(resolved, torch.float32, None, random=False)
