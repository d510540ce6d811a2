"""`dcgen-convert quantize`: SVDQuant of a pipeline that needs no conversion."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dcgen_convert import catalog, models, pipelines, recipe
from dcgen_convert.bundle.components import copy_component, copy_file
from dcgen_convert.bundle.layout import check_disk, check_output
from dcgen_convert.checkpoint.imported import STAGE
from dcgen_convert.checkpoint.source import Source, load_source
from dcgen_convert.data import make, prompts
from dcgen_convert.errors import InputError
from dcgen_convert.files import read_json, write_json
from dcgen_convert.schema import Quantize
from dcgen_convert.svdquant import stage
from dcgen_convert.svdquant.nunchaku import export_nunchaku
from dcgen_convert.svdquant.quantize import quantize

BATCH = 4  # pictures drawn at once


@dataclass(frozen=True)
class Drawing:
    """How the calibration pictures are drawn.

    None takes what the recipe of a catalogue name draws with, for other sources the pipeline's own default.
    data_free: draw none, quantise from the weights alone. prompts: a file, "builtin" or "tiny-world".
    """

    data_free: bool = False
    prompts: str | None = None
    resolution: int | None = None  # px
    steps: int | None = None
    guidance: float | None = None
    text_length: int | None = None
    seed: int = 0

    def filled(self, recipe_name: str | None) -> Drawing:
        """With the settings of the catalogue's recipe where this one has none."""
        if recipe_name is None:
            return self
        settings = recipe.load(recipe_name).recipe
        known = {key: getattr(settings.data, key) for key in ("prompts", "resolution", "steps", "guidance")}
        known["text_length"] = settings.latents.text_length
        return replace(self, **{key: value for key, value in known.items() if getattr(self, key) is None})


def quantize_source(
    name: str, output: Path, section: Quantize, drawing: Drawing, console, base: str | None = None, loras: Sequence[str] = ()
) -> dict[str, Any]:
    """``output`` becomes a copy of the pipeline with a 4-bit transformer. Result: bundle, metrics, layers.

    Args:
        name: catalogue name, folder, file or hub id.
        base, loras: as `load_source` takes them.
        section: recipe section ``quantize`` (format, rank, calibration.prompts, container, dense).

    An interrupted call leaves ``.NAME.partial`` beside the output; the same call goes on from it.
    """
    check_output(output, force=False)
    entry = catalog.find_source(name)
    drawing = drawing.filled(entry and entry.recipe)
    where, revision = (str(entry.folder or entry.repo), entry.revision) if entry else (name, None)
    home = partial_folder(output) / STAGE
    source = load_source(name, where, revision=revision, base=base, loras=loras, home=home)
    stage.check_container(section, source.family)
    folders = list(source.parts.values())
    check_disk(output, [path for path in folders if path.is_dir()], source.files)
    targets = stage.plan_targets(source.family, source.config, section.dense)
    staging = _staging(output, source, section, drawing)
    try:
        if source.imported and not (home / "model_index.json").exists():  # written last
            source.lay_out(console)
    except InputError:
        shutil.rmtree(staging)
        raise
    calls = staging / stage.CALLS
    if not drawing.data_free:
        _record(calls, source, section.calibration.prompts, drawing, console)
    settings = stage.settings_of(section, drawing.seed)
    if drawing.data_free:
        settings = replace(settings, calibration="none")
    folder = staging / "bundle"
    transformer = folder / models.TRANSFORMER
    if not (transformer / "config.json").exists():
        folder.mkdir(exist_ok=True)
        records = quantize(source.transformer, transformer, targets, settings, stage.read_calls(calls), console)
        write_json(staging / "layers.json", records)
    _copy_rest(source, folder, console)
    if section.container == "nunchaku":
        patch = source.family.patch(source.config, latent_channels(source))
        export_nunchaku(transformer, folder / stage.SINGLE_FILE, patch)
    os.replace(folder, output)  # an empty folder in its place is allowed, and replaced
    layers = read_json(staging / "layers.json")
    shutil.rmtree(staging)
    metrics = {"format": settings.precision, "svdq": len(targets.svdq), "awq": len(targets.awq)}
    return {"bundle": str(output), "metrics": {**metrics, "skipped": targets.skipped}, "layers": layers}


def partial_folder(output: Path) -> Path:
    """Where the work on ``output`` is done."""
    return output.parent / f".{output.name}.partial"


def _staging(output: Path, source: Source, section: Quantize, drawing: Drawing) -> Path:
    """The work folder of this very call; one that another source or other settings left is replaced."""
    folder = partial_folder(output)
    call = {"source": source.fingerprint, "quantize": section.model_dump(mode="json"), "drawing": asdict(drawing)}
    if folder.exists() and not ((folder / "call.json").is_file() and read_json(folder / "call.json") == call):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "call.json", call)
    return folder


def _record(folder: Path, source: Source, count: int, drawing: Drawing, console) -> None:
    if (folder / stage.DONE).exists():
        return
    family = source.family
    model = models.load(source.transformer, torch.bfloat16, device=pipelines.device())
    pipeline = pipelines.load_pipeline(source, torch.bfloat16, transformer=model)
    texts = prompts.make(drawing.prompts or "builtin", count, drawing.seed, make.class_names(source))
    call = dict(
        side=drawing.resolution or default_side(pipeline),
        steps=drawing.steps or family.default_steps,
        guidance=family.default_guidance if drawing.guidance is None else drawing.guidance,
        length=drawing.text_length or family.text_length,
    )
    console.say(
        f"calibration: {count} pictures of {call['side']} px, {call['steps']} steps, guidance {call['guidance']}"
    )

    with console.progress("calibration", count, "prompts") as bar:
        stage.record_calls(folder, family, lambda: pipeline, texts, drawing.seed, BATCH, bar, **call)
    write_json(folder / stage.DONE, {"calls": len(stage.read_calls(folder))})


def _copy_rest(source: Source, folder: Path, console) -> None:
    """Everything but the transformer, as it is."""
    for part in source.parts:
        if part != models.TRANSFORMER:
            shutil.rmtree(folder / part, ignore_errors=True)  # of a call that was cut off
            copy_component(source.root / part, folder / part, console, label=part)
    for path in source.root.iterdir():
        if path.is_file() and path.suffix in (".json", ".md", ".txt", ""):
            copy_file(path, folder / path.name)


def latent_channels(source: Source) -> int:
    """Latent channels of the pipeline's autoencoder."""
    return int(read_json(source.root / "vae" / "config.json")["latent_channels"])


def default_side(pipeline: Any) -> int:
    """Picture side in px that the pipeline draws when it is not told."""
    size = getattr(pipeline, "default_sample_size", None) or pipeline.transformer.config.sample_size
    factor = getattr(pipeline, "vae_scale_factor", None) or 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    return int(size * factor)
