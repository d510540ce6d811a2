"""What draws a set of pictures: a bundle, or a source. It is plain data, so that every rank can load the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dcgen_convert.bundle import checks, loading
from dcgen_convert.bundle import manifest as manifests
from dcgen_convert.checkpoint.imported import Imported
from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.checkpoint.source import CONTENT, Source
from dcgen_convert.core import pulse
from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import AccessError, CheckFailed, InputError
from dcgen_convert.core.files import read_json
from dcgen_convert.core.journal import fingerprint
from dcgen_convert.data.buckets import Size
from dcgen_convert.families import Family, catalog, refuse_videos
from dcgen_convert.families.grid import Grid, autoencoder_grid
from dcgen_convert.networks import pipelines
from dcgen_convert.networks.pipelines import DTYPES
from dcgen_convert.recipe.identity import Identity
from dcgen_convert.stages import source_pipeline
from dcgen_convert.stages.compare import runtime_of

SHOWN = 5  # damaged files that the error names


@dataclass(frozen=True)
class Painter:
    """A model, and how it draws.

    Attributes:
        name: as the user gave it. place: folder of a bundle, or what `load_source` takes.
        is_bundle: else a source. revision: of a source on the hub.
        digest: hash of its weights, configs and tokenizers.
        side: height in px. width: in px; 0: it draws squares. steps, guidance, length: of the drawing; length in text
            tokens.
        dtype: "fp32" or "bf16". runtime: how a bundle runs, as in `bundle.loading`; "stock" for a source.
        home: folder for a source that must be written as a pipeline first.
        frames: of each video; 0: it draws pictures. fps: frames a second of a video.
    """

    name: str
    place: str
    is_bundle: bool
    revision: str | None
    digest: str
    side: int
    steps: int
    guidance: float
    length: int
    dtype: str
    runtime: str
    home: Path
    frames: int = 0
    width: int = 0
    fps: float = 0

    @property
    def size(self) -> Size:
        """(height, width) in px."""
        return self.side, self.width or self.side

    @property
    def about(self) -> dict[str, Any]:
        """What its pictures depend on."""
        left_out = ("name", "place", "is_bundle", "revision", "home", "fps")
        found = {key: value for key, value in asdict(self).items() if key not in left_out}
        return {key: value for key, value in found.items() if value or key not in ("frames", "width")}

    def load(self) -> tuple[Any, Family]:
        """The pipeline, ready to draw, and its family."""
        if self.is_bundle:
            bundle = Path(self.place)
            family = loading.family_of(bundle)
            pipeline, _ = loading.load(bundle, DTYPES[self.dtype], self.runtime)
            for network in pipelines.networks_of(family, pipeline):
                network.register_forward_hook(pulse.bump)
            return pipeline, family
        source = opened(self.name, self.place, self.revision, self.home, moving=self.frames > 0)
        pipeline = source_pipeline.load(source, DTYPES[self.dtype])
        source_pipeline.cap_shift(pipeline, Identity(self.name), self.side)
        return pipeline, source.family


def opened(
    name: str, place: str, revision: str | None, home: Path, *, offline: bool = False, moving: bool = False
) -> Source:
    """The source, from its headers. moving: it may draw videos."""
    source = load_source(name, place, revision=revision, home=home, offline=offline)
    if not moving:
        refuse_videos(source.family, name)
    return source


def import_folder(home: Path, place: str) -> Path:
    """Folder in ``home`` for the pipeline of a source that is no pipeline folder; another one for each state of it."""
    path = Path(place).expanduser()
    state = [path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else []
    return home / fingerprint([place, *state])[:12]


def of_bundle(bundle: Path, home: Path, console: Console, **drawing: Any) -> Painter:
    """The bundle as it is meant to draw, or as ``drawing`` says: side (then squares), steps, guidance; None: the
    bundle's own.

    Raises:
        CheckFailed: it is unfinished, or a file of it is not as its manifest says.
    """
    manifest = manifests.read(bundle)
    content = {name: entry for name, entry in manifest["files"].items() if Path(name).suffix in CONTENT}
    if damaged := checks.check_listed(bundle, {**manifest, "files": content}, console):
        raise CheckFailed(
            f"{bundle} is damaged: {'; '.join(damaged[:SHOWN])}", "dcgen-convert verify names every difference"
        )
    defaults = manifest["defaults"]
    own = {"side": defaults["height"], "steps": defaults["steps"], "guidance": defaults["guidance"]}
    if drawing.get("side") is None and defaults["width"] != defaults["height"]:
        own["width"] = defaults["width"]
    dtype = loading.default_dtype(bundle, pipelines.device())
    return Painter(
        name=str(bundle),
        place=str(bundle),
        is_bundle=True,
        revision=None,
        digest=fingerprint({name: entry["sha256"] for name, entry in content.items()}),
        length=defaults["text_length"],
        dtype=_name_of(dtype),
        runtime=runtime_of(bundle, dtype),
        home=home,
        frames=defaults.get("frames", 0),
        fps=manifests.fps_of(manifest, loading.family_of(bundle)),
        **own | {key: value for key, value in drawing.items() if value is not None},
    )


def of_source(source: Source, place: str, manifest: Mapping[str, Any], console: Console, **drawing: Any) -> Painter:
    """The source as the recipe of the bundle with this ``manifest`` lets it draw, or as ``drawing`` says."""
    if isinstance(source, Imported) and not (source.root / "model_index.json").exists():  # written last
        source.root.parent.mkdir(parents=True, exist_ok=True)
        source.lay_out(console)
    sizes = sum(path.stat().st_size for path in source.content_files.values())
    with console.progress("hash the base", sizes, "B") as bar:
        source.contents(bar.advance)
    defaults, data = manifest["defaults"], manifest["recipe"].get("data") or {}
    own: dict[str, Any] = {
        key: data.get(key) if data.get(key) is not None else defaults[key] for key in ("steps", "guidance")
    }
    same = source.family.name == manifest["family"]
    return Painter(
        name=source.name,
        place=place,
        is_bundle=False,
        revision=source.revision,
        digest=source.fingerprint,
        length=defaults["text_length"] if same else source.family.text_length,
        dtype=_name_of(loading.default_dtype(source.root, pipelines.device())),
        runtime="stock",
        frames=defaults.get("frames", 0),
        fps=source.family.frames_per_second(source.index),
        **own | {key: value for key, value in drawing.items() if value is not None},
    )


def _name_of(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known is dtype)


def named_base(manifest: Mapping[str, Any], home: Path) -> tuple[Source | None, str, str]:
    """(source, its place, why there is none): the base that a manifest names, if it is on this machine.

    Nothing is fetched. It must be what the bundle was made from, file by file.
    """
    record = manifest["sources"].get("base") or {}
    name = str(record.get("name") or "")
    entry = catalog.find_source(name)
    place = entry.where if entry else str(record.get("repo") or "")
    if record.get("loras") or record.get("base"):
        return None, "", f"the base {name!r} was put together from several files"
    if not place:
        return None, "", f"the manifest names the base {name!r}, without a place where it lies"
    try:
        moving = "frames" in manifest["defaults"]
        source = opened(name, place, record.get("revision"), home, offline=True, moving=moving)
        contents = source.contents()
    except (AccessError, InputError) as error:
        return None, "", f"the base {name!r} is not at hand: {error.message}"
    made_from = record.get("files") or {}
    changed = [file for file, digest in contents.items() if made_from.get(file, digest) != digest]
    if changed:
        return (
            None,
            "",
            f"the base {name!r} on this machine is another one than the bundle was made from ({changed[0]})",
        )
    return source, place, ""


def grid_of(bundle: Path, family: Family) -> Grid:
    """The latent space that a bundle draws in."""
    config, vae = loading.transformer_config(bundle), read_json(bundle / "vae" / "config.json")
    factor, channels = autoencoder_grid(vae)
    return Grid(factor, channels, family.patch(config, channels))
