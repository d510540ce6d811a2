"""GenEval's prompts, judged by a detector of transformers.

The rules and thresholds are those of GenEval (arXiv 2310.11513). The detector has the same architecture, but other
weights and another implementation, so the values are not GenEval's, and must not be called so.
"""

from __future__ import annotations

import importlib.util
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dcgen_convert.core.errors import AccessError, InputError
from dcgen_convert.core.files import read_object
from dcgen_convert.core.journal import fingerprint
from dcgen_convert.evaluation import preparation, weights
from dcgen_convert.evaluation.clip import Tower
from dcgen_convert.evaluation.geneval_prompts import CLASSES, COLORS, Demand, Question, read
from dcgen_convert.evaluation.measure import Score
from dcgen_convert.evaluation.pixels import from_images, to_images

DETECTOR = weights.Needed(
    "a Mask2Former model", "mask2former", "--detector", "facebook/mask2former-swin-small-coco-instance"
)
SURE, SURE_OF_COUNT = 0.3, 0.9  # score above which an object counts, and where objects are counted
MOST = 16  # objects of one class that are looked at
NEAR = 0.1  # of the objects' sizes: a shorter offset is no relation
GREY = "#999999"  # around an object whose colour is named
TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")


@dataclass(frozen=True)
class Seen:
    """One object: its score, box (left, top, right, bottom) in px, and mask (H, W) bool."""

    score: float
    box: tuple[int, int, int, int]
    mask: Tensor


Namer = Callable[[Sequence[Seen], str], list[str]]  # objects of a class -> their colours


class GenEval(Score):
    """1 where the picture shows what a prompt of GenEval asks for, else 0; NaN for other prompts.

    The mean is that of all pictures. GenEval takes the mean over its six kinds of prompts.
    """

    name = "geneval"
    label = "GenEval prompts, HF detector"

    def __init__(self, detector: Detector, tower: Tower) -> None:
        self._detector, self._tower, self._colors = detector, tower, Colors(tower)

    def made_of(self) -> str:
        return fingerprint([self._detector.fingerprint, self._tower.fingerprint])

    def scores(self, pictures: Tensor, captions: list[str]) -> Tensor:
        found = []
        for number, caption in enumerate(captions):
            question = read(caption)
            found.append(math.nan if question is None else float(self._right(pictures[number : number + 1], question)))
        return torch.tensor(found, dtype=torch.float64)

    def _right(self, picture: Tensor, question: Question) -> bool:
        seen = self._detector(picture, SURE_OF_COUNT if question.exact else SURE)
        image = to_images(picture)[0]
        return right(question, seen, lambda objects, name: self._colors(image, objects, name))


def right(question: Question, seen: Mapping[str, Sequence[Seen]], colors: Namer) -> bool:
    """Whether the objects ``seen`` are what a question asks for: class -> objects, the surest first."""
    groups = [_taken(demand, seen.get(demand.name, ()), colors) for demand in question.demands]
    if None in groups or (question.exact and any(len(seen[demand.name]) > demand.count for demand in question.demands)):
        return False
    return all(
        demand.relation in relations(one.box, other.box)
        for demand, group in zip(question.demands, groups, strict=True)
        if demand.relation
        for one in group or ()
        for other in groups[0] or ()
    )


def _taken(demand: Demand, objects: Sequence[Seen], colors: Namer) -> Sequence[Seen] | None:
    """The surest objects that a demand asks for; None where there are too few, or of another colour."""
    taken = objects[: demand.count]
    if len(taken) < demand.count or (demand.color and any(one != demand.color for one in colors(taken, demand.name))):
        return None
    return taken


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """How box a lies to box b. An offset below NEAR of both sizes does not count; a diagonal one counts twice."""
    offsets = [(a[k] + a[k + 2] - b[k] - b[k + 2]) / 2 for k in (0, 1)]
    sizes = [a[k + 2] - a[k] + b[k + 2] - b[k] for k in (0, 1)]
    across, down = (
        math.copysign(max(abs(offset) - NEAR * size, 0), offset) for offset, size in zip(offsets, sizes, strict=True)
    )
    far = math.hypot(*offsets)
    if max(abs(across), abs(down)) < 1e-3:
        return set()
    found = {"left of": -across, "right of": across, "above": -down, "below": down}
    return {name for name, length in found.items() if length / far > 0.5}


