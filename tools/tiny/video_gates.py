"""The figures of the miniatures that make videos: round trips of the autoencoders, and what tiny-wan draws.

The shipped evaluators judge. No model was trained on these videos.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from dcgen_convert import families
from dcgen_convert.evaluation import tiny_videos
from dcgen_convert.families.base import Pipeline
from dcgen_convert.networks import autoencoders, pipelines
from dcgen_convert.tiny import videos, world
from tools.tiny import text, video_autoencoders, wan
from tools.tiny.loop import Log

UNSEEN = 424_242
COUNT = 200
STEPS, GUIDANCE = 16, 3.0


def gates(work: Path, log: Log) -> None:
    """Tell the figures of the parts that ``work`` holds."""
    known = [name for name in video_autoencoders.NAMES if (work / name).exists()]
    if known:
        log(f"videos themselves: {_shown(tiny_videos.read(unseen()[1]) == unseen()[0])}")
    for name in known:
        right, psnr = round_trip(autoencoders.load(work / name))
        log(f"{name}: {_shown(right)}, PSNR {psnr:.2f} dB")
    if (work / "wan").exists():
        log(f"wan, {STEPS} steps: {_shown(drawn(wan.pipeline(work).to(torch.float32))[0])}")


def unseen(count: int = COUNT) -> tuple[Tensor, Tensor]:
    """(labels (count, 7), videos (count, 3, 13, 128, 128) in [-1, 1]) that no model was trained on."""
    labels = videos.sample_labels(count, UNSEEN)
    drawn = [videos.draw(rows, UNSEEN + i)[:, :, : wan.FRAMES] for i, rows in enumerate(labels.split(10))]
    return labels, torch.cat(drawn)


def round_trip(codec: autoencoders.Codec, count: int = COUNT) -> tuple[Tensor, float]:
    """Which attributes survive, (count, 7) bool, and PSNR in dB, of the videos of `unseen`.

    A deep autoencoder is given 13 frames too: it repeats the last one to make 16, and gives 13 back.
    """
    labels, clips = unseen(count)
    again = codec.decode(codec.encode(clips))
    return tiny_videos.read(again) == labels, -10 * math.log10((again - clips).square().mean().item() / 4)


def drawn(pipeline: Pipeline, count: int = 120) -> tuple[Tensor, Tensor]:
    """What the stock pipeline draws of as many captions: which attributes are right (count, 7) bool, and the videos."""
    labels = videos.sample_labels(count, UNSEEN)
    captions, clips = [videos.caption(row) for row in labels.tolist()], []
    pipeline.set_progress_bar_config(disable=True)
    settings = dict(side=world.SIDE, steps=STEPS, guidance=GUIDANCE, length=text.LENGTH, frames=wan.FRAMES)
    for start in range(0, count, 20):
        some = range(start, min(count, start + 20))
        clips.append(pipelines.draw(families.get("wan"), pipeline, [captions[i] for i in some], some, **settings))
    found = torch.cat(clips)
    return tiny_videos.read(found) == labels, found


def _shown(right: Tensor) -> str:
    """Accuracy of all attributes, and of each."""
    each = zip(videos.ATTRIBUTES, right.double().mean(0).tolist(), strict=True)
    return f"accuracy {right.double().mean():.4f} ({', '.join(f'{name} {share:.3f}' for name, share in each)})"
