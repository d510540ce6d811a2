"""How many rows the least squares of the head takes. A row is one token of a noised picture; K are the head's inputs.

With R rows whose noise is independent, the loss of least squares on other rows lies above its limit by the fraction
K / R. So twice the rows lower it by about K / 2R, and what all further rows could still gain is as much again. The fit
takes 16 rows per input, then twice as many, and so on. It ends when twice the rows changed the held-out loss by less
than 1 %. For independent rows that is at 128 rows per input, whatever the model. Tokens of one picture are not quite
independent: tiny-flux ends at 256, tiny-dit at 128.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dcgen_convert.data.held_out import held_out_rows
from dcgen_convert.recipe.schema import Recipe

FIRST = 16  # rows per input of the first solution
ENOUGH = 0.01  # relative change of the held-out loss, by twice the rows, at which no more rows are taken
USUAL = 256  # rows per input at which the fit is expected to end
MOST = 32_768  # rows per input beyond which no draw is even thought of
UNIT = 16  # samples (a picture with its noise) that one rank takes at a time; they have one size
HELD_OUT = 128  # held-out pictures that decide, at most, each at every level of t
LEVELS = 5  # noise levels of the held-out loss


@dataclass(frozen=True)
class HeadSamples:
    """Samples of a fit, each a picture that runs through the network ``passes`` times.

    Attributes:
        usual: as many as the fit is expected to take.
        most: as many as it takes when the loss never settles: every picture with every draw.
        held_out: of held-out pictures, beside them.
        passes: forward passes per sample: two with the guidance-corrected objective.
    """

    usual: int
    most: int
    held_out: int
    passes: int


def head_samples(recipe: Recipe, inputs: int, tokens: int) -> HeadSamples:
    """What the head's start costs with ``recipe``, if it is fitted at all.

    Args:
        inputs: numbers per token that the head reads (K): the width of the network.
        tokens: image tokens of a picture at the resolution of the first phase.
    """
    if recipe.align_head.method != "least-squares":
        return HeadSamples(0, 0, 0, 0)
    count = recipe.data_of(recipe.aligned_set).count
    held_out = held_out_rows(count)
    pictures = count - held_out
    most = pictures * useful_draws(recipe.align_head.draws, pictures * tokens, inputs)
    usual = min(most, math.ceil(USUAL * inputs / (UNIT * tokens)) * UNIT)
    passes = 2 if recipe.adapt.objective == "guidance-corrected" else 1
    return HeadSamples(usual, most, LEVELS * min(held_out, HELD_OUT), passes)


def useful_draws(draws: int, rows: int, inputs: int) -> int:
    """As many of the allowed ``draws`` as could ever be taken; one draw has ``rows`` rows."""
    return min(draws, max(1, math.ceil(MOST * inputs / max(1, rows))))


def ends(rows: Sequence[int], inputs: int) -> list[int]:
    """After how many units a solution is tried: with 16 rows per input, 32, 64, ... and with all.

    Args:
        rows: of each unit, in order.
        inputs: K.
    """
    found, total, goal = [], 0, FIRST * inputs
    for number, count in enumerate(rows, 1):
        total += count
        if total >= goal or number == len(rows):
            found.append(number)
            while goal <= total:
                goal *= 2
    return found


def reason_to_end(losses: Sequence[float], last: bool) -> str | None:
    """Why no more rows are taken, in words; None: more are taken.

    Args:
        losses: held-out loss of every solution so far.
        last: whether the newest has all rows.
    """
    if last:
        return "these are all rows"
    if len(losses) > 1 and abs(losses[-1] - losses[-2]) < ENOUGH * losses[-2]:
        return f"the last doubling of the rows changed the held-out loss by less than {ENOUGH:.0%}"
    return None
