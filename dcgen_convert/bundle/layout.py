"""Assembling a bundle: a diffusers folder that loads with one line.

Three layouts, which differ in model_index.json and the vae's config and code only:

    stock     the family's stock pipeline; where it packs p x p latents, the in-bundle AutoencoderDCAdapter undoes that.
              A bundle for videos carries the class of its autoencoder: diffusers does not have AutoencoderDCVideo, and
              its own of LTX-2 lacks what pipelines of Wan read
    official  the DC-Gen authors' own pipeline class, which expects a plain AutoencoderDC
    source    the source's own pipeline, autoencoder and scheduler: only the transformer is another (`quantize`)

The bundle is written into a sibling folder, its manifest last, and renamed into place: a folder with a manifest is a
whole bundle.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dcgen_convert import families
from dcgen_convert.bundle import lineage, sbom
from dcgen_convert.bundle import manifest as manifests
from dcgen_convert.bundle.card import PICTURES, render
from dcgen_convert.checkpoint import licence
from dcgen_convert.checkpoint.components import copy_component, plan_copy
from dcgen_convert.checkpoint.record import hash_files
from dcgen_convert.checkpoint.trust import is_component
from dcgen_convert.core import names
from dcgen_convert.core.console import Console
from dcgen_convert.core.disk import check_disk, require_writable
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import atomic_write, copy_file, read_json, read_object, sha256, write_json
from dcgen_convert.families.base import FPS_KEY, Family
from dcgen_convert.families.grid import LTX

CARD = "README.md"
LAYOUTS = ("stock", "official", "source")


@dataclass(frozen=True)
class BundleParts:
    """What a bundle is put together from.

    family: facts of the model's family.
    source: diffusers folder of the base pipeline; text encoders, tokenizers and licences are copied from it.
    transformer: folder of the converted transformer, dense or quantised (`nunchaku_lite`).
    layout: "stock", "official" or "source".
    autoencoder: folder of a deep autoencoder. scheduler: config from `bundle.scheduler.scheduler_config`.
        The layout "source" has neither.
    lora: adapter file in the form that `load_lora_weights` takes, for bundles that keep it apart; None when merged.
    single_file: the transformer once more, in the classic nunchaku container; None: the bundle has none.
    scaling_factor: replaces the autoencoder's own, when it was measured anew.
    further: folders of the model's other converted networks, by their names in the pipeline.
    """

    family: Family
    source: Path
    transformer: Path
    layout: str = "stock"
    autoencoder: Path | None = None
    scheduler: dict[str, Any] | None = None
    lora: Path | None = None
    single_file: Path | None = None
    scaling_factor: float | None = None
    further: Mapping[str, Path] = field(default_factory=dict)

    @property
    def networks(self) -> dict[str, Path]:
        """All converted networks: name in the pipeline -> folder."""
        return {self.family.component: self.transformer, **self.further}

    def __post_init__(self) -> None:
        own = (self.autoencoder is None, self.scheduler is None)
        if own != (self.layout == "source",) * 2:
            raise ValueError("every layout but `source` needs an autoencoder and a scheduler config")


def write_bundle(
    output: Path, parts: BundleParts, manifest: dict[str, Any], console: Console, *, force: bool = False
) -> Path:
    """Write the bundle folder ``output``, its model card included, and return it.

    Args:
        output: folder to create. It must not exist, or be empty, or with ``force`` be a bundle, which is then replaced.
        manifest: from `bundle.manifest.build`; hashes of files and the table of tensors are added here.

    Raises:
        InputError: the output is taken or not writable, a folder lacks what it must have, the layout does not exist
            for the family.
        ResourceError: the disk is too small.
    """
    index = model_index(parts)
    if parts.family.index_side and parts.layout != "source":
        index[parts.family.index_side] = manifest["defaults"]["height"]
    check_output(output, force)
    copies = _components(parts, index)
    require_room(output, copies.values(), () if parts.single_file is None else (parts.single_file,))
    staging = output.parent / f".{output.name}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        # The hash of a copy is the hash of what was read from its origin, so that a bad copy is found by `verify`.
        hashes = _copy_all(parts, copies, staging, console)
        _write_own(parts, index, render_card(manifest, parts, output.name), staging)
        hashes |= hash_files(staging, skip=hashes)
        record = {**manifest, "layout": parts.layout, "lora": None if parts.lora is None else names.LORA}
        record["files"] = manifests.file_table(staging, hashes)
        record["tensors"] = {
            manifests.tensor_key(network, name): entry
            for network in parts.networks
            for name, entry in manifests.tensor_table(staging / network, parts.source / network, console).items()
        }
        write_json(staging / manifests.FILE, record)
        _swap(staging, output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    console.say(f"bundle: {output} ({parts.layout} layout, {len(record['files'])} files)")
    return output


def render_card(manifest: dict[str, Any], parts: BundleParts, title: str) -> str:
    """README.md of a bundle of ``parts``."""
    return render(manifest, family=parts.family, layout=parts.layout, lora=parts.lora is not None, title=title)


def _components(parts: BundleParts, index: dict[str, Any]) -> dict[str, Path]:
    """Folders that are copied into the bundle: name there -> where it comes from."""
    copies = {name: parts.source / name for name in index if is_component(index[name])}
    copies |= parts.networks
    if parts.autoencoder is not None:
        del copies["scheduler"]
        copies["vae"] = parts.autoencoder
    return copies


def _copy_all(parts: BundleParts, copies: dict[str, Path], staging: Path, console: Console) -> dict[str, str]:
    """Copy components and single files; relative path -> SHA-256 of what stays as it was copied."""
    hashes: dict[str, str] = {}
    for name, folder in copies.items():
        found = copy_component(folder, staging / name, console, label=name)
        hashes |= {f"{name}/{file}": digest for file, digest in found.items()}
    if parts.lora is not None:
        hashes[names.LORA] = copy_file(parts.lora, staging / names.LORA)
    if parts.single_file is not None:
        hashes[parts.single_file.name] = copy_file(parts.single_file, staging / parts.single_file.name)
    _copy_licences({"": parts.source, "-autoencoder": parts.autoencoder}, staging)
    for file in _forget_places(staging):
        del hashes[file]
    if parts.autoencoder is not None:
        hashes.pop("vae/config.json", None)  # `_write_own` changes it
    return hashes


def _forget_places(staging: Path) -> list[str]:
    """Rewrite the configs that say where on this machine a part was loaded from; their relative paths."""
    changed = []
    for path in sorted(staging.glob("*/*config.json")):
        config = read_json(path)
        if isinstance(config, dict) and lineage.forget_places(config):
            write_json(path, config)
            changed.append(path.relative_to(staging).as_posix())
    return changed


def _write_own(parts: BundleParts, index: dict[str, Any], card: str, staging: Path) -> None:
    """The files that are written anew."""
    if parts.autoencoder is not None:
        _write_vae(staging / "vae", parts)
        (staging / "scheduler").mkdir()
        write_json(staging / "scheduler" / "scheduler_config.json", parts.scheduler)
    atomic_write(staging / CARD, card)
    write_json(staging / sbom.FILE, sbom.describe())
    write_json(staging / "model_index.json", index)


def model_index(parts: BundleParts) -> dict[str, Any]:
    """model_index.json of the bundle, from the source pipeline's own.

    Raises:
        InputError: the layout does not exist, or not for this family.
    """
    family, layout = parts.family, parts.layout
    if layout not in LAYOUTS:
        raise InputError(f"layout {layout!r} does not exist", f"choose one of {', '.join(LAYOUTS)}")
    if layout == "official" and not family.official_layout:
        raise InputError(
            f"the DC-Gen authors published no pipeline class for {family.name}",
            "use the stock layout, which needs none",
        )
    source = read_json(parts.source / "model_index.json")
    index = {
        **{key: value for key, value in source.items() if not key.startswith("_")},
        "_class_name": f"DCGen_{family.pipeline_class}" if layout == "official" else family.pipeline_of(source),
        "_diffusers_version": version("diffusers"),
        **{network: ["diffusers", family.model_class] for network in parts.networks},
    }
    if fps := family.frames_per_second(source):
        index[FPS_KEY] = fps
    if parts.scheduler is not None:
        index |= family.index_of_bundle(index)
        index["scheduler"] = ["diffusers", parts.scheduler["_class_name"]]
        code = carried(parts)
        index["vae"] = [code.MODULE_NAME, code.CLASS_NAME] if code else ["diffusers", "AutoencoderDC"]
    return index


def has_adapter(family: Family) -> bool:
    """Whether a bundle of the family needs the in-bundle adapter (tier 2).

    It does when the stock pipeline packs latents, or calls something that an AutoencoderDC does not have.
    """
    return family.bundle_tier == 2


def carried(parts: BundleParts) -> Any:
    """The module of this program whose file a bundle carries for its autoencoder; None: diffusers has the class."""
    if parts.layout != "stock" or parts.family.bundle_tier < 2 or parts.autoencoder is None:
        return None
    from dcgen_convert.bundle import autoencoder_dc_adapter

    if has_adapter(parts.family):
        return autoencoder_dc_adapter
    return video_code(read_json(parts.autoencoder / "config.json"))


def video_code(config: Mapping[str, Any]) -> Any:
    """The module with the class that bundles have for an autoencoder of videos with this config."""
    from dcgen_convert.networks import autoencoder_dc_video, autoencoder_ltx2

    return autoencoder_ltx2 if config.get("_class_name") in LTX else autoencoder_dc_video


def check_output(output: Path, force: bool) -> None:
    """Refuse an output that would destroy something; also called before a long job starts."""
    if output.exists() and not output.is_dir():
        raise InputError(f"the output {output} is a file", "choose another folder with --output")
    require_writable(output.parent, "--output")  # there the bundle is put together, and renamed
    if not output.exists() or not any(output.iterdir()):
        return
    if not force:
        raise InputError(
            f"the output folder {output} is not empty", "choose another with --output, or replace it with --force"
        )
    if not (output / manifests.FILE).is_file():
        raise InputError(
            f"{output} is not a bundle of this program, --force will not delete it",
            "choose another folder with --output",
        )


def require_room(output: Path, folders: Iterable[Path], files: Iterable[Path] = ()) -> None:
    """ResourceError when the disk under ``output`` cannot hold copies of ``folders`` and ``files``."""
    need = sum((folder / name).stat().st_size for folder in folders for name in plan_copy(folder))
    need += sum(file.stat().st_size for file in files)
    check_disk([(output, need)], "--output")


@dataclass(frozen=True)
class PictureGrid:
    """The grid that the card shows: a PNG file, the titles of its columns, and the captions of its rows."""

    file: Path
    columns: list[str]
    prompts: list[str]


def add_metrics(
    bundle: Path, family: Family, stage: str, metrics: dict[str, Any], pictures: PictureGrid | None = None
) -> None:
    """Put what was measured on the finished bundle into its manifest and model card, and pictures of it into both."""
    record = manifests.read(bundle)
    steady, timing = manifests.split_timing({stage: metrics})
    record["metrics"] |= steady
    record["times"] |= timing
    if pictures is not None:
        copy_file(pictures.file, bundle / PICTURES)
        record["pictures"] = {"columns": pictures.columns, "prompts": pictures.prompts}
        record["files"] |= manifests.file_table(bundle, {PICTURES: sha256(bundle / PICTURES)})
    elif PICTURES not in record["files"]:
        (bundle / PICTURES).unlink(missing_ok=True)  # of a run that ended before the manifest was written
    _renew_card(bundle, record, card_of(record, title=bundle.name, family=family).encode())


def name_repository(bundle: Path, repo: str) -> None:
    """Let the card of a finished bundle load it from the hub repository ``repo``."""
    record = manifests.read(bundle)
    _renew_card(bundle, record, card_of(record, title=repo.rpartition("/")[2], place=repo).encode())


def _renew_card(bundle: Path, record: dict[str, Any], card: bytes) -> None:
    """Replace the card of a finished bundle, and its manifest by ``record`` with the hash of this card.

    The manifest first names both cards, the one that is there and the new one: so the bundle is right at every moment.
    """
    path = bundle / CARD
    entry = {"sha256": hashlib.sha256(card).hexdigest(), "bytes": len(card)}
    if path.is_file() and sha256(path) != entry["sha256"]:
        both = {**entry, manifests.BEFORE: manifests.file_table(bundle, {CARD: sha256(path)})[CARD]}
        write_json(bundle / manifests.FILE, {**record, "files": {**record["files"], CARD: both}})
    atomic_write(path, card)
    record["files"][CARD] = entry
    write_json(bundle / manifests.FILE, record)


def card_of(record: Mapping[str, Any], *, title: str, place: str | None = None, family: Family | None = None) -> str:
    """README.md of a finished bundle with the manifest ``record``. place: what its code loads; None: the title."""
    family = family or families.get(record["family"])
    return render(
        record, family=family, layout=record["layout"], lora=record["lora"] is not None, title=title, place=place
    )


def _write_vae(folder: Path, parts: BundleParts) -> None:
    """The autoencoder's config in the bundle's words, and the adapter's code beside it where the bundle needs it."""
    config, family = read_json(folder / "config.json"), parts.family
    if parts.scaling_factor is not None:
        config["scaling_factor"] = parts.scaling_factor
    if code := carried(parts):
        transformer = read_json(parts.transformer / "config.json")
        config |= adapter_config(family, config, transformer) if has_adapter(family) else video_config(config)
        atomic_write(folder / f"{code.MODULE_NAME}.py", Path(code.__file__).read_bytes())
    write_json(folder / "config.json", config | family.vae_config(config))


