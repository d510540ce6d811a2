"""Damaged inputs of every kind: no internal error, no hang, no growth. `python -m tests.fuzz` tries many more."""

import pytest

from . import harness
from .targets import TARGETS

COUNT = 25  # of each target


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_damaged(target, tmp_path):
    assert harness.run(target, COUNT, 0, tmp_path) == []
