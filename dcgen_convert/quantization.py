"""`dcgen-convert quantize`: SVDQuant of a pipeline that needs no conversion."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dcgen_convert.bundle import manifest
from dcgen_convert.bundle.expected import expected_tensors
from dcgen_convert.bundle.layout import BundleParts, add_metrics, check_output, require_room, write_bundle
from dcgen_convert.bundle.sample import check_size
from dcgen_convert.bundle.verify import verify
from dcgen_convert.checkpoint.headers import read_weights
from dcgen_convert.checkpoint.imported import STAGE, Imported
from dcgen_convert.checkpoint.licence import licence_of_source
from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.checkpoint.source import Source
from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import CheckFailed, InputError
from dcgen_convert.core.files import TEMPORARY, read_json, write_json
from dcgen_convert.core.journal import fingerprint
from dcgen_convert.core.progress import duration
from dcgen_convert.data import edit_prompts, images, prompts
from dcgen_convert.data.edit_prompts import Edit
from dcgen_convert.families import QuantTargets, authors
from dcgen_convert.families.grid import autoencoder_grid
from dcgen_convert.networks import models, pipelines
from dcgen_convert.recipe import loading
from dcgen_convert.recipe.identity import Identity
from dcgen_convert.recipe.schema import Quantize
from dcgen_convert.stages import compare, source_pipeline
from dcgen_convert.stages.captions import class_names
from dcgen_convert.stages.quantize import SINGLE_FILE, measured, settings_of, targets_of
from dcgen_convert.stages.steps import KEEP
from dcgen_convert.svdquant.nunchaku import export_nunchaku
from dcgen_convert.svdquant.quantize import quantize
from dcgen_convert.svdquant.record import CALLS, DONE, CalibrationSet, read_calls, record_calls
from dcgen_convert.svdquant.settings import QuantSettings
from dcgen_convert.svdquant.skeleton import build
from dcgen_convert.svdquant.targets import check_container
from dcgen_convert.tiny import world

BATCH = 4  # pictures drawn at once
COMPARED = 4  # pictures of the source and of the bundle, for the card
PIPELINE_SIDE = 1024  # px of the pictures of a pipeline whose model states no size (Z-Image)
EDITED = "edited"  # in the work folder: pictures of the tiny world that are edited
CALL = "call.json"  # in the work folder: what it belongs to


@dataclass(frozen=True)
class Drawing:
    """How the calibration pictures are drawn.

    None means: as the recipe of a catalogue name says; for other sources the pipeline's own default.
    data_free: draw no picture, quantise from the weights alone. prompts: a file, "builtin" or "tiny-world"; of a model
    that edits, with the folder ``sources`` of pictures to edit, as `edit_prompts.make` takes them.
    """

    data_free: bool = False
    prompts: str | None = None
    resolution: int | None = None  # px
    steps: int | None = None
    guidance: float | None = None
    text_length: int | None = None
    seed: int = 0
    sources: str | None = None

    def filled(self, recipe_name: str | None) -> Drawing:
        """With the settings of the catalogue's recipe where this one has none."""
        if recipe_name is None:
            return self
        settings = loading.load(recipe_name).recipe
        known = {key: getattr(settings.data, key) for key in ("prompts", "resolution", "steps", "guidance")}
        known["text_length"] = settings.latents.text_length
        return replace(self, **{key: value for key, value in known.items() if getattr(self, key) is None})


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    name: catalogue name, folder, file or hub id. section: recipe section ``quantize``; format, rank, container, dense,
    fuse_qkv and calibration.prompts count. base, loras: as `load_source` takes them.
    """

    name: str
    output: Path
    section: Quantize
    drawing: Drawing
    base: str | None = None
    loras: Sequence[str] = ()

    @property
    def work_folder(self) -> Path:
        """The hidden folder beside the output where the work is done."""
        return self.output.parent / f".{self.output.name}.work"


def quantize_source(request: Request, console: Console) -> dict[str, Any]:
    """The output becomes a bundle: the pipeline with a 4-bit transformer, verified.

    An interrupted call leaves its work folder beside the output, and the same call goes on from it.

    Returns:
        bundle, metrics, checks, layers.
    """
    began = time.monotonic()
    check_output(request.output, force=False)
    if (alone := transformer_alone(request)) is not None:
        return quantize_alone(request, alone, console)
    quantisation = SourceQuantisation.of(request, console)
    quantisation.clear()
    try:
        quantisation.prepare()
    except InputError:
        shutil.rmtree(request.work_folder, ignore_errors=True)
        raise
    quantisation.record()
    figures = quantisation.quantise()
    quantisation.write_bundle(figures, time.monotonic() - began)
    try:
        checks = verify(request.output, console, quantisation.source.root)["checks"]
        figures |= quantisation.compare()
    finally:  # the bundle is whole, whatever is found
        shutil.rmtree(request.work_folder)
    layers = figures.pop("layers")
    return {"bundle": str(request.output), "metrics": figures, "checks": checks, "layers": layers}


def transformer_alone(request: Request) -> Path | None:
    """The folder of a transformer without a pipeline that is quantised from its weights alone; else None.

    Nothing draws then, so neither text encoders nor an autoencoder are needed.
    """
    path = Path(request.name).expanduser()
    if not request.drawing.data_free or request.base or request.loras or (path / "model_index.json").exists():
        return None
    return path if path.is_dir() and (path / "config.json").is_file() else None


def quantize_alone(request: Request, folder: Path, console: Console) -> dict[str, Any]:
    """`quantize_source` of a transformer's own ``folder``: the output gets a folder ``transformer``, nothing else."""
    identity = Identity(request.name)
    check_asked(request, identity)
    config, family = identity.config, identity.family
    if "quantization_config" in config:
        raise InputError(f"{folder} is already quantised", "give the dense model")
    targets = targets_of(family, config, request.section)
    settings = replace(settings_of(request.section, request.drawing.seed), calibration="none")
    work = request.work_folder
    shutil.rmtree(work, ignore_errors=True)
    try:
        quantize(folder, work / models.TRANSFORMER, targets, settings, [], console)
        figures = measured(work / models.TRANSFORMER, targets, settings)
        if problems := folder_problems(work / models.TRANSFORMER):
            raise CheckFailed(
                f"the 4-bit transformer of {folder} is wrong: {problems[0]}", "this is a fault: report it"
            )
        request.output.parent.mkdir(parents=True, exist_ok=True)
        if request.output.exists():
            request.output.rmdir()  # it is empty: `check_output`
        work.rename(request.output)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    console.say(
        f"quantize: {request.output} holds the transformer alone: give it to a pipeline of {family.name} models"
    )
    layers = figures.pop("layers")
    return {"bundle": str(request.output), "metrics": figures, "checks": ["tensors"], "layers": layers}


