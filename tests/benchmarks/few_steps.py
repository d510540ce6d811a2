"""The whole method for a few-step model.

The shipped tiny-sana is distilled to a miniature of SANA-Sprint. This is converted to `tiny-dc-ae-f64` twice: with
pictures of its own, and with given pictures. The script prints accuracy and Frechet distance at one, two and four
steps, for the base, after the flow phase, and after the consistency phase that follows.

    PYTHONPATH=. python tests/benchmarks/few_steps.py WORK

Run it in the repository's root folder: it needs tools/tiny. WORK keeps what was made, so that the script goes on where
it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from conversion import PROMPTS, convert
from diffusers import SanaSprintPipeline

from dcgen_convert import families
from dcgen_convert.data.images import to_image
from dcgen_convert.evaluation import tiny_world
from dcgen_convert.networks import models, pipelines
from dcgen_convert.tiny import world
from tools.tiny import assemble, parts

RECIPE = Path(__file__).with_suffix(".yaml")
PART = "sana-sprint"
PICTURES = 4096
GUIDED = [
    "--set",
    "adapt.objective=guidance-corrected",
    "--set",
    "adapt.guidance_range=[1,5]",
]  # given pictures show no guidance
SEED, BATCH = 31, 64


def main(work: Path) -> None:
    if not (work / PART).exists():
        parts.make(work, PART, print)
        assemble.write(work, work / "weights")
    base = work / "weights" / f"tiny-{PART}"
    given = work / "pictures"
    if not given.exists():
        save_pictures(given)
    print("| pictures | steps | base | after the flow phase | after consistency distillation |\n|---|---|---|---|---|")
    for name, settings in {"own": [], "given": ["--data", str(given), *GUIDED]}.items():
        folder = work / name
        convert(folder, [str(base), "--recipe", str(RECIPE), *settings], folder)
        stages = [
            load(base),
            load(folder / "bundle", folder / "run" / "merge-1" / models.TRANSFORMER),
            load(folder / "bundle"),
        ]
        for steps in (1, 2, 4):
            print(
                f"| {name} | {steps} | " + " | ".join(figures(pipeline, steps) for pipeline in stages) + " |",
                flush=True,
            )


def save_pictures(folder: Path) -> None:
    folder.mkdir()
    labels = world.sample_labels(PICTURES, SEED)
    for i, (row, picture) in enumerate(zip(labels.tolist(), world.draw(labels, SEED), strict=True)):
        to_image(picture).save(folder / f"{i:05d}.png")
        (folder / f"{i:05d}.txt").write_text(world.caption(row))


def load(folder: Path, transformer: Path | None = None) -> SanaSprintPipeline:
    pipeline = SanaSprintPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if transformer:
        pipeline.transformer = models.load(transformer, torch.float32)
    return pipeline


def figures(pipeline: SanaSprintPipeline, steps: int) -> str:
    """Accuracy and Frechet distance of the pictures of `PROMPTS` captions that no training saw."""
    captions = [world.caption(row) for row in world.sample_labels(PROMPTS, 77).tolist()]
    settings = dict(side=world.SIDE, steps=steps, guidance=3.0, length=16)
    pictures = torch.cat(
        [
            pipelines.draw(families.get(PART), pipeline, captions[i : i + BATCH], range(i, i + BATCH), **settings)
            for i in range(0, PROMPTS, BATCH)
        ]
    )
    return f"{tiny_world.accuracy(pictures, captions):.1%}, {tiny_world.distance(pictures, captions):.0f}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
