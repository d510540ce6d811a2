"""The prompts that runs of before got. A run that has begun with them goes on with them, and keeps its pictures."""

from __future__ import annotations

import random
from pathlib import Path

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
SLOTS = (STYLES, SUBJECTS, PLACES, LIGHTS, DETAILS)


def builtin(count: int, seed: int) -> list[str]:
    """Each slot is drawn by itself, for one prompt after the other."""
    generator = random.Random(seed)
    drawn = ([generator.choice(slot) for slot in SLOTS] for _ in range(count))
    return [f"{style} {subject} {place} {light}, {detail}" for style, subject, place, light, detail in drawn]


def of_file(path: Path, count: int) -> list[str]:
    """The lines of a text file in their order, again from the start where there are too few; empty without any."""
    lines = [text for line in read_lines(path) if (text := line.strip())]
    return [lines[i % len(lines)] for i in range(count)] if lines else []
