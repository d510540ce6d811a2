"""`adopt`: a folder that the DC-Gen authors published becomes a bundle, without training.

The weights keep their bytes. What their own code passes when it draws (size, timestep shift) goes into the bundle's
scheduler and manifest, and the in-bundle adapter lets the stock pipeline draw with it.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcgen_convert.bundle import manifest as manifests
from dcgen_convert.bundle.authors_folder import AuthorsFolder, Wish, stage, understand
from dcgen_convert.bundle.layout import BundleParts, check_output, require_room, write_bundle
from dcgen_convert.bundle.scheduler import UNBENT, scheduler_config
from dcgen_convert.bundle.verify import verify
from dcgen_convert.checkpoint.licence import licence_of, licence_of_source
from dcgen_convert.checkpoint.record import source_record
from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import InputError
from dcgen_convert.families import authors
from dcgen_convert.networks import parts as components


@dataclass(frozen=True)
class HowDrawn:
    """How the model is drawn with: side of its pictures in px, timestep shift (rule or number), steps, guidance, text
    tokens. origin: where side and shift come from, in words.
    """

    side: int
    shift: str
    steps: int
    guidance: float
    length: int
    origin: str

    @classmethod
    def of(cls, folder: AuthorsFolder, wish: Wish) -> HowDrawn:
        """From the wish, else from the manifest, else from the authors' code; InputError when none of them says it."""
        factor, channels = folder.grid
        release, made = authors.release_of(factor, channels), folder.made.get("defaults", {})
        theirs = (None, None) if release is None else (release.side, release.shift)
        side: int | None = wish.resolution or made.get("height") or theirs[0]
        shift = wish.shift or ("model" if made else theirs[1])
        if side is None or shift is None:
            raise InputError(
                f"no published model works on f{factor} with {channels} channels, and {folder.place.name} tells "
                "neither the size of its pictures nor its timestep shift",
                "give both: --resolution PX --shift flux2, flux, model or a number",
            )
        if side % factor:
            raise InputError(f"{side} px is not a multiple of the autoencoder's f = {factor} px", "--resolution PX")
        asked = [name for name, value in (("size", wish.resolution), ("shift", wish.shift)) if value is not None]
        known = "its manifest" if made else f"the authors' code for {release.name}" if release else ""
        origins = [f"the command ({' and '.join(asked)})"] if asked else []
        return cls(
            side,
            shift,
            made.get("steps", authors.STEPS),
            made.get("guidance", authors.GUIDANCE),
            made.get("text_length", authors.TEXT_LENGTH),
            " and ".join(origins + ([known] if len(asked) < 2 else [])),
        )


def adopt(wish: Wish, output: Path, console: Console) -> dict[str, Any]:
    """The output becomes a verified bundle of the authors' folder.

    Returns:
        bundle, adopted (what is known of it), checks.

    Raises:
        InputError: the output is taken, or what `understand` raises.
        CheckFailed: the bundle that was written fails its checks.
    """
    check_output(output, force=False)
    folder = understand(wish)
    facts = write(folder, wish, output, console)
    checks = verify(output, console, folder.place.root)["checks"]
    return {"bundle": str(output), "adopted": facts, "checks": checks}


def write(folder: AuthorsFolder, wish: Wish, output: Path, console: Console) -> dict[str, Any]:
    """Write the bundle; returns what is known of the model."""
    began = time.monotonic()
    drawing = HowDrawn.of(folder, wish)
    scheduler = _scheduler(folder, drawing)
    for note in folder.notes:
        console.warn(f"adopt: not taken over: {note}")
    require_room(output, [path for path, _ in folder.parts.values()])
    staging = output.parent / f".{output.name}.adopt"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        stage(folder, staging)
        components.check(staging, {part: value for part, (_, value) in folder.parts.items()})
        facts = _facts(folder, drawing, scheduler)
        console.say(f"adopt: {_told(folder, facts)}")
        pieces = BundleParts(
            family=folder.family,
            source=staging,
            transformer=staging / folder.family.component,
            autoencoder=staging / "vae",
            scheduler=scheduler,
        )
        write_bundle(output, pieces, _manifest(folder, wish, drawing, facts, time.monotonic() - began), console)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return facts


