"""The closed form's error on pictures that it had not seen."""

import pytest
import torch

from dcgen_convert.core.console import Console
from dcgen_convert.stages.align_embedder import check_heldout
from dcgen_convert.train.ridge import NormalEquations


@pytest.mark.parametrize("rows, warned", [(40, True), (4000, False)])
def test_few_tokens_of_many_channels_are_a_warning(rows, warned, capsys):
    """Against the residuals of torch's own least squares, in float64 to 1e-6; 30 channels and as much noise as
    signal.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows + 200, 30, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(30, 4, generator=generator, dtype=torch.float64) / 30**0.5
    y += torch.randn(y.shape, generator=generator, dtype=torch.float64)
    seen, unseen = NormalEquations(30, 4), NormalEquations(30, 4)
    seen.add(x[:rows], y[:rows])
    unseen.add(x[rows:], y[rows:])
    found = check_heldout(seen, unseen, seen.solve(0.0), Console("human"))
    design = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    residual = (y - design @ torch.linalg.lstsq(design[:rows], y[:rows]).solution).square()
    assert found == {
        "mse_seen": pytest.approx(residual[:rows].mean().item(), rel=1e-6),
        "mse_heldout": pytest.approx(residual[rows:].mean().item(), rel=1e-6),
    }
    assert ("40 tokens are few for 30 latent channels" in capsys.readouterr().err) == warned
