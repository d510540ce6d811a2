"""The tiny world: pictures with captions, drawn from six attributes. All models under ``tiny/`` learn from them.

A picture shows one shape on one scene. Its caption names all six attributes, each by a word that no other attribute
uses. So the caption is clear even when the order of its words is lost:

    a small striped red circle at the top left on grass

There are 5,400 captions. Pictures are 128 x 128 RGB in [-1, 1], anti-aliased. Position, size, colour and background
have random jitter, so that no two pictures are alike. The same attributes and the same seed give the same picture.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

SIDE = 128  # px

COLORS = {
    "red": (0.90, 0.12, 0.10),
    "yellow": (0.98, 0.86, 0.10),
    "green": (0.15, 0.85, 0.25),
    "blue": (0.15, 0.30, 0.98),
    "purple": (0.58, 0.12, 0.78),
    "pink": (1.00, 0.52, 0.78),
}
SCENES = {  # phrase -> mean background colour
    "on grass": (0.18, 0.36, 0.16),
    "on sand": (0.74, 0.64, 0.46),
    "at night": (0.06, 0.06, 0.14),
    "on snow": (0.90, 0.92, 0.95),
    "under water": (0.08, 0.36, 0.48),
}
PLACES = {  # phrase -> centre (x, y) as a fraction of the side
    "in the center": (0.5, 0.5),
    "at the top left": (0.33, 0.33),
    "at the top right": (0.67, 0.33),
    "at the bottom left": (0.33, 0.67),
    "at the bottom right": (0.67, 0.67),
}
SIZES = {"small": 20.0, "large": 33.0}  # radius in px
TEXTURES = ("plain", "striped", "dotted")
SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross")

# The order of this table is the order of the attribute columns everywhere (labels, evaluator heads, reports).
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "scene": tuple(SCENES),
    "place": tuple(PLACES),
    "size": tuple(SIZES),
    "texture": TEXTURES,
}
CLASSES = tuple(itertools.product(SHAPES, COLORS))  # class labels of the class-conditional tiny-dit: 36


def caption(labels: Sequence[int]) -> str:
    """The caption of one row of attribute indices, in the order of ``ATTRIBUTES``."""
    shape, color, scene, place, size, texture = (
        names[int(i)] for names, i in zip(ATTRIBUTES.values(), labels, strict=True)
    )
    return f"a {size} {texture} {color} {shape} {place} {scene}"


def parse(text: str) -> list[int] | None:
    """Attribute indices of a caption that :func:`caption` wrote; None when a word is missing."""
    labels = []
    for names in ATTRIBUTES.values():
        found = [i for i, name in enumerate(names) if f" {name} " in f" {text} "]
        if len(found) != 1:
            return None
        labels.append(found[0])
    return labels


def block_seed(seed: int, block: int) -> int:
    """Seed of block number ``block`` of a long draw; that of block 0 is ``seed``.

    torch's generator on the CPU reads the low 32 bits of a seed alone: what is added must not stand above them.
    """
    return seed + block * 0x9E3779B1  # 2^32 over the golden ratio: its multiples lie far apart


def sample_labels(count: int, seed: int, by_class: bool = False) -> torch.Tensor:
    """``count`` rows of uniformly drawn attribute indices, (count, 6) int64.

    by_class: rows for class-conditional models. All their pictures have a plain texture and a shape in the centre.
    """
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(len(names), (count,), generator=generator) for names in ATTRIBUTES.values()]
    if by_class:
        columns[list(ATTRIBUTES).index("texture")].fill_(TEXTURES.index("plain"))
        columns[list(ATTRIBUTES).index("place")].fill_(list(PLACES).index("in the center"))
    return torch.stack(columns, dim=1)


def draw(
    labels: torch.Tensor,
    seed: int,
    side: int = SIDE,
    *,
    shift: torch.Tensor | None = None,
    growth: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw one picture per row of ``labels``.

    Args:
        labels: (B, 6) attribute indices.
        seed: seed of all jitter; the same (labels, seed) gives the same pixels.
        side: height and width in px.
        shift: where the shapes are moved to, (B, 2) in px of the 128 px picture: (x, y). None: nowhere.
        growth: what their radius is multiplied by, (B,). None: 1.

    Returns:
        (B, 3, side, side) float32 in [-1, 1].
    """
    generator = torch.Generator().manual_seed(seed)
    count = labels.shape[0]

    def jitter(*shape: int, low: float = -1.0, high: float = 1.0) -> torch.Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    scale = side / SIDE
    axis = (torch.arange(side, dtype=torch.float32) + 0.5) / scale  # in px of the 128 px picture
    y, x = axis[None, :, None], axis[None, None, :]

    places = torch.tensor(list(PLACES.values()))[labels[:, 3]] * SIDE + jitter(2) * 4.0
    radius = torch.tensor(list(SIZES.values()))[labels[:, 4]] * (1 + 0.08 * jitter())
    places = places if shift is None else places + shift
    radius = radius if growth is None else radius * growth
    dx, dy = x - places[:, 0, None, None], y - places[:, 1, None, None]
    distance = _signed_distance(labels[:, 0], dx, dy, radius[:, None, None])
    inside = (0.5 - distance * scale).clamp(0, 1)[:, None]  # one pixel of anti-aliasing

    ink = torch.tensor(list(COLORS.values()))[labels[:, 1]] + 0.04 * jitter(3)
    period = 16.0 + jitter()
    phase = jitter(2) * 3.0
    stripes = _wave((dx + dy) / 2**0.5 + phase[:, 0, None, None], period[:, None, None])
    grid_x = _wave(dx + phase[:, 0, None, None], period[:, None, None])
    grid_y = _wave(dy + phase[:, 1, None, None], period[:, None, None])
    dots = ((grid_x + grid_y - 0.5) * 2).clamp(0, 1)
    stripes = (stripes * 2).clamp(-1, 1) * 0.5 + 0.5
    texture = labels[:, 5, None, None]
    shade = torch.where(texture == 1, stripes, torch.where(texture == 2, dots, torch.zeros_like(dots)))
    ink = ink[:, :, None, None] * (1 - 0.75 * shade[:, None])

    ground = torch.tensor(list(SCENES.values()))[labels[:, 2]] + 0.03 * jitter(3)
    slope = jitter(2) * 0.06
    tilt = slope[:, 0, None, None] * (x / SIDE - 0.5) + slope[:, 1, None, None] * (y / SIDE - 0.5)
    ground = ground[:, :, None, None] + tilt[:, None]
    return (ink * inside + ground * (1 - inside)).clamp(0, 1) * 2 - 1


def _wave(position: torch.Tensor, period: torch.Tensor) -> torch.Tensor:
    return torch.cos(position * (2 * torch.pi / period))


def _signed_distance(shape: torch.Tensor, dx: torch.Tensor, dy: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Distance in px from the outline, negative inside, (B, H, W). All shapes have about the same area."""
    radial = (dx**2 + dy**2).sqrt()
    ax, ay = dx.abs(), dy.abs()
    arm = 0.34 * r
    distances = (
        radial - r,  # circle
        torch.maximum(ax, ay) - 0.88 * r,  # square
        torch.maximum(ax * 0.866 - dy * 0.5 - 0.5 * r, dy - 0.62 * r),  # triangle, apex up
        (ax + ay) * 0.7071 - 0.82 * r,  # diamond
        (radial - 0.76 * r).abs() - 0.25 * r,  # ring
        torch.minimum(torch.maximum(ax - r, ay - arm), torch.maximum(ax - arm, ay - r)),  # cross
    )
    stacked = torch.stack([d.expand_as(radial) for d in distances])
    return stacked.gather(0, shape[None, :, None, None].expand(1, *radial.shape))[0]
