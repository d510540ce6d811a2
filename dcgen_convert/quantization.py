"""`dcgen-convert quantize`: SVDQuant of a pipeline that needs no conversion."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dcgen_convert.bundle import manifest
from dcgen_convert.bundle.card import render
from dcgen_convert.bundle.layout import check_output, require_room, write_bundle
from dcgen_convert.bundle.sample import check_size
from dcgen_convert.bundle.verify import verify
from dcgen_convert.checkpoint.imported import STAGE
from dcgen_convert.checkpoint.licence import licence_of_source
from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.checkpoint.source import Source
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_json, write_json
from dcgen_convert.data import prompts
from dcgen_convert.families.grid import autoencoder_grid
from dcgen_convert.networks import models, pipelines
from dcgen_convert.networks.pipelines import quiet_diffusers, stock_pipeline
from dcgen_convert.recipe import loading
from dcgen_convert.recipe.identity import Identity
from dcgen_convert.recipe.schema import Quantize
from dcgen_convert.stages import pictures
from dcgen_convert.stages import quantize as stage
from dcgen_convert.svdquant import record
from dcgen_convert.svdquant.nunchaku import export_nunchaku
from dcgen_convert.svdquant.quantize import quantize
from dcgen_convert.svdquant.skeleton import build
from dcgen_convert.svdquant.targets import check_container, plan_targets

BATCH = 4  # pictures drawn at once
PIPELINE_SIDE = 1024  # px that pipelines draw whose model states no size (Z-Image)


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
        settings = loading.load(recipe_name).recipe
        known = {key: getattr(settings.data, key) for key in ("prompts", "resolution", "steps", "guidance")}
        known["text_length"] = settings.latents.text_length
        return replace(self, **{key: value for key, value in known.items() if getattr(self, key) is None})


def quantize_source(
    name: str,
    output: Path,
    section: Quantize,
    drawing: Drawing,
    console,
    base: str | None = None,
    loras: Sequence[str] = (),
) -> dict[str, Any]:
    """``output`` becomes a bundle: the pipeline with a 4-bit transformer, verified. Result: bundle, metrics, checks,
    layers.

    Args:
        name: catalogue name, folder, file or hub id.
        base, loras: as `load_source` takes them.
        section: recipe section ``quantize`` (format, rank, calibration.prompts, container, dense).

    An interrupted call leaves a hidden work folder beside the output; the same call goes on from it.
    """
    began = time.monotonic()
    check_output(output, force=False)
    identity = Identity(name, base)
    drawing = drawing.filled(identity.entry.recipe if identity.entry else None)
    home = work_folder(output) / STAGE
    source = load_source(name, identity.where, revision=identity.revision, base=base, loras=loras, home=home)
    check_container(section, source.family)
    folders = list(source.parts.values())
    require_room(output, [path for path in folders if path.is_dir()], source.files)
    targets = plan_targets(source.family, source.config, section.dense)
    work = _work(output, source, section, drawing)
    try:
        if source.imported and not (home / "model_index.json").exists():  # written last
            source.lay_out(console)
        defaults = defaults_of(source, drawing)
        vae = read_json(source.vae / "config.json")
        check_size(source.family, source.config, vae, defaults["height"], defaults["width"])
    except InputError:
        shutil.rmtree(work)
        raise
    calls = work / record.CALLS
    if not drawing.data_free:
        _record(calls, source, section.calibration.prompts, drawing, defaults, console)
    settings = stage.settings_of(section, drawing.seed)
    if drawing.data_free:
        settings = replace(settings, calibration="none")
    transformer, single_file = work / models.TRANSFORMER, None
    if not transformer.exists():  # whole or absent
        quantize(source.transformer, transformer, targets, settings, record.read_calls(calls), console)
    if section.container == "nunchaku":
        single_file = work / stage.SINGLE_FILE
        export_nunchaku(transformer, single_file, source.family.patch(source.config, autoencoder_grid(vae)[1]))
    measured = stage.measured(transformer, targets, settings)
    facts = manifest.build(
        recipe={"source": name, "quantize": section.model_dump(mode="json"), "drawing": asdict(drawing)},
        family=source.family.name,
        sources={"base": source.record(name)},
        autoencoder=_autoencoder(vae),
        defaults=defaults,
        seed=drawing.seed,
        licence={"base": licence_of_source(name, source.root)},
        times={"quantize": time.monotonic() - began},
        metrics={"quantize": measured},
    )
    layout = dict(layout="source", family=source.family)
    card = render(facts, title=output.name, **layout)
    parts = dict(source=source.root, transformer=transformer, single_file=single_file)
    write_bundle(output, manifest=facts, card=card, console=console, **parts, **layout)
    try:
        checks = verify(output, console, source.root)["checks"]
    finally:  # the bundle is whole, whatever is found
        shutil.rmtree(work)
    layers = measured.pop("layers")
    return {"bundle": str(output), "metrics": measured, "checks": checks, "layers": layers}


def work_folder(output: Path) -> Path:
    """Where the work on ``output`` is done."""
    return output.parent / f".{output.name}.work"


def _work(output: Path, source: Source, section: Quantize, drawing: Drawing) -> Path:
    """The work folder of this very call; one that another source or other settings left is replaced."""
    folder = work_folder(output)
    call = {"source": source.fingerprint, "quantize": section.model_dump(mode="json"), "drawing": asdict(drawing)}
    if folder.exists() and not ((folder / "call.json").is_file() and read_json(folder / "call.json") == call):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "call.json", call)
    return folder


def defaults_of(source: Source, drawing: Drawing) -> dict[str, Any]:
    """How the bundle is drawn, and its calibration: height, width [px], steps, guidance, text_length."""
    family, side = source.family, drawing.resolution or default_side(source)
    return {
        "height": side,
        "width": side,
        "steps": drawing.steps or family.default_steps,
        "guidance": family.default_guidance if drawing.guidance is None else drawing.guidance,
        "text_length": drawing.text_length or family.text_length,
    }


def _record(folder: Path, source: Source, count: int, drawing: Drawing, defaults: dict[str, Any], console) -> None:
    if (folder / record.DONE).exists():
        return
    texts = prompts.make(drawing.prompts or "builtin", count, drawing.seed, pictures.class_names(source))
    call = dict(
        side=defaults["height"], steps=defaults["steps"], guidance=defaults["guidance"], length=defaults["text_length"]
    )
    console.say(
        f"calibration: {count} pictures of {call['side']} px, {call['steps']} steps, guidance {call['guidance']}"
    )

    def pipeline() -> Any:
        model = models.load(source.transformer, torch.bfloat16, device=pipelines.device())
        return pipelines.load_pipeline(source, torch.bfloat16, transformer=model)

    with console.progress("calibration", count, "prompts") as bar:
        record.record_calls(folder, source.family, pipeline, texts, drawing.seed, BATCH, bar, **call)
    write_json(folder / record.DONE, {"calls": len(record.read_calls(folder))})


def _autoencoder(vae: dict[str, Any]) -> dict[str, Any]:
    factor, channels = autoencoder_grid(vae)
    return {
        "name": vae["_class_name"],
        "factor": factor,
        "channels": channels,
        "scaling_factor": vae.get("scaling_factor"),
    }


def default_side(source: Source) -> int:
    """Picture side in px that the stock pipeline draws when it is not told."""
    vae = read_json(source.vae / "config.json")
    factor = autoencoder_grid(vae)[0]
    only = source.family.only_side(source.config, factor)
    if only:
        return only
    parts = {part: None for part in source.parts if part != "scheduler"}
    parts |= {models.TRANSFORMER: build(source.config), "vae": build(vae)}  # without their weights
    with quiet_diffusers():
        pipeline = stock_pipeline(source).from_pretrained(source.root, trust_remote_code=False, **parts)
    cells = getattr(pipeline, "default_sample_size", None) or source.config.get("sample_size")
    return int(cells * getattr(pipeline, "vae_scale_factor", factor)) if cells else PIPELINE_SIDE
