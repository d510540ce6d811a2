"""How large pictures the base model can draw, and what happens beyond that.

A base draws well up to the number of image tokens that it was trained on. A dynamic timestep shift grows with the
tokens. FLUX.1 at 4096 px has 65,536 of them, and its scheduler would use mu = 0.5 + 0.65 (65,536 - 256) / 3,840 =
11.55: every step but the last then sees noise only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dcgen_convert.core.errors import RecipeError
from dcgen_convert.data import prompts
from dcgen_convert.families import Family
from dcgen_convert.families.grid import Grid
from dcgen_convert.recipe.identity import Identity
from dcgen_convert.recipe.schema import Data, Recipe


def draws_edits(data: Data, family: Family) -> bool:
    """Whether what the base draws for ``data`` are edits: it must be given a picture, or it can be and is."""
    given = data.sources is not None or data.prompts in set(prompts.KINDS) - set(prompts.CAPTIONS)
    return data.kind != "folder" and bool(family.fewest_references or (family.references and given))


@dataclass(frozen=True)
class Beyond:
    """Pictures that are larger than those that the base was trained on.

    Attributes:
        side: of the pictures, in px; tokens: image tokens of one in the base.
        most: px of the largest pictures of its training; trained: tokens of one.
        mu: of the scheduler's dynamic shift at ``tokens``; None: its shift is the same at every size.
        capped: the largest mu of the training.
        shift: r in sigma' = r sigma / (1 + (r - 1) sigma) that belongs to ``capped``.
    """

    source: str
    side: int
    tokens: int
    most: int
    trained: int
    mu: float | None = None
    capped: float | None = None
    shift: float | None = None

    @property
    def cannot(self) -> str:
        """Why such pictures are no use, in words."""
        what = (
            f"{self.source} was trained to draw pictures of up to {math.isqrt(self.most)} px, {self.trained:,} image "
            "tokens: "
        )
        if self.mu is None:
            return f"{what}larger ones, of {self.tokens:,}, come out broken"
        return (
            f"{what}for {self.tokens:,} its scheduler would use mu {self.mu:.2f}, after at most {self.capped:.2f} in "
            "training, and the pictures come out broken"
        )

    @property
    def told(self) -> str:
        """One sentence: what is drawn, and with which shift."""
        what = f"{self.source} draws pictures of {self.side} px, and was trained up to {math.isqrt(self.most)} px"
        if self.shift is None:
            return f"{what}: look at them before you train"
        return f"{what}: mu is {self.capped:.2f} instead of {self.mu:.2f}; look at them before you train"


def drawn_sides(recipe: Recipe) -> Iterator[tuple[str, int]]:
    """(setting, px) of the pictures that the base draws for the training."""
    for number in recipe.sets:
        data = recipe.data_of(number)
        if data.kind == "synthetic":
            yield f"{recipe.data_key(number)}.resolution", data.resolution


def beyond(source: Identity, side: int) -> Beyond | None:
    """What the base does at ``side`` px; None where it was trained to draw such pictures, or nothing tells.

    Raises:
        AccessError: the source's config is not here.
    """
    most, grid = source.most_pixels, source.grid
    if most is None or side**2 <= most:
        return None
    found = Beyond(source.name, side, grid.tokens(side), most, most // grid.token_px**2)
    capped = capped_shift(source.family, source.pipeline.stock_scheduler or {}, found.tokens, found.trained)
    return found if capped is None else replace(found, **capped)


def capped_shift(family: Family, scheduler: Mapping[str, Any], tokens: int, trained: int) -> dict[str, Any] | None:
    """mu at ``tokens``, the largest of the training, and its shift r. None: the scheduler's shift never changes.

    The line of mu ends at max_image_seq_len tokens, or where the training ended if that was before.
    """
    config = dict(scheduler)
    if not config.get("use_dynamic_shifting") or family.fixed_shift:
        return None
    last = min(trained, config.get("max_image_seq_len") or trained)
    mu, capped = family.mu(tokens, config), family.mu(last, config)
    return {"mu": mu, "capped": capped, "shift": family.shift(last, config)} if mu > capped else None


def require_drawable(recipe: Recipe, source: Identity) -> None:
    """RecipeError when the base shall draw larger pictures than it was trained on, unless the recipe says so."""
    if recipe.data.beyond_base:
        return
    for key, side in drawn_sides(recipe):
        if found := beyond(source, side):
            raise RecipeError(
                f"{key} is {side} px, but {found.cannot}",
                f"give pictures of {side} px of your own with --data, or use a smaller --resolution; "
                f"--set data.beyond_base=true draws them all the same{_capped(found)}",
            )


def _capped(found: Beyond) -> str:
    return "" if found.capped is None else f", with mu {found.capped:.2f}"


def drawn_beyond(recipe: Recipe, source: Identity) -> list[Beyond]:
    """What the base draws for this recipe beyond the sizes of its training."""
    return [found for _, side in drawn_sides(recipe) if (found := beyond(source, side))]


def own_side(source: Identity, new: Grid, side: int) -> int:
    """Side in px at which the base draws what is compared with pictures of ``side`` px: the same, if it can.

    Else the side at which it has as many tokens as the converted model, if it can draw that one; else the largest
    that is a whole number of tokens in both.
    """
    most, old = source.most_pixels, source.grid
    if most is None or side**2 <= most:
        return side
    step = math.lcm(old.token_px, new.token_px)
    home = side * old.token_px // new.token_px
    if home**2 <= most and home % step == 0:
        return home
    return max(step, math.isqrt(most) // step * step)