def folder_problems(transformer: Path) -> list[str]:
    """What of a 4-bit transformer's tensors is not as its config says."""
    expected, problems = expected_tensors(transformer)
    found = read_weights(transformer)
    names = sorted(expected.keys() ^ found.keys())
    return problems + [f"{name} is missing or has no place in it" for name in names]


@dataclass(frozen=True)
class SourceQuantisation:
    """The quantisation of one source, step by step: `prepare`, `record`, `quantise`, `write_bundle`."""

    request: Request
    console: Console
    source: Source
    targets: QuantTargets

    @classmethod
    def of(cls, request: Request, console: Console) -> SourceQuantisation:
        """Find the source, and check what can be checked before anything is written."""
        identity = Identity(request.name, request.base)
        check_asked(request, identity)
        drawing = request.drawing.filled(identity.entry.recipe if identity.entry else None)
        request = replace(request, drawing=drawing)
        source = load_source(
            request.name,
            identity.where,
            revision=identity.revision,
            base=request.base,
            loras=request.loras,
            home=request.work_folder / STAGE,
        )
        if request.drawing.sources is not None and not source.family.references:
            raise InputError(f"{request.name} draws from text alone", "leave --sources out")
        check_container(request.section.container, request.section.format, source.family)
        folders = list(source.parts.values())
        require_room(request.output, [path for path in folders if path.is_dir()], source.files)
        targets = targets_of(source.family, source.config, request.section)
        return cls(request, console, source, targets)

    @cached_property
    def vae(self) -> dict[str, Any]:
        """Config of the autoencoder."""
        return read_json(self.source.vae / "config.json")

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """How the bundle is drawn, and its calibration: height, width [px], steps, guidance, text_length."""
        family, drawing = self.source.family, self.request.drawing
        known = {"steps": family.default_steps, "guidance": family.default_guidance, "text_length": family.text_length}
        known |= self.made.get("defaults", {})
        side = drawing.resolution or known.get("height") or default_side(self.source)
        return {
            "height": side,
            "width": side,
            "steps": drawing.steps or known["steps"],
            "guidance": known["guidance"] if drawing.guidance is None else drawing.guidance,
            "text_length": drawing.text_length or known["text_length"],
        }

    @cached_property
    def made(self) -> dict[str, Any]:
        """The manifest of a source that is a bundle of this program; empty for others."""
        return manifest.read(self.source.root) if (self.source.root / manifest.FILE).is_file() else {}

    @property
    def settings(self) -> QuantSettings:
        settings = settings_of(self.request.section, self.request.drawing.seed)
        return replace(settings, calibration="none") if self.request.drawing.data_free else settings

    @property
    def asked(self) -> dict[str, Any]:
        """The recipe section and the drawing, as plain data."""
        drawing = asdict(self.request.drawing)
        if drawing["sources"] is None:
            del drawing["sources"]
        return {"quantize": self.request.section.model_dump(mode="json"), "drawing": drawing}

    @cached_property
    def call(self) -> dict[str, Any]:
        """What the work folder belongs to. Kept: the pictures that are edited are read for it."""
        found = {"source": self.source.fingerprint, **self.asked}
        if not self.edited or self.request.drawing.data_free:
            return found
        with TemporaryDirectory() as folder:
            asked = self.request.section.calibration.prompts, self.request.drawing.seed
            edits = self.edits(*asked, Path(folder), side=world.SIDE)  # of pictures that are drawn any size will do
        return {**found, "edits": fingerprint([[edit.text, edit.digest] for edit in edits])}

    @property
    def edited(self) -> bool:
        """Whether the calibration draws edits."""
        family, drawing = self.source.family, self.request.drawing
        numbers = family.fewest_references, family.references
        return edit_prompts.asked_of(*numbers, drawing.prompts, drawing.sources)

    def prompts(self, count: int, seed: int) -> list[str]:
        """``count`` prompts of a model that draws from text alone."""
        return prompts.make(self.kind, count, seed, class_names(self.source))

    @property
    def kind(self) -> str:
        """What its prompts are: of a bundle those of its training, if they can be made here."""
        return self.request.drawing.prompts or prompts.usual(manifest.prompts_of(self.made) if self.made else None)

    def edits(self, count: int, seed: int, folder: Path, side: int) -> list[Edit]:
        """``count`` edits of a model that edits; empty for others.

        Args:
            folder: where pictures of the tiny world are drawn, at ``side`` px.

        Raises:
            InputError: nothing says what is edited and how, or a picture cannot be read.
        """
        most, drawing = self.source.family.references, self.request.drawing
        if not self.edited:
            return []
        kind = drawing.prompts or (edit_prompts.usual(manifest.prompts_of(self.made)) if self.made else None)
        return edit_prompts.make(kind, drawing.sources, count, seed, most=most, folder=folder, side=side)

    def clear(self) -> None:
        """Delete a work folder that another source or other settings left, and say so.

        Raises:
            InputError: it holds more than ten minutes of work.
        """
        folder = self.request.work_folder
        if not folder.exists() or ((folder / CALL).is_file() and read_json(folder / CALL) == self.call):
            return
        times = [path.stat().st_mtime for path in folder.rglob("*") if path.is_file()]
        spent = max(times, default=0.0) - min(times, default=0.0)
        if spent > KEEP:
            raise InputError(
                f"{folder} holds {duration(spent)} of work of another call, which was cut off",
                f"give the settings of its {CALL} to finish it, or delete the folder",
            )
        self.console.warn(f"{folder}: the unfinished work of another call is deleted, {duration(spent)}")
        shutil.rmtree(folder)

    def prepare(self) -> None:
        """Make the work folder, lay out a source that is no pipeline folder, and check the size of the pictures."""
        folder, source = self.request.work_folder, self.source
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CALL, self.call)
        if isinstance(source, Imported) and not (source.root / "model_index.json").exists():  # written last
            source.lay_out(self.console)
        check_size(source.family, source.config, self.vae, self.defaults["height"], self.defaults["width"])

    def record(self) -> None:
        """Draw the calibration pictures and keep the calls of the transformer, unless they are there or not wanted."""
        folder, source, drawing = self.request.work_folder / CALLS, self.source, self.request.drawing
        if drawing.data_free:
            return
        count = self.request.section.calibration.prompts
        edits = self.edits(count, drawing.seed, self.request.work_folder / EDITED, self.defaults["height"])
        pictures = CalibrationSet(
            texts=[edit.text for edit in edits] or self.prompts(count, drawing.seed),
            references=[edit.files for edit in edits],
            seed=drawing.seed,
            batch=BATCH,
            side=self.defaults["height"],
            steps=self.defaults["steps"],
            guidance=self.defaults["guidance"],
            length=self.defaults["text_length"],
        )
        batches = pictures.missing(folder)
        if not batches and (folder / DONE).exists():
            return
        what = f"{count} pictures of {pictures.side} px, {pictures.steps} steps, guidance {pictures.guidance}"
        self.console.say(f"calibration: {what}")
        if not edits and (note := prompts.told(self.kind, count)):
            self.console.say(f"calibration: {note}")

        with self.console.progress("calibration", count, "prompts") as bar:
            bar.advance(count - sum(last - first for first, last in batches))
            record_calls(folder, source.family, self.pipeline, pictures, bar, batches, self.console.warn)
        write_json(folder / DONE, {"calls": len(read_calls(folder))})

    def pipeline(self) -> Any:
        """The source in 16 bits."""
        model = models.load(self.source.transformer, torch.bfloat16, device=pipelines.device())
        return source_pipeline.load(self.source, torch.bfloat16, transformer=model)

    def compare(self) -> dict[str, Any]:
        """Draw a few pictures with the source and with the bundle, put them into the card, and say how far apart they
        are. Without calibration nothing is drawn: then an empty dict.
        """
        drawing, defaults, bundle = self.request.drawing, self.defaults, self.request.output
        if drawing.data_free:
            return {}
        first = drawing.seed + compare.SEED
        edits = self.edits(COMPARED, first, self.request.work_folder / EDITED, defaults["height"])
        texts = [edit.text for edit in edits] or self.prompts(COMPARED, first)
        given = [edit.files for edit in edits]
        seeds = [first + i for i in range(COMPARED)]
        size = defaults["height"], defaults["width"]
        sizes = {"size": size, "length": defaults["text_length"], "batch": BATCH}
        steps, guidance = defaults["steps"], defaults["guidance"]
        runtime, form = compare.runtime_of(bundle, torch.bfloat16), self.request.section.format
        with TemporaryDirectory(prefix=TEMPORARY, dir=self.request.work_folder) as work:
            where: dict[str, Any] = {"console": self.console, "work": Path(work), "references": given}
            sheet = compare.Comparison(self.source.family, texts, seeds, **sizes, **where)
            references = (images.read_pixels(files[0], *size)[None] for files in given)
            drawn = {"reference": sheet.shown("reference", references)} if edits else {}
            drawn["converted"] = sheet.draw("converted", self.pipeline, steps, guidance)
            quantised = partial(compare.of_bundle, bundle, torch.bfloat16, runtime)
            drawn[form] = sheet.draw(form, quantised, steps, guidance)
            apart = compare.distance(drawn[form], drawn["converted"])
            pictures = compare.written(drawn, texts, self.request.work_folder / "grid.png")
        found = {"psnr_quantised_db": round(apart, 2), "runtime": runtime}
        add_metrics(bundle, self.source.family, "verify", found, pictures)
        self.console.say(f"quantize: {found['psnr_quantised_db']} dB from the 16-bit pictures, on {COMPARED} prompts")
        return found

    @property
    def transformer(self) -> Path:
        """The 4-bit transformer in the work folder."""
        return self.request.work_folder / models.TRANSFORMER

    @property
    def single_file(self) -> Path | None:
        """The classic container in the work folder, where it is asked for."""
        return self.request.work_folder / SINGLE_FILE if self.request.section.container == "nunchaku" else None

    def quantise(self) -> dict[str, Any]:
        """Quantise the transformer, and write the classic container where it is asked for: what was measured."""
        source, transformer = self.source, self.transformer
        if not transformer.exists():  # it is whole, or it is not there
            calls = read_calls(self.request.work_folder / CALLS)
            quantize(source.transformer, transformer, self.targets, self.settings, calls, self.console)
        if self.single_file is not None:
            export_nunchaku(transformer, self.single_file, source.family.patch(source.config, self.grid[1]))
        return measured(transformer, self.targets, self.settings)

    @property
    def grid(self) -> tuple[int, int]:
        """(factor, channels) of the latent grid that the transformer works on."""
        return autoencoder_grid(self.vae)

    def write_bundle(self, figures: dict[str, Any], seconds: float) -> None:
        """Write the bundle with its manifest and card. ``seconds``: what the work took."""
        request, source = self.request, self.source
        factor, channels = self.grid
        facts = manifest.build(
            recipe={"source": request.name, **self.asked},
            family=source.family.name,
            sources={"base": source.record(request.name), **manifest.sources_of(source.root)},
            autoencoder=self.made.get("autoencoder")
            or {
                "name": self.vae["_class_name"],
                "factor": factor,
                "channels": channels,
                "scaling_factor": self.vae.get("scaling_factor"),
            },
            defaults=self.defaults,
            seed=request.drawing.seed,
            licence={"base": licence_of_source(request.name, source.root)},
            times={"quantize": seconds},
            metrics={"quantize": figures},
        )
        if self.made:
            facts["conversion"] = self.made.get("conversion") or {key: self.made[key] for key in ("layout", "recipe")}
            facts |= {key: self.made[key] for key in ("adopted",) if key in self.made}
        parts = BundleParts(source.family, source.root, self.transformer, layout="source", single_file=self.single_file)
        write_bundle(request.output, parts, facts, self.console)


