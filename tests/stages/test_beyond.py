"""A base that draws beyond the size of its training does so with the largest timestep shift of that training."""

import torch
from conftest import WEIGHTS

from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.recipe.identity import Identity
from dcgen_convert.stages import source_pipeline


def test_the_shift_of_tiny_flux_ends_at_128_px():
    source = load_source("tiny-flux", str(WEIGHTS / "tiny-flux"), offline=True)
    parts = dict.fromkeys(("transformer", "vae", "text_encoder", "text_encoder_2"))
    pipeline = source_pipeline.load(source, torch.float32, **parts)
    stock, sigmas = pipeline.scheduler, [1.0, 0.75, 0.5, 0.25]
    source_pipeline.cap_shift(pipeline, Identity("tiny-flux"), 128)
    assert pipeline.scheduler is stock
    source_pipeline.cap_shift(pipeline, Identity("tiny-flux"), 256)
    pipeline.scheduler.set_timesteps(sigmas=sigmas, mu=0.63)  # what the pipeline passes at 256 px
    stock.set_timesteps(sigmas=sigmas, mu=0.5)  # what it passes at 128 px
    torch.testing.assert_close(pipeline.scheduler.sigmas, stock.sigmas)
    assert stock.config.use_dynamic_shifting
