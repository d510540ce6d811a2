"""Pictures of the tiny models at 4 bits against their 16-bit selves, same seeds: attribute accuracy and PSNR.

    python tests/benchmarks/svdquant_pictures.py WORK [tiny-flux|tiny-sana ...]

Rows: round-to-nearest W4A4, smoothing + SVD (the published recipe), data-free, and the default. All with emulated
4-bit activations. WORK keeps the quantised folders.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.checkpoint.source import Source
from dcgen_convert.core.console import NULL
from dcgen_convert.core.files import write_json
from dcgen_convert.data import prompts
from dcgen_convert.evaluation import tiny_world
from dcgen_convert.evaluation.metrics import psnr
from dcgen_convert.families.catalog import find_source
from dcgen_convert.networks import models, pipelines
from dcgen_convert.recipe import loading
from dcgen_convert.svdquant import layer, record
from dcgen_convert.svdquant.layer import SvdqLinear
from dcgen_convert.svdquant.quantize import quantize
from dcgen_convert.svdquant.runtime import EmulatedSvdq, emulate
from dcgen_convert.svdquant.settings import QuantSettings
from dcgen_convert.svdquant.targets import plan_targets
from dcgen_convert.svdquant.weights import group_scales, round_to_nearest, tensor_scale

COUNT, BATCH, SEED, CALIBRATION = 256, 64, 500_000, 16
# The published recipe: no GPTQ, no search of scales, no refit.
PUBLISHED = {
    "gptq": lambda weight, lower, *scales: round_to_nearest(weight, *scales),
    "search_factor": lambda *args: None,
    "REFITS": 0,
}
VARIANTS = {
    "smoothing + SVD": (PUBLISHED, QuantSettings()),
    "data-free": ({}, QuantSettings(calibration="none")),
    "default": ({}, QuantSettings()),
}


def main(work: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names or ["tiny-flux", "tiny-sana"]:
        source = load_source(name, str(find_source(name).folder))
        data = loading.load(name).recipe.data
        call = dict(side=data.resolution, steps=data.steps, guidance=data.guidance, length=16)
        model = models.load(source.transformer, torch.float32)
        targets = plan_targets(source.family, source.config, None)
        texts = prompts.make("tiny-world", COUNT, SEED)
        wanted = draw(source, model, texts, call)
        print(f"{name}: 16-bit accuracy {tiny_world.accuracy(wanted, texts):.4f}", flush=True)
        calls = work / name / "calls"
        if not (calls / "done.json").exists():
            few = prompts.make("tiny-world", CALIBRATION, SEED + 1)
            with NULL.progress("", CALIBRATION, "") as bar:
                whole = partial(pipelines.load_pipeline, source, torch.float32, transformer=model)
                pictures = record.CalibrationSet(few, SEED, CALIBRATION, **call)
                record.record_calls(calls, source.family, whole, pictures, bar, pictures.missing(calls))
            write_json(calls / "done.json", {})
        report(f"{name}: round to nearest", draw(source, rounded(source, targets.svdq), texts, call), wanted, texts)
        for title, (changes, settings) in VARIANTS.items():
            folder = work / name / title.replace(" ", "")
            if not folder.exists():
                given = record.read_calls(calls) if settings.calibration == "calls" else []
                with patch.multiple(layer, **changes):
                    quantize(source.transformer, folder, targets, settings, given, NULL)
            report(f"{name}: {title}", draw(source, emulate(folder), texts, call), wanted, texts)


def rounded(source: Source, names: list[str]) -> torch.nn.Module:
    """Every target as plain W4A4: nearest weights, no smoothing, an empty low-rank branch."""
    model = models.load(source.transformer, torch.float32)
    for name in names:
        linear = model.get_submodule(name)
        weight = linear.weight.detach()
        scale = tensor_scale(weight, "nvfp4")
        quantised = round_to_nearest(weight, group_scales(weight, "nvfp4", scale), scale, "nvfp4")
        n, k = weight.shape
        bias = None if linear.bias is None else linear.bias.detach().bfloat16()
        empty = [torch.zeros(shape, dtype=torch.bfloat16) for shape in ((n, 16), (16, k))]
        layer = SvdqLinear(quantised, torch.ones(k), *empty, bias)
        model.set_submodule(name, EmulatedSvdq(layer, torch.ones(n)))
    return model


def draw(source: Source, model: torch.nn.Module, texts: list[str], call: dict) -> torch.Tensor:
    pipeline = pipelines.load_pipeline(source, torch.float32, transformer=model)
    parts = [range(start, min(start + BATCH, len(texts))) for start in range(0, len(texts), BATCH)]
    return torch.cat(
        [pipelines.draw(source.family, pipeline, [texts[i] for i in p], [SEED + i for i in p], **call) for p in parts]
    )


def report(title: str, drawn: torch.Tensor, wanted: torch.Tensor, texts: list[str]) -> None:
    accuracy, quality = tiny_world.accuracy(drawn, texts), psnr(drawn, wanted, peak=2.0)
    print(f"{title}: accuracy {accuracy:.4f}, PSNR {quality:.2f} dB", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