def check_asked(request: Request, identity: Identity) -> None:
    """InputError for what cannot work, whatever the source holds: before anything is fetched or written."""
    if request.drawing.data_free and request.section.container == "nunchaku":
        raise InputError(
            "the nunchaku container needs calibration: it stores q, k and v as one layer with one smoothing, which the "
            "weights alone do not give",
            "give --calibration N, or use the diffusers container",
        )
    if request.drawing.data_free:
        replace(settings_of(request.section, request.drawing.seed), calibration="none")
    authors.refuse(identity.index, request.name)


def default_side(source: Source) -> int:
    """Side in px of the pictures that the stock pipeline draws when it is not told."""
    vae = read_json(source.vae / "config.json")
    factor = autoencoder_grid(vae)[0]
    only = source.family.only_side(source.config, factor)
    if only:
        return only
    parts = {part: None for part in source.parts if part != "scheduler"}
    without_weights = {models.TRANSFORMER: build(source.config), "vae": build(vae)}
    with pipelines.quiet_diffusers():
        stock = pipelines.stock_pipeline(source.family, source.index)
        pipeline = stock.from_pretrained(source.root, trust_remote_code=False, **(parts | without_weights))
    cells = getattr(pipeline, "default_sample_size", None) or source.config.get("sample_size")
    return int(cells * getattr(pipeline, "vae_scale_factor", factor)) if cells else PIPELINE_SIDE
