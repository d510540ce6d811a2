"""What the prompts of GenEval (Ghosh et al., arXiv 2310.11513) ask for, read from their words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

# The 80 classes of COCO in the order of its detectors, under GenEval's names.
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed",
    "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)  # fmt: skip
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
NUMBERS = {"two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Demand:
    """Objects that must be there.

    Attributes:
        name: one of CLASSES.
        color: of each; None: any.
        relation: where they lie, seen from those of the first demand; None: anywhere.
    """

    name: str
    count: int = 1
    color: str | None = None
    relation: str | None = None


@dataclass(frozen=True)
class Question:
    """One prompt: its tag and what it asks for."""

    tag: str
    demands: tuple[Demand, ...]

    @property
    def exact(self) -> bool:
        """Whether more objects than asked for are wrong."""
        return self.tag == "counting"


def read(prompt: str) -> Question | None:
    """What a prompt of GenEval asks for; None for another text."""
    found = _form().fullmatch(prompt)
    if found is None:
        return None
    one, other = found["one"], found["other"]
    if found["number"]:
        return Question("counting", (Demand(_plurals()[found["many"]], NUMBERS[found["number"]]),))
    if found["relation"]:  # the second object comes first: the other one is seen from it
        return Question("position", (Demand(other), Demand(one, relation=found["relation"])))
    colors = found["color"], found["other_color"]
    if other:
        demands = (Demand(one, color=colors[0]), Demand(other, color=colors[1]))
        if None in colors and any(colors):
            return None
        return Question("color_attr" if colors[0] else "two_object", demands)
    return Question("colors" if colors[0] else "single_object", (Demand(one, color=colors[0]),))


@cache
def _plurals() -> dict[str, str]:
    """Plural as GenEval writes it ("skises") -> class."""
    return {f"{name}{'es' if name.endswith('s') else 's'}": name for name in CLASSES}


@cache
def _form() -> re.Pattern[str]:
    classes, colors = "|".join(CLASSES), "|".join(COLORS)
    one = rf"an? (?:(?P<color>{colors}) )?(?P<one>{classes})"
    other = rf"an? (?:(?P<other_color>{colors}) )?(?P<other>{classes})"
    second = rf"(?: (?:and|(?P<relation>{'|'.join(RELATIONS)})) {other})?"
    many = rf"(?P<number>{'|'.join(NUMBERS)}) (?P<many>{'|'.join(_plurals())})"
    return re.compile(rf"a photo of (?:{many}|{one}{second})")