class Colors:
    """Names the colour of objects with CLIP: each alone on GREY, against three phrases per colour."""

    def __init__(self, tower: Tower) -> None:
        self._tower = tower
        self._known: dict[str, Tensor] = {}

    def __call__(self, image: Image.Image, objects: Sequence[Seen], name: str) -> list[str]:
        crops = [from_images([self._alone(image, one)]) for one in objects]
        found = torch.cat([self._tower.of_pictures(crop) for crop in crops])
        return [COLORS[number] for number in (found @ self._phrases(name).T).argmax(1).tolist()]

    def _phrases(self, name: str) -> Tensor:
        """One embedding of length 1 per colour, (COLORS, D)."""
        if name not in self._known:
            texts = [template.format(color, name) for color in COLORS for template in TEMPLATES]
            means = self._tower.of_texts(texts).unflatten(0, (len(COLORS), len(TEMPLATES))).mean(1)
            self._known[name] = torch.nn.functional.normalize(means, dim=-1)
        return self._known[name]

    @staticmethod
    def _alone(image: Image.Image, one: Seen) -> Image.Image:
        mask = Image.fromarray((one.mask.to(torch.uint8) * 255).numpy())
        return Image.composite(image, Image.new("RGB", image.size, GREY), mask).crop(one.box)


class Detector:
    """A Mask2Former for the 80 classes of COCO, loaded when it is used first."""

    def __init__(self, folder: Path, device: str) -> None:
        self._folder, self._device = folder, device
        self._prepared = preparation.read(folder, preparation.DETECTOR)

    @property
    def fingerprint(self) -> str:
        """Hash of its files."""
        return weights.fingerprint_of(self._folder)

    @cached_property
    def _model(self) -> Any:
        from transformers import Mask2FormerForUniversalSegmentation

        return weights.load(Mask2FormerForUniversalSegmentation, self._folder, self._device, attention="eager")

    @torch.no_grad()
    def __call__(self, picture: Tensor, least: float) -> dict[str, list[Seen]]:
        """Class -> objects whose score is above ``least``, the surest first and at most MOST.

        Args:
            picture: (1, 3, H, W) in [-1, 1].
        """
        found = self._model(self._prepared(picture).to(self._device))
        odds = found.class_queries_logits[0].softmax(-1)[:, :-1]  # (queries, classes); the last one is "nothing"
        best, places = odds.flatten().topk(len(odds))  # as many objects as queries; one query may give several
        seen: dict[str, list[Seen]] = defaultdict(list)
        for odd, place in zip(best.tolist(), places.tolist(), strict=True):
            if odd <= least:  # the score is at most this
                break
            query, label = divmod(place, odds.shape[1])
            one = _object(odd, found.masks_queries_logits[:, query : query + 1], picture.shape[-2:])
            if one is not None and one.score > least:
                seen[CLASSES[label]].append(one)
        return {name: sorted(objects, key=lambda one: -one.score)[:MOST] for name, objects in seen.items()}


def _object(odd: float, logits: Tensor, size: Sequence[int]) -> Seen | None:
    """The object of one query's mask, (1, 1, h, w); None where the mask is empty. Its score counts the mask's too."""
    large = torch.nn.functional.interpolate(logits.float(), size=tuple(size), mode="bilinear")[0, 0].cpu()
    mask = large > 0
    if not mask.any():
        return None
    down, across = (mask.any(dim).nonzero().flatten() for dim in (1, 0))
    box = (int(across[0]), int(down[0]), int(across[-1]) + 1, int(down[-1]) + 1)
    return Seen(odd * large[mask].sigmoid().mean().item(), box, mask)


def detector(given: str | None, device: str, *, fetch: bool, asked: bool, recipe: bool = False) -> Detector:
    """The detector that was given, or the usual one.

    Raises:
        InputError, AccessError: as `weights.find`; it has other classes; scipy is missing, which transformers wants.
    """
    folder = weights.find(given, DETECTOR, fetch=fetch, asked=asked, recipe=recipe)
    labels = read_object(folder / "config.json").get("id2label")
    if not isinstance(labels, dict) or len(labels) != len(CLASSES):
        raise InputError(f"{folder} is no detector of the {len(CLASSES)} classes of COCO", f"{DETECTOR.usual} is one")
    if importlib.util.find_spec("scipy") is None:
        raise AccessError("geneval needs the package scipy", "pip install 'dcgen-convert[eval]'")
    return Detector(folder, device)
