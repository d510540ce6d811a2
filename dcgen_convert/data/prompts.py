"""Prompts for synthetic data: a file, the built-in generator (millions of combinations), or the tiny world's
captions.
"""

from __future__ import annotations

import random
from pathlib import Path

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_lines

SUBJECTS = (
    "a lighthouse", "an old fisherman", "a red fox", "a violin maker", "a city tram", "a bowl of ramen",
    "a glass teapot", "a mountain village",
    "a young woman reading", "a robot gardener", "a stack of books", "a snow leopard", "a jazz trio",
    "a vintage motorcycle", "a field of poppies",
    "a child flying a kite", "a marble statue", "a street market", "a sailing boat", "a greenhouse", "an astronaut",
    "a sleeping cat",
    "a wooden bridge", "a chess player", "a handwritten sign that says OPEN", "a desert caravan", "a coral reef",
    "a bakery window",
    "a grand piano", "an owl on a branch", "two dancers", "a watch mechanism",
)  # fmt: skip
STYLES = (
    "a photograph of", "a watercolour of", "an oil painting of", "a pencil sketch of",
    "a macro photograph of", "a black and white photograph of",
    "a children's book illustration of", "a film still of", "a woodcut of", "an isometric render of", "a portrait of",
    "a wide shot of",
)  # fmt: skip
PLACES = (
    "in a quiet harbour", "in a dense forest", "on a rooftop", "in a sunlit kitchen", "in the rain",
    "in a crowded square", "on a frozen lake",
    "in an abandoned factory", "by a country road", "in a studio", "under a bridge", "in a library", "on a beach",
    "in a small workshop",
    "at the foot of a volcano", "in a subway station",
)  # fmt: skip
LIGHTS = (
    "at dawn", "at noon", "at dusk", "at night", "in soft window light", "in neon light", "in candlelight",
    "under an overcast sky",
    "in golden backlight", "in fog", "with long shadows", "after a storm",
)  # fmt: skip
DETAILS = (
    "muted colours", "vivid colours", "shallow depth of field", "fine texture", "strong contrast",
    "pastel palette", "symmetrical composition",
    "seen from above", "seen from a low angle", "plenty of empty space", "film grain", "crisp detail",
    "motion blur", "warm tones", "cool tones",
    "reflections",
)  # fmt: skip
KINDS = ("builtin", "tiny-world")  # anything else is a file
BLOCK = 1024  # captions of the tiny world that are drawn at once
SLOTS = (STYLES, SUBJECTS, PLACES, LIGHTS, DETAILS)


def make(kind: str, count: int, seed: int, classes: list[str] | None = None) -> list[str]:
    """``count`` prompts. A larger count begins with the same ones.

    Args:
        kind: "builtin", "tiny-world", or a text file with one prompt per line (repeated in order when it is shorter).
        classes: labels of a class-conditional model; then every kind but a file draws labels uniformly.
    Raises:
        InputError: the file is missing, empty or no text.
    """
    if kind not in KINDS:
        lines = read_file(Path(kind))
        return [lines[i % len(lines)] for i in range(count)]
    generator = random.Random(seed)
    if classes:
        return [generator.choice(classes) for _ in range(count)]
    if kind == "tiny-world":
        from dcgen_convert.tiny import world

        blocks = (world.sample_labels(BLOCK, seed + (block << 32)) for block in range(-(-count // BLOCK)))
        return [world.caption(row) for block in blocks for row in block.tolist()][:count]
    style, subject, place, light, detail = (lambda slot=slot: generator.choice(slot) for slot in SLOTS)
    return [f"{style()} {subject()} {place()} {light()}, {detail()}" for _ in range(count)]


def told(kind: str, count: int) -> str:
    """What the user should know of a prompts file that has another number of prompts than ``count``; mostly empty."""
    if kind in KINDS or (found := len(read_file(Path(kind)))) == count:
        return ""
    if found < count:
        return f"{kind} has {found} prompts for {count} pictures: they are used again from the start"
    return f"{kind} has {found} prompts: the first {count} are used, {found - count} are left out"


def read_file(path: Path) -> list[str]:
    """The prompts of a text file, one per line; InputError when it is missing, empty or no text."""
    if not path.is_file():
        raise InputError(
            f"prompts file {path} does not exist", "give --prompts FILE with one prompt per line, or builtin"
        )
    lines = [text for line in read_lines(path) if (text := line.strip())]
    if not lines:
        raise InputError(f"prompts file {path} is empty", "write one prompt per line")
    return lines
