"""What the new patch embedder is fitted to: the base's embeddings of the same pictures, at one of two sizes.

pooled: of the pictures at the resolution of the first phase. The base's grid is finer there, so its embeddings are
averaged onto the new grid (arXiv 2509.25180). Its blocks never met such smooth tokens.
home: of the pictures at the size at which the base has as many tokens as the converted model. Its embeddings are taken
token by token, as its blocks know them.

A token of the new grid covers f p px of a picture, one of the base's grid f0 p0 px. So for pictures of ``px`` px the
home size is px f0 p0 / (f p): 1024 px for FLUX at 4096 px and f64. It is a whole number of tokens whenever ``px`` is a
whole number of new tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dcgen_convert.core.errors import RecipeError
from dcgen_convert.families.grid import Grid
from dcgen_convert.recipe.identity import Identity
from dcgen_convert.recipe.schema import Recipe

Size = tuple[int, int]


@dataclass(frozen=True)
class Alignment:
    """The target of the alignment.

    Attributes:
        resolution: picture side in px of the first phase.
        side: px of the square picture that the base sees for it.
        reason: why it is this target, in words.
    """

    target: Literal["pooled", "home"]
    resolution: int
    side: int
    reason: str

    def size(self, height: int, width: int) -> Size:
        """(height, width) in px of the picture that the base sees, where the new autoencoder sees this one."""
        return height * self.side // self.resolution, width * self.side // self.resolution

    @property
    def told(self) -> str:
        """One line for people."""
        how = "token by token" if self.target == "home" else "pooled onto the new grid"
        return (
            f"align_embedder.target: {self.target}: the base's embeddings of the pictures at {self.side} px, {how}, "
            f"for {self.resolution} px ({self.reason})"
        )


def alignment(recipe: Recipe, source: Identity, new: Grid) -> Alignment:
    """What the recipe's target is, or what follows where the recipe leaves it open.

    Args:
        new: the latent space that the conversion moves to.
    Raises:
        RecipeError: the recipe asks for home, and the base has no home size. AccessError: the source cannot be read.
    """
    section, px = recipe.align_embedder, recipe.adapt.phases[0].resolution
    if section.pooling == "bilinear" and new.time.frames != source.grid.time.frames:
        raise RecipeError(
            "align_embedder.pooling is bilinear, which spreads the new tokens over those of the base, and "
            f"{recipe.ae} has fewer latent frames: the first two would run into one another",
            "leave out align_embedder.pooling",
        )
    home = px * source.grid.token_px // new.token_px
    problem = _no_home(source, new, px, home)
    if section.target == "home" and problem:
        raise RecipeError(f"align_embedder.target is home, but {problem}", "--set align_embedder.target=pooled")
    if section.target is not None:
        chosen, reason = section.target == "home", "as it is set"
    elif section.pooling is not None:
        chosen, reason = False, "because align_embedder.pooling is set"
    elif problem:
        chosen, reason = False, problem
    else:
        chosen, reason = _is_known(source, home)
    return Alignment("home" if chosen else "pooled", px, home if chosen else px, reason)


def _no_home(source: Identity, new: Grid, px: int, home: int) -> str:
    """Why the base cannot be asked for its embeddings of pictures of ``home`` px; empty: it can."""
    family, config, base = source.family, source.config, source.grid
    only, table = family.only_side(config, base.f), family.table_side(config)
    most = source.most_pixels
    if new.time.frames != base.time.frames:
        return (
            f"a latent frame of the new autoencoder has {new.time.frames} frames and one of the base's "
            f"{base.time.frames}: no size gives both the same tokens"
        )
    if home == px:
        return "both grids have the same tokens already"
    if home > px:
        return f"the new tokens are smaller than the base's: pictures of {px} px would be enlarged to {home} px"
    if not family.any_shape and home != only:
        draws = f"{only} px" if only else "one size"
        return f"the base knows pictures of {draws} only, and the home size of {px} px is {home} px"
    if most is not None and home**2 > most:
        return (
            f"the home size of {px} px is {home} px, and the base was trained on pictures of up to "
            f"{math.isqrt(most)} px"
        )
    if table is not None and home // base.token_px > table:
        return f"the home size of {px} px is {home} px, beyond the {table} tokens of the base's position table"
    return ""


def _is_known(source: Identity, home: int) -> tuple[bool, str]:
    """Whether the base was trained on pictures of ``home`` px, and the reason in words."""
    if home == source.family.only_side(source.config, source.grid.f):
        return True, f"the base knows pictures of {home} px"
    if source.trained_pixels is None:
        return False, f"it is not known whether the base was trained on pictures of its home size, {home} px"
    least, most = source.trained_pixels
    sides = (f"{side} px" for side in dict.fromkeys((math.ceil(least**0.5), math.isqrt(most))))
    sizes = f"the base was trained on pictures of {' to '.join(sides)}"
    return home**2 >= least, sizes if home**2 >= least else f"its home size is {home} px, and {sizes}"
