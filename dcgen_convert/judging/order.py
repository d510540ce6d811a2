"""What an evaluation draws and measures: settled, and checked, before the first picture is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dcgen_convert.bundle import manifest as manifests
from dcgen_convert.bundle.layout import read_index
from dcgen_convert.bundle.lineage import last_name
from dcgen_convert.bundle.loading import family_of, transformer_config
from dcgen_convert.bundle.sample import check_size
from dcgen_convert.checkpoint.source import Source
from dcgen_convert.core import names
from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_json
from dcgen_convert.data import edit_prompts, prompt_lists, prompts, references, videos
from dcgen_convert.data.buckets import Size
from dcgen_convert.data.edit_prompts import Edit
from dcgen_convert.data.references import References
from dcgen_convert.evaluation import gates, measures, rows
from dcgen_convert.evaluation.gates import Gate
from dcgen_convert.evaluation.measure import Measure, Weights
from dcgen_convert.families import Family
from dcgen_convert.judging import painter
from dcgen_convert.judging.gallery import Gallery
from dcgen_convert.judging.painter import Painter
from dcgen_convert.networks import pipelines
from dcgen_convert.recipe.drawable import own_side
from dcgen_convert.recipe.identity import Identity
from dcgen_convert.recipe.sources import require_source
from dcgen_convert.stages.captions import labels
from dcgen_convert.stages.compare import SEED


@dataclass(frozen=True)
class Asked:
    """What the user asked for; None: the default.

    bundle: folder. output: folder of pictures, log and evaluation.json. against: bundle or source to compare with.
    prompts: as `convert` takes them, or mjhq:FOLDER; of a model that edits, as `edit_prompts.make` takes them. sources:
    folder of pictures to edit. count: prompts. metrics: names of measures. reference: folder of pictures, or
    mjhq:FOLDER. jpeg: whether drawn pictures go through JPEG before they are measured. side: px. seed: of the first
    picture. offline: fetch nothing.
    """

    bundle: Path
    output: Path
    against: str | None = None
    prompts: str | None = None
    count: int = 256
    metrics: tuple[str, ...] | None = None
    weights: Weights = field(default_factory=Weights)
    reference: str | None = None
    jpeg: bool | None = None
    side: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    offline: bool = False
    gates: tuple[Gate, ...] = ()
    sources: str | None = None


@dataclass(frozen=True)
class Trial:
    """What is drawn and measured.

    Attributes:
        manifest: of the bundle. kind: what the prompts are, in words. prompts: one per picture. edits: of a model that
            edits, what each of them is given.
        converted, base: what draws; base None: there is no base.
        round_trip: whether the bundle's autoencoder is another than the base's.
        size: (height, width) in px at which all pictures are measured. references: given pictures.
        measures, left_out: what is measured, and what is not with the reason.
        notes: what the user should know.
    """

    asked: Asked
    manifest: dict[str, Any]
    kind: str
    prompts: list[str]
    edits: list[Edit]
    converted: Painter
    base: Painter | None
    round_trip: bool
    size: Size
    references: References | None
    measures: list[Measure]
    left_out: dict[str, str]
    notes: list[str]

    @property
    def jpeg(self) -> bool:
        return self.references is not None if self.asked.jpeg is None else self.asked.jpeg

    def gallery(self, title: str, by: Painter, offset: int = 0) -> Gallery:
        """The pictures of one set; ``offset`` is added to the seeds."""
        seeds = [(self.asked.seed + offset + i) % 2**63 for i in range(len(self.prompts))]
        return Gallery(self.asked.output / "pictures", title, by.about, self.prompts, seeds, self.edits, by.fps)


def settle(asked: Asked, console: Console) -> Trial:
    """Find everything that the evaluation needs, and refuse what cannot work.

    Raises:
        InputError: a size, a prompt, a measure or a gate that cannot be. AccessError: weights that were asked for are
            not at hand. CheckFailed: the bundle is damaged.
    """
    bundle = asked.bundle
    manifest, index = manifests.read(bundle), read_index(bundle)
    family, wish = family_of(bundle), {"steps": asked.steps, "guidance": asked.guidance}
    home = asked.output / "import"
    mine = painter.of_bundle(bundle, home, console, side=asked.side, **wish)
    _check_size(family, bundle, *mine.size)
    if family.axes == 3:
        _require_videos(asked, bundle)
    given = None if asked.reference is None else references.read(asked.reference)
    edits: list[Edit] = []
    if edit_prompts.asked_of(family.fewest_references, family.references, asked.prompts, asked.sources):
        kind, edits = _edits(asked, manifest, family, mine.side)
        texts = [edit.text for edit in edits]
    else:
        kind, texts, own = _prompts(asked, manifest, family, labels(family, index, bundle))
        given = given or own
    base, why, notes = _base(asked, manifest, mine, family, home, console, bool(edits))
    if base is None:
        notes.append(
            f"{why}: the bundle is judged alone, without comparison, floor and ceiling; --against names a base"
        )
    size = mine.size
    if base and base.side != mine.side:
        size = (min(mine.side, base.side),) * 2
        notes.append(
            f"the base draws at {base.side} px, as it was not trained on {mine.side} px; all pictures are measured at "
            f"{size[0]} px, so finer detail does not count"
        )
    found, left_out = measures.chosen(
        asked.metrics,
        asked.weights,
        texts,
        side=min(size),
        device=pipelines.device(),
        offline=asked.offline,
        edited=bool(edits),
        moving=mine.frames > 0,
    )
    if base is None and given is None:
        found, alone = _alone(found, asked.metrics)
        left_out |= alone
    if not found:
        raise InputError("there is nothing to measure", "name a base with --against, or give --metrics")
    trip = base is not None and manifest["layout"] != "source"
    sets = [rows.CONVERTED, *([rows.BASE, rows.FLOOR] if base else []), *([rows.CEILING] if trip else [])]
    sets += [rows.REFERENCE] if given else []
    gates.require_measured(asked.gates, rows.names(found, sets), left_out)
    return Trial(asked, manifest, kind, texts, edits, mine, base, trip, size, given, found, left_out, notes)


def _require_videos(asked: Asked, bundle: Path) -> None:
    """InputError for what cannot be asked of a bundle that draws videos."""
    if asked.reference is not None:
        raise InputError(f"{bundle} draws videos, and --reference gives pictures", "leave --reference out")
    if str(asked.prompts).startswith(references.MJHQ):
        raise InputError(f"{bundle} draws videos, and {asked.prompts} are prompts of pictures", "give other --prompts")
    videos.require_reader()


def _alone(found: Sequence[Measure], asked: Sequence[str] | None) -> tuple[list[Measure], dict[str, str]]:
    """The measures that need no second set of pictures, and the others with the reason."""
    reason = "it compares two sets of pictures, and there is neither a base nor a reference"
    others = [measure.name for measure in found if measure.kind == "distance"]
    if others and asked is not None:
        raise InputError(f"the measure {others[0]} cannot be used: {reason}", "name a base with --against")
    return [measure for measure in found if measure.kind == "score"], dict.fromkeys(others, reason)


def _check_size(family: Family, folder: Path, height: int, width: int) -> None:
    check_size(family, transformer_config(folder), read_json(folder / "vae" / "config.json"), height, width)


def _base(
    asked: Asked, manifest: dict[str, Any], mine: Painter, family: Family, home: Path, console: Console, edited: bool
) -> tuple[Painter | None, str, list[str]]:
    """(what draws the base's pictures, why there is none, notes). edited: they are edits."""
    wish = {"steps": asked.steps, "guidance": asked.guidance}
    grid = painter.grid_of(asked.bundle, family)
    if asked.against is not None and (Path(asked.against).expanduser() / names.MANIFEST).is_file():
        other = Path(asked.against).expanduser().absolute()
        _same_task(edited, family_of(other), other)
        own = _of_base(own_side(Identity(str(other)), grid, mine.side), mine)
        _check_size(family_of(other), other, own["side"], own["width"] or own["side"])
        return painter.of_bundle(other, home, console, **own, **wish), "", []
    source: Source | None
    notes: list[str] = []
    if asked.against is not None:
        identity = Identity(asked.against, offline=asked.offline)
        require_source(identity)
        place = identity.where
        source = painter.opened(
            asked.against,
            place,
            identity.revision,
            painter.import_folder(home, place),
            offline=asked.offline,
            moving=family.axes == 3,
        )
    else:
        source, place, why = painter.named_base(manifest, home)
        if source is None:
            return None, why, []
        identity, notes = Identity(source.name, offline=True), [f"the base is {source.name}, which the manifest names"]
    _same_task(edited, source.family, source.name)
    if source.family.axes != family.axes:
        raise InputError(
            f"{source.name} is a {source.family.name} model, and the bundle a {family.name}", "name its base"
        )
    own = _of_base(own_side(identity, grid, mine.side), mine)
    height, width = own["side"], own["width"] or own["side"]
    check_size(source.family, source.config, read_json(source.vae / "config.json"), height, width)
    return (
        painter.of_source(source, place, manifest, console, home=painter.import_folder(home, place), **own, **wish),
        "",
        notes,
    )


def _of_base(side: int, mine: Painter) -> dict[str, int]:
    """Side and width of what the base draws: those of the bundle, or squares of another ``side``."""
    return {"side": side, "width": mine.width if side == mine.side else 0}


def _same_task(edited: bool, other: Family, name: object) -> None:
    """InputError for a base that draws from text alone where the bundle edits, or the other way round."""
    if edited and not other.references:
        raise InputError(f"{name} is a {other.name} model, which cannot edit pictures", "name the bundle's base")
    if not edited and other.fewest_references:
        raise InputError(f"{name} is a {other.name} model, which edits pictures", "name the bundle's base")


def _edits(asked: Asked, manifest: dict[str, Any], family: Family, side: int) -> tuple[str, list[Edit]]:
    """(what is edited and how, one edit per picture). side: px."""
    moving = family.axes == 3
    kind, sources = asked.prompts or edit_prompts.usual(manifests.prompts_of(manifest), moving), asked.sources
    folder, seed = asked.output / "edited", asked.seed + SEED
    place: dict[str, Any] = {"folder": folder, "side": side, "offline": asked.offline}
    place |= {"most": family.references, "moving": moving}
    edits = edit_prompts.make(kind, sources, asked.count, seed, **place)
    of = "" if sources is None else f", on the pictures of {last_name(sources)}"
    return last_name(str(kind)) + of, edits


def _prompts(
    asked: Asked, manifest: dict[str, Any], family: Family, classes: list[str] | None
) -> tuple[str, list[str], References | None]:
    """(what the prompts are, one per picture, the pictures that belong to them)."""
    kind = asked.prompts
    if asked.sources is not None:
        raise InputError(f"{asked.bundle} draws from text alone", "leave --sources out")
    drawn = "videos" if family.axes == 3 else "pictures"
    if kind == "tiny-edits":
        raise InputError(f"{asked.bundle} draws {drawn}, and {kind} are instructions to edit", "give other --prompts")
    if kind == "tiny-videos" and family.axes != 3:
        raise InputError(f"{asked.bundle} draws {drawn}, and {kind} are captions of videos", "give other --prompts")
    if kind is not None and kind.startswith(references.MJHQ):
        return f"{kind}, the authors' subset", *references.mjhq_prompts(kind, asked.count)
    if kind is None:
        kind = prompts.usual(manifests.prompts_of(manifest))
    if kind not in prompts.KINDS:
        prompt_lists.require_here(kind)
    texts = prompts.make(kind, asked.count, asked.seed + SEED, classes, asked.offline)
    return "the labels of its classes" if classes and kind in prompts.KINDS else kind, texts, None
