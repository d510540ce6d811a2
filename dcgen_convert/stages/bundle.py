"""Stages `bundle` and `verify`: the folder that users load, then its proof."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dcgen_convert.bundle import layout, manifest
from dcgen_convert.bundle.verify import verify
from dcgen_convert.checkpoint.licence import licence_of, licence_of_source
from dcgen_convert.checkpoint.record import source_record
from dcgen_convert.core import names
from dcgen_convert.core.errors import CheckFailed
from dcgen_convert.core.files import copy_file, read_json, write_json
from dcgen_convert.core.journal import MARKER, Stage
from dcgen_convert.networks import autoencoders, models
from dcgen_convert.stages import compare
from dcgen_convert.stages.folders import BEGUN
from dcgen_convert.stages.job import Job
from dcgen_convert.stages.quantize import SINGLE_FILE


def write(job: Job, stage: Stage, output: Path, force: bool) -> None:
    """Writes the bundle to ``output`` and keeps a copy of its manifest in the run."""
    quantised = job.recipe.quantize.format != "none"
    converted = [own.folders.converted for own in job.experts]
    transformer = job.folders.quantize / models.TRANSFORMER if quantised else converted[0]
    lora = None if job.recipe.merge_lora else converted[0].parent / names.LORA
    single_file = (
        job.folders.quantize / SINGLE_FILE if job.recipe.quantize.container == "nunchaku" and quantised else None
    )
    parts = layout.BundleParts(
        family=job.family,
        source=job.source.root,
        transformer=transformer,
        layout=job.recipe.bundle.layout,
        autoencoder=job.target,
        scheduler=job.scheduler,
        lora=lora,
        single_file=single_file,
        scaling_factor=job.recipe.latents.scale_override,
        further=dict(zip(job.family.further, converted[1:], strict=True)),
    )
    own = (stage.folder / BEGUN).exists()  # and a kill came between the bundle and the marker
    layout.check_output(output, force or own)
    write_json(stage.folder / BEGUN, {"output": str(output)})
    layout.write_bundle(output, parts, describe(job), job.console, force=force or own)
    copy_file(output / manifest.FILE, stage.folder / manifest.FILE)


def describe(job: Job) -> dict[str, Any]:
    """The manifest's facts: recipe, sources with hashes, defaults, and what every stage measured."""
    records = [read_json(path) for path in sorted(job.run.path.glob(f"*/{MARKER}"))]
    config = autoencoders.describe(job.target)
    base = job.source.record(job.recipe.source)
    require_unchanged(job.source.known, base)
    return manifest.build(
        recipe=job.recipe.model_dump(mode="json"),
        family=job.family.name,
        sources={
            "base": base,
            "autoencoder": source_record(job.ae.name, job.target, job.ae.revision),
            **manifest.sources_of(job.source.root),
        },
        autoencoder={
            "name": job.ae.name,
            "factor": job.ae.factor,
            "channels": job.ae.channels,
            "scaling_factor": job.recipe.latents.scale_override or config["scaling_factor"],
            **({"frames": job.ae.time.frames, "code": layout.video_code(config).CLASS_NAME} if job.frames else {}),
        },
        defaults={
            **dict(zip(("height", "width"), job.size, strict=True)),
            **({"frames": job.shown_frames, "fps": job.fps} if job.frames else {}),
            "steps": job.recipe.bundle.steps,
            "guidance": job.recipe.bundle.guidance,
            "text_length": job.text_length,
        },
        seed=job.recipe.seed,
        licence={"base": licence_of_source(job.recipe.source, job.source.root), "autoencoder": licence_of(job.target)},
        times={record["stage"]: record["seconds"] for record in records},
        metrics={record["stage"]: record["metrics"] for record in records},
    )


def require_unchanged(known: Mapping[str, str], record: Mapping[str, Any]) -> None:
    """CheckFailed when a file of the source is not what it was when the job began, hours or days ago.

    Args:
        known: name -> SHA-256 of what the stages were made from.
        record: of the source as it is now, for the manifest.
    """
    now = {**record.get("base", {}).get("files", {}), **record["files"]}
    changed = [name for name, digest in now.items() if known.get(name, digest) != digest]
    if changed:
        raise CheckFailed(
            f"{changed[0]} of {record['name']} has changed since this conversion began",
            "put the file back; or resume, and the stages that depend on it run again",
        )


def check(job: Job, stage: Stage, output: Path) -> None:
    """Verify the bundle against its source, in a fresh process too, then compare it with the source on fixed seeds."""
    layout.add_metrics(output, job.family, stage.folder.name, {})  # repairs a run that ended between card and manifest
    result = verify(output, job.console, job.source.root)
    stage.metrics["checks"] = result["checks"]
    if job.recipe.evaluate.prompts:
        pictures = compare.run(job, stage, output)
        layout.add_metrics(output, job.family, stage.folder.name, stage.metrics, pictures)