def _scheduler(folder: AuthorsFolder, drawing: HowDrawn) -> dict[str, Any]:
    """The scheduler config that gives the stock pipeline the noise levels of the authors' code."""
    factor, channels = folder.grid
    tokens = ((drawing.side // factor) ** 2,)
    config = scheduler_config(folder.config("scheduler"), drawing.shift, channels=channels, tokens=tokens)
    return {**config, **(UNBENT if drawing.shift == "flux2" else {})}


def _facts(folder: AuthorsFolder, drawing: HowDrawn, scheduler: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says of the adoption. r: the shift at the bundle's size."""
    factor, channels = folder.grid
    tokens = (drawing.side // factor) ** 2
    return {
        "pipeline": folder.pipeline,
        "factor": factor,
        "channels": channels,
        "scaling_factor": folder.config("vae")["scaling_factor"],
        "side": drawing.side,
        "shift": drawing.shift,
        "r": folder.family.shift(tokens, scheduler),
        "origin": drawing.origin,
        "left_out": folder.notes,
    }


def _told(folder: AuthorsFolder, facts: dict[str, Any]) -> str:
    rest = "".join(f"; {role} from {place.name}" for role, place in folder.given.items())
    return (
        f"{folder.pipeline or 'a transformer alone'}, f{facts['factor']} with {facts['channels']} channels, scale "
        f"{facts['scaling_factor']:g}, {facts['side']} px, shift {facts['shift']} (r = {facts['r']:.4g}): "
        f"{facts['origin']}{rest}"
    )


def _manifest(
    folder: AuthorsFolder, wish: Wish, drawing: HowDrawn, facts: dict[str, Any], seconds: float
) -> dict[str, Any]:
    place, base, ae = folder.place, folder.given.get("base"), folder.given.get("autoencoder")
    record = source_record(place.name, place.root, place.revision)
    if place.subfolder:
        record["subfolder"] = place.subfolder
    sources = {"base": record}
    licences = {"base": licence_of_source(place.name, place.root)}
    if base is not None:
        used = {part: path for part, (path, _) in folder.parts.items() if path.parent == base.root}
        hashes = {part: source_record(part, path)["files"] for part, path in used.items()}
        files = {f"{part}/{file}": digest for part, table in hashes.items() for file, digest in table.items()}
        record["base"] = {"name": base.name, "revision": base.revision, "files": files}
        licences["completed by"] = licence_of_source(base.name, base.root)
    if ae is not None:
        sources["autoencoder"] = source_record(wish.ae or ae.name, ae.root, ae.revision)
        licences["autoencoder"] = licence_of(ae.root)
    made = folder.made
    sources |= {f"{role} of the source": item for role, item in made.get("sources", {}).items()}
    found = manifests.build(
        recipe={"source": wish.name, "adopt": {"resolution": drawing.side, "shift": drawing.shift}},
        family=folder.family.name,
        sources=sources,
        autoencoder=made.get("autoencoder")
        or {
            "name": wish.ae or f"{place.name}/vae",
            "factor": facts["factor"],
            "channels": facts["channels"],
            "scaling_factor": facts["scaling_factor"],
        },
        defaults={
            "height": drawing.side,
            "width": drawing.side,
            "steps": drawing.steps,
            "guidance": drawing.guidance,
            "text_length": drawing.length,
        },
        seed=made.get("seed", 0),
        licence=licences,
        times={"adopt": seconds},
        metrics={},
    )
    if made:
        return found | {"conversion": {"layout": "stock", "recipe": made["recipe"]}}
    return found | {"adopted": facts}
