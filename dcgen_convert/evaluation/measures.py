"""The table of all measures, and the choice among them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dcgen_convert.core.errors import InputError
from dcgen_convert.evaluation import clip, dino, geneval, geneval_prompts, inception, ocr, tiny_edits, tiny_world
from dcgen_convert.evaluation.clip import ClipScore, Cmmd, PickScore, Tower
from dcgen_convert.evaluation.dino import FrechetDino
from dcgen_convert.evaluation.edit_measures import NOTHING, ClipDirection, DinoSource, Unchanged, asks_nothing
from dcgen_convert.evaluation.geneval import GenEval
from dcgen_convert.evaluation.inception import Fid
from dcgen_convert.evaluation.measure import Distance, Measure, Score, Weights
from dcgen_convert.evaluation.ocr import Ocr
from dcgen_convert.evaluation.plain import Colour, Sharpness
from dcgen_convert.evaluation.tiny_edits import EditAccuracy, Preservation
from dcgen_convert.evaluation.tiny_measures import SIDE_OF_CROPS, Accuracy, CropsFrechet, TinyCmmd, TinyFrechet
from dcgen_convert.evaluation.video_measures import FirstFrame, MotionAccuracy, TemporalDifference
from dcgen_convert.evaluation.weights import Needed, NotAtHand
from dcgen_convert.tiny import videos

__all__ = ["Distance", "Known", "Measure", "Score", "Setting", "Weights", "chosen", "known"]


@dataclass(frozen=True)
class Setting:
    """What a choice of measures depends on.

    Attributes:
        captions: of the pictures.
        side: the shorter side of the pictures in px; None: not known.
        device: where networks run.
        offline: fetch nothing from the hub.
        asked: measures were asked for by their names. Otherwise the usual models are not fetched.
        edited: the pictures were made from other pictures, which are at hand; of videos, drawn from their first frame.
        recipe: what the user gave stands in a recipe: errors name its settings.
        moving: they are videos.
    """

    weights: Weights
    captions: Sequence[str]
    side: int | None = None
    device: str = "cpu"
    offline: bool = False
    asked: bool = False
    edited: bool = False
    recipe: bool = False
    moving: bool = False

    @property
    def finding(self) -> dict[str, Any]:
        """How networks are found and where they run."""
        return {"device": self.device, "fetch": not self.offline, "asked": self.asked, "recipe": self.recipe}

    @cached_property
    def dino(self) -> FrechetDino:
        """The DINOv2 model that several measures share."""
        return dino.dino(self.weights.dino, **self.finding)

    @cached_property
    def clip(self) -> Tower:
        """The CLIP model that several measures share."""
        return clip.clip(self.weights.clip, **self.finding)


@dataclass(frozen=True)
class Known:
    """One measure of the table.

    Attributes:
        measure: its class.
        build: makes it; NotAtHand where something is missing.
        needs: what it needs, in words; "" for nothing.
        unfit: why it does not apply to these captions and pictures; None where it does.
    """

    measure: type[Measure]
    build: Callable[[Setting], Measure]
    needs: str = ""
    unfit: Callable[[Setting], str | None] = lambda _: None

    @property
    def name(self) -> str:
        return self.measure.name


def known() -> dict[str, Known]:
    """Name -> measure, of all that there are."""
    given = "the pictures that were edited"
    tiny, edits = "captions of the tiny world", "instructions of the tiny world"
    every = (
        Known(ClipScore, lambda setting: ClipScore(setting.clip), _needs(clip.CLIP), _instructed),
        Known(Cmmd, lambda setting: Cmmd(setting.clip), _needs(clip.CLIP)),
        Known(FrechetDino, lambda setting: setting.dino, _needs(dino.DINO)),
        Known(PickScore, _pickscore, _needs(clip.PICKSCORE), _instructed),
        Known(Fid, _fid, f"{inception.OPTION} FILE; the package torch-fidelity (extra eval)"),
        Known(Ocr, lambda _: ocr.ocr(), "RapidOCR, Tesseract or EasyOCR; captions with words in quotes", _no_quotes),
        Known(GenEval, _geneval, f"{_needs(geneval.DETECTOR)}; {_needs(clip.CLIP)}; GenEval's prompts", _not_geneval),
        Known(Accuracy, lambda _: Accuracy(), tiny, _not_tiny),
        Known(TinyFrechet, lambda _: TinyFrechet(), tiny, _not_tiny),
        Known(TinyCmmd, lambda _: TinyCmmd(), tiny, _not_tiny),
        Known(CropsFrechet, lambda _: CropsFrechet(), f"{tiny}, pictures of {SIDE_OF_CROPS} px and more", _no_crops),
        Known(EditAccuracy, lambda _: EditAccuracy(), edits, _not_tiny_edits),
        Known(Preservation, lambda _: Preservation(), f"{edits}, and {given}", _no_sources),
        Known(ClipDirection, lambda one: ClipDirection(one.clip), f"{given}; {_needs(clip.CLIP)}", _not_edited),
        Known(DinoSource, lambda one: DinoSource(one.dino), f"{given}; {_needs(dino.DINO)}", _not_edited),
        Known(Unchanged, lambda _: Unchanged(), f"{given}; instructions such as '{NOTHING[0]}'", _no_rest),
        Known(MotionAccuracy, lambda _: MotionAccuracy(), "captions of the tiny world in motion", _not_in_motion),
        Known(TemporalDifference, lambda _: TemporalDifference(), "videos", _no_videos),
        Known(FirstFrame, lambda _: FirstFrame(), "videos that were drawn from pictures", _no_first_frame),
        Known(Sharpness, lambda _: Sharpness()),
        Known(Colour, lambda _: Colour()),
    )
    return {one.name: one for one in every}


def chosen(  # noqa: PLR0913  all that a choice depends on, by name
    names: Iterable[str] | None,
    weights: Weights,
    captions: Sequence[str],
    *,
    side: int | None = None,
    device: str = "cpu",
    offline: bool = False,
    edited: bool = False,
    recipe: bool = False,
    moving: bool = False,
) -> tuple[list[Measure], dict[str, str]]:
    """The measures that are to be used, and the names of those left out with the reason.

    No network is loaded yet: its folder is found, and its config is read.

    Args:
        names: None: every measure that can run with what is at hand. Otherwise these, in this order.
        side: the shorter side of the pictures in px; None: not known, so measures that need it are left out.
        device: where networks run.
        offline: fetch nothing from the hub.
        edited: the pictures were made from other pictures, which `rows.measured` will be given.
        recipe: ``names`` and ``weights`` stand in a recipe: errors name its settings.
        moving: they are videos.

    Raises:
        InputError: no measure has this name; it does not apply to these captions or pictures; the weights that the user
            named are of another kind.
        AccessError: what a measure needs that was asked for is not at hand.
    """
    table = known()
    measures, left_out = [], {}
    setting = Setting(weights, captions, side, device, offline, names is not None, edited, recipe, moving)
    for name in table if names is None else dict.fromkeys(names):
        if name not in table:
            raise _unknown(name, table)
        reason = table[name].unfit(setting)
        if reason and setting.asked:
            raise InputError(f"the measure {name} cannot be used: {reason}", "leave it out of the measures")
        try:
            if not reason:
                measures.append(table[name].build(setting))
        except NotAtHand as error:
            if setting.asked:
                raise
            reason = f"{error.message} ({error.hint})" if error.hint else error.message
        if reason:
            left_out[name] = reason
    return measures, left_out


def _needs(needed: Needed) -> str:
    return f"{needed.what}: {needed.option}, usually {needed.usual}"


def _pickscore(setting: Setting) -> Measure:
    return PickScore(clip.pickscore(setting.weights.pickscore, **setting.finding))


def _fid(setting: Setting) -> Measure:
    return inception.fid(setting.weights.inception, setting.device, recipe=setting.recipe)


def _geneval(setting: Setting) -> Measure:
    return GenEval(geneval.detector(setting.weights.detector, **setting.finding), setting.clip)


def _unknown(name: str, table: Iterable[str]) -> InputError:
    hits = difflib.get_close_matches(name, list(table), n=1, cutoff=0.4)
    nearest = f"did you mean {hits[0]}? " if hits else ""
    return InputError(f"there is no measure {name[:80]!r}", f"{nearest}There are {', '.join(table)}")


def _no_quotes(setting: Setting) -> str | None:
    return None if any(map(ocr.quoted, setting.captions)) else "no caption has words in quotes"


def _not_geneval(setting: Setting) -> str | None:
    return None if any(map(geneval_prompts.read, setting.captions)) else "no caption is a prompt of GenEval"


def _not_tiny(setting: Setting) -> str | None:
    for caption in setting.captions:
        try:
            tiny_world.asked(caption)
        except InputError:
            return f"the tiny world has no caption {caption[:80]!r}"
    return None if setting.captions else "there are no captions"


def _not_tiny_edits(setting: Setting) -> str | None:
    for caption in setting.captions:
        try:
            tiny_edits.asked(caption)
        except InputError as error:
            return error.message
    return None if setting.captions else "there are no instructions"


def _no_videos(setting: Setting) -> str | None:
    return None if setting.moving else "it looks at videos, and these are pictures"


def _no_first_frame(setting: Setting) -> str | None:
    return _no_videos(setting) or (None if setting.edited else "the videos were drawn from text alone")


def _not_in_motion(setting: Setting) -> str | None:
    if reason := _no_videos(setting):
        return reason
    for caption in setting.captions:
        if videos.parse(caption) is None:
            return f"the tiny world in motion has no caption {caption[:80]!r}"
    return None if setting.captions else "there are no captions"


def _no_sources(setting: Setting) -> str | None:
    return _not_tiny_edits(setting) or _not_edited(setting)


def _not_edited(setting: Setting) -> str | None:
    if setting.moving:
        return "it looks at edited pictures, and these are videos"
    return None if setting.edited else "the pictures that were edited are not at hand"


def _no_rest(setting: Setting) -> str | None:
    if not any(map(asks_nothing, setting.captions)):
        return f"no instruction is one of {', '.join(map(repr, NOTHING))}"
    return _not_edited(setting)


def _instructed(setting: Setting) -> str | None:
    edits = setting.edited and not setting.moving  # what is asked of a video describes it
    return "an instruction does not say what the picture shows; clip-direction fits" if edits else None


def _no_crops(setting: Setting) -> str | None:
    if reason := _not_tiny(setting):
        return reason
    if setting.side is None:
        return "the size of the pictures is not known"
    return None if setting.side >= SIDE_OF_CROPS else f"it needs pictures of {SIDE_OF_CROPS} px and more"
