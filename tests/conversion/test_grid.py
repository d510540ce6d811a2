"""The sample grid inside a real conversion: drawn after the checkpoint of its step, and showing what the converted
model draws.
"""

import numpy
import torch
from conftest import copy_stages, run_cli, short_settings
from diffusers import AutoencoderDC
from PIL import Image

from dcgen_convert import conversion
from dcgen_convert.core import names
from dcgen_convert.core.console import NULL
from dcgen_convert.core.journal import Run
from dcgen_convert.data.images import to_image
from dcgen_convert.evaluation.grids import grid
from dcgen_convert.networks import models
from dcgen_convert.stages.job import prepare
from dcgen_convert.stages.preview import converted_pipeline

PICTURES, STEPS = 3, 4  # of the short LoRA phase


def test_the_grid_follows_its_checkpoint_and_shows_what_the_stock_pipeline_draws(converted, tmp_path):
    """The grid of the last step against the stock pipeline around the exported LoRA, embedder and head: same noise,
    8-bit
    levels within 2. (Merged weights are bfloat16 as the source's are, and up to 12 levels off.)"""
    copy_stages(converted, tmp_path, "align-head")
    settings = short_settings(**{"watch.grid_every": STEPS // 2, "watch.pictures": PICTURES})
    arguments = ["tiny-flux", "--ae", "tiny-dc-ae-f32", "-y", "-o", "bundle", "--run-dir", "run", "--until", "adapt-1"]
    done = run_cli(*arguments, *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "run" / "adapt-1"
    for step in (STEPS // 2, STEPS):
        saved = folder / "checkpoints" / f"step-{step:06d}" / "checkpoint.json"
        assert saved.stat().st_mtime_ns < (folder / "samples" / f"step-{step:06d}.png").stat().st_mtime_ns

    job = prepare(conversion.recorded(tmp_path / "run")[0], Run(tmp_path / "run", NULL), NULL)
    held_out, bundle = job.rows(job.resolution).split()[1], job.recipe.bundle
    z0, _ = held_out.batch(list(range(PICTURES)))
    captions = held_out.captions(list(range(PICTURES)))
    dense, export = tmp_path / "run" / "surgery" / "transformer", folder / "export"
    pipeline = converted_pipeline(job, models.load(dense, job.dtype, export / names.MODULES))
    pipeline.load_lora_weights(export, weight_name=names.LORA)
    call = job.family.pipeline_call(
        pipeline, captions, height=128, width=128, steps=bundle.steps, guidance=bundle.guidance, length=job.text_length
    )
    seeds = [torch.Generator().manual_seed(job.recipe.seed * 1_000_003 + i) for i in range(PICTURES)]
    noise = torch.stack([torch.randn(z0.shape[1:], generator=seed) for seed in seeds])
    ae = AutoencoderDC.from_pretrained(job.target)
    with torch.no_grad():
        drawn = pipeline(**call, latents=noise.flatten(2).transpose(1, 2), output_type="pil").images
        again = [to_image(pixels) for pixels in ae.decode(z0 / ae.config.scaling_factor).sample]
    wanted = grid({f"step {STEPS}": drawn, "round trip": again}, captions)
    found = Image.open(folder / "samples" / f"step-{STEPS:06d}.png")
    assert found.size == wanted.size
    difference = numpy.abs(numpy.asarray(found, int) - numpy.asarray(wanted, int))
    assert difference.max() <= 2
    earlier = Image.open(folder / "samples" / f"step-{STEPS // 2:06d}.png")
    assert numpy.abs(numpy.asarray(found, int) - numpy.asarray(earlier, int)).max() > 2  # the weights moved on