def adapter_config(family: Family, config: Mapping[str, Any], transformer: Mapping[str, Any]) -> dict[str, Any]:
    """What the config of an autoencoder gets for the in-bundle adapter.

    Args:
        config: of the AutoencoderDC. transformer: config of the converted network.
    """
    from dcgen_convert.bundle import autoencoder_dc_adapter as adapter

    widths, pack = config["encoder_block_out_channels"], family.pack(dict(transformer))
    return {
        "_class_name": adapter.CLASS_NAME,
        "auto_map": {"AutoModel": f"{adapter.MODULE_NAME}.{adapter.CLASS_NAME}"},
        "latent_pack": pack,
        "latent_order": family.adapter_order,
        "shift_factor": 0.0,
        "block_out_channels": widths[: len(widths) - (pack.bit_length() - 1)],
    }


def video_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a bundle's autoencoder of videos. Of an AutoencoderDCVideo it has all that pipelines read from it,
    which follows from the rest; LTX-2's shows it when it is asked.
    """
    import torch

    code = video_code(config)
    with torch.device("meta"):
        model = vars(code)[code.CLASS_NAME].from_config(dict(config))
    found: dict[str, Any] = json.loads(model.to_json_string())
    return found


def _copy_licences(folders: dict[str, Path | None], staging: Path) -> None:
    """Licence files of ``folders``: suffix of their names -> folder."""
    for suffix, folder in folders.items():
        if folder is None:
            continue
        for path in sorted(p for pattern in licence.FILES for p in Path(folder).glob(pattern) if p.is_file()):
            copy_file(path, staging / f"{path.stem}{suffix}{path.suffix}")


def _swap(staging: Path, output: Path) -> None:
    """Rename into place; an old bundle stays beside until the new one stands."""
    old = output.parent / f".{output.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    try:
        staging.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def read_index(bundle: Path) -> dict[str, Any]:
    """model_index.json of a bundle; InputError when the folder is not a diffusers folder."""
    manifests.require_bundle(bundle)
    return read_object(Path(bundle) / manifests.INDEX)
