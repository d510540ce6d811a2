"""Early verdicts on a training, in words: what was seen, with the figures, and what to do.

The three failure signs are those that readers of the paper name (arXiv 2509.25180): the loss diverges where the
alignment is missing; the text is lost where a guidance-distilled model is trained with the plain flow loss; the
pictures are blurred where every weight is tuned in place of a LoRA. A verdict is given on figures alone. It stops
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dcgen_convert.evaluation.curves import Curves, Points

# A least-squares head does no worse than answering zero, as zero weights are one of its choices. A random head began at
# twice to three times that in the tiny world. Between them lies room for few rows, and for a head that begins at zero.
UNALIGNED = 1.25  # held-out loss at the start, divided by that of a model that always answers zero
# Losses at fixed noise levels and fixed noise hardly jitter. A run whose loss is this far above its lowest one has
# turned round.
RISEN = 1.15  # held-out loss now, divided by the lowest one
# One grid has few pictures, and may be an accident.
IN_A_ROW = 2  # grids
# Below a quarter of what the round trips have, most captions change nothing. A healthy tiny-flux has half of it after
# 50 steps.
HEEDED = 0.25  # gain by the own caption, divided by that of the round trips, at most with 95 % confidence
# A model that hears no text guides its pictures by noise, and in the tiny world they never look right: there a loss
# this low tells that it has learned the rest. A healthy tiny-flux has it after 50 steps, when its captions count.
LEARNED = 0.55  # held-out loss, divided by that of a model that always answers zero
# In the tiny world, pictures of a healthy model are at 1.1 or less when it has learned, those of an unaligned one at 2
# to 7.
ALIKE = 1.5  # largest ratio of a distance at which pictures look like the round trips
NOISY = 2.0  # sharpness, divided by that of the round trips: above this they show noise
# Blur takes fine detail first. Young trainings are blurred too (0.4 after 50 steps), and become sharper while their
# loss falls: so this counts only where the loss has levelled out.
SHARP = 0.5  # sharpness, divided by that of the round trips
LEVEL = 0.05  # part of the held-out loss that PART of the steps brings; below, it has levelled out
# What later steps bring is a small part of what they cost, when a third of all steps brings this little.
LITTLE = 0.01  # part of the held-out loss
PART = 1 / 3  # of the steps so far
FEWEST = 4  # points of a curve, before it is said to be flat

Lines = Sequence[Mapping[str, Any]]  # of one measure


@dataclass(frozen=True)
class EarlyVerdict:
    """sign: a name of what was seen. seen: with its figures. advice: what to do. grave: the result will be bad."""

    sign: str
    seen: str
    advice: str
    grave: bool = True

    def __str__(self) -> str:
        return f"{self.sign}: {self.seen}. {self.advice}"


def of(curves: Curves) -> list[EarlyVerdict]:
    """All that is to be said of a training so far."""
    unaligned = alignment_missing(curves.held_out, curves.nothing)
    found = (
        unaligned,
        diverges(curves.held_out),
        None if unaligned else text_lost(curves.measures, curves.held_out, curves.nothing),  # the first explains it
        blurred(curves.measures.get("sharpness", ()), curves.held_out),
        patience(curves.held_out, curves.measures),
    )
    return [verdict for verdict in found if verdict]


def alignment_missing(held_out: Points, nothing: float | None) -> EarlyVerdict | None:
    """The held-out loss at the start is far above what an aligned model has.

    Args:
        held_out: (step, loss), from step 0 on. nothing: loss of a model that always answers zero; None: not known.
    """
    if not held_out or held_out[0][0] or not nothing or held_out[0][1] <= UNALIGNED * nothing:
        return None
    start, (step, now) = held_out[0][1], held_out[-1]
    since = f"; after step {step:g} it is {now:.3g}" if step else ""
    return EarlyVerdict(
        "alignment missing",
        f"the held-out loss begins at {start:.3g}, and a model that always answers zero has {nothing:.3g}{since}",
        "Embedder and head were not fitted to the base: take align_embedder.method ridge and align_head.method "
        "least-squares, and look at the losses of these two stages",
    )


def diverges(held_out: Points) -> EarlyVerdict | None:
    """The held-out loss has turned round and rises."""
    if len(held_out) < 3:
        return None
    (best, lowest), (step, now) = min(held_out, key=lambda point: point[1]), held_out[-1]
    if now <= RISEN * lowest:
        return None
    return EarlyVerdict(
        "it diverges",
        f"the held-out loss was {lowest:.3g} at step {best:g}, and is {now:.3g} after step {step:g}",
        "Where the training loss rises too, the alignment is missing or the rate (lr of the phase) is too high; where "
        "it falls, the pictures are learned by heart: give more (data.count)",
    )


def text_lost(measures: Mapping[str, Lines], held_out: Points, nothing: float | None) -> EarlyVerdict | None:
    """All else is learned, but the pictures agree with their own captions no more than with those of others.

    Args:
        measures: name -> lines as `previews.lines` makes them, in the order of their steps.
        held_out, nothing: as of `alignment_missing`.
    """
    learned = _learned(measures, held_out, nothing)
    for name, lines in measures.items():
        last = lines[-IN_A_ROW:]
        if learned and len(last) == IN_A_ROW and all(map(_unheeded, last)):
            now = last[-1]
            return EarlyVerdict(
                "text is lost",
                f"{learned}, but {name} is {now['value']:.3g} after step {now['step']}, and {now['other_prompts']:.3g} "
                f"with the captions of other pictures; the round trips gain {now['gain_round_trip']:.3g} by their own "
                "captions",
                "For a guidance-distilled base take adapt.objective guidance-corrected, with its guidance in "
                "adapt.guidance_range; else look whether the training captions belong to their pictures",
            )
    return None


def _learned(measures: Mapping[str, Lines], held_out: Points, nothing: float | None) -> str:
    """What shows that more than noise is learned; empty where nothing does."""
    ratios = {name: lines[-1]["ratio"] for name, lines in measures.items() if lines and "ratio" in lines[-1]}
    noise = max(map(_sharp, measures.get("sharpness", ())[-1:]), default=0.0)
    if ratios and max(ratios.values()) <= ALIKE and noise <= NOISY:
        worst = max(ratios, key=lambda name: ratios[name])
        return (
            f"the pictures look right (by {worst} they are {ratios[worst]:.2g} times as far from the round trips as "
            "these are from one another)"
        )
    if held_out and nothing and held_out[-1][1] <= LEARNED * nothing:
        return f"the held-out loss has fallen to {held_out[-1][1]:.3g} ({nothing:.3g} for a model that answers zero)"
    return ""


def _unheeded(line: Mapping[str, Any]) -> bool:
    """Whether a score says that captions change little, while they do for the round trips."""
    best = line.get("gain_round_trip", 0.0)
    return best > 0 and "gain_high" in line and line["gain_high"] < HEEDED * best


def blurred(lines: Lines, held_out: Points) -> EarlyVerdict | None:
    """Fine detail is far below that of the round trips, and the loss has levelled out.

    Args:
        lines: of the measure sharpness. held_out: (step, loss), from step 0 on.
    """
    last, stretch = lines[-IN_A_ROW:], _stretch(held_out)
    if len(last) < IN_A_ROW or stretch is None or stretch.gained >= LEVEL:
        return None
    if max(map(_sharp, last)) >= SHARP or last[-1].get("high", 0.0) >= 0:
        return None
    now = last[-1]
    return EarlyVerdict(
        "blurred",
        f"sharpness is {now['value']:.3g} after step {now['step']}, {_sharp(now):.0%} of that of the round trips "
        f"({now['round_trip']:.3g}), and the last {stretch.steps:g} steps brought {stretch.gained:.1%} of the held-out "
        "loss",
        "Tuning of every weight blurs: take mode lora for the phase; else a lower rate, or the adapt.objective that "
        "the recipe of this family has",
    )


def _sharp(line: Mapping[str, Any]) -> float:
    """Sharpness, divided by that of the round trips; 1 where these have none."""
    return float(line["value"] / line["round_trip"]) if line.get("round_trip") else 1.0


@dataclass(frozen=True)
class Stretch:
    """The last PART of the steps: from step begin to end, and the held-out losses there."""

    begin: float
    end: float
    before: float
    now: float

    @property
    def steps(self) -> float:
        return self.end - self.begin

    @property
    def gained(self) -> float:
        """Part of the loss that these steps brought."""
        return (self.before - self.now) / self.before


def _stretch(held_out: Points) -> Stretch | None:
    """The last part of a curve; None where it has too few points."""
    if len(held_out) < FEWEST:
        return None
    end, now = held_out[-1]
    begin, before = min(held_out[:-1], key=lambda point: abs(point[0] - end * (1 - PART)))
    return Stretch(begin, end, before, now)


def patience(held_out: Points, measures: Mapping[str, Lines]) -> EarlyVerdict | None:
    """The last third of the steps brought hardly anything: how many steps brought how much."""
    stretch = _stretch(held_out)
    if stretch is None or not 0 <= stretch.gained < LITTLE:
        return None
    also = "".join(f"; {text}" for text in _brought(measures, stretch.begin))
    return EarlyVerdict(
        "it hardly improves",
        f"{stretch.steps:g} steps, from {stretch.begin:g} to {stretch.end:g}, brought {stretch.gained:.1%} of the "
        f"held-out loss ({stretch.before:.4g} to {stretch.now:.4g}){also}",
        "More steps at this rate will bring little: end the phase here (its steps), or lower its rate",
        grave=False,
    )


def _brought(measures: Mapping[str, Lines], begin: float) -> Iterator[str]:
    """What each measure was and is, over the steps from ``begin`` on."""
    for name, lines in measures.items():
        since = [line["value"] for line in lines if line["step"] >= begin]
        if len(since) > 1:
            yield f"{name} {since[0]:.3g} to {since[-1]:.3g}"
