"""A folder of the DC-Gen authors, understood and checked: its parts, their classes, and how it is drawn with.

Nothing in it is run. Their pipeline class is known by its name, and a transformer or an autoencoder whose tensors are
those of the stock class is taken as that class.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dcgen_convert import families
from dcgen_convert.bundle import manifest as manifests
from dcgen_convert.bundle.scheduler import FLOW_EULER
from dcgen_convert.checkpoint import trust
from dcgen_convert.checkpoint.agreement import require_agreement
from dcgen_convert.checkpoint.components import check_component, plan_copy, write_index
from dcgen_convert.checkpoint.headers import read_weights
from dcgen_convert.checkpoint.licence import FILES as LICENCES
from dcgen_convert.checkpoint.open import DENSE
from dcgen_convert.checkpoint.source import COMPLETING, WHOLE, Source, resolve_folder
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_object, write_json
from dcgen_convert.families import Family, authors, catalog, legacy
from dcgen_convert.families.grid import autoencoder_grid

AUTOENCODER = "AutoencoderDC"
INDEX = "model_index.json"
AGAIN = "fetch the folder again"


@dataclass(frozen=True)
class Wish:
    """What the user asked for.

    name: folder, hub id, or hub id with a folder in it (ORG/NAME/FOLDER). base, ae: pipeline and autoencoder that give
    what the folder lacks. resolution: px. shift: rule or number. None: what the folder or the authors' code says.
    """

    name: str
    base: str | None = None
    ae: str | None = None
    resolution: int | None = None
    shift: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Origin:
    """A resolved folder: the name that it is known by, the folder inside of that, the commit."""

    name: str
    root: Path
    revision: str | None = None
    subfolder: str | None = None


@dataclass(frozen=True)
class AuthorsFolder:
    """What was found.

    pipeline: the class that it names; None: a transformer alone. parts: part -> (folder, library and class).
    given: "base" and "autoencoder" -> where parts came from that the folder lacks. made: the manifest of a bundle of
    this program in the authors' layout, else empty. notes: what is not taken over.
    """

    place: Origin
    family: Family
    pipeline: str | None
    parts: dict[str, tuple[Path, list[str]]]
    given: dict[str, Origin] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def config(self, part: str) -> dict[str, Any]:
        """config.json of a part; scheduler_config.json of the scheduler."""
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        path = self.parts[part][0] / name
        if not path.is_file():
            raise InputError(f"{path} does not exist", AGAIN)
        return legacy.current(read_object(path))

    @property
    def grid(self) -> tuple[int, int]:
        """(f, c) of the autoencoder."""
        return autoencoder_grid(self.config("vae"))


def find(name: str, revision: str | None = None, patterns: list[str] = WHOLE) -> Origin:
    """The folder that ``name`` means; a hub id may be followed by a folder in the repository."""
    words = name.split("/")
    if len(words) < 3 or name.startswith((".", "/", "~")) or Path(name).exists():
        root, commit = resolve_folder(name, revision=revision, patterns=patterns)
        return Origin(name, root, commit)
    repo, inner = "/".join(words[:2]), "/".join(words[2:]).strip("/")
    root, commit = resolve_folder(repo, revision=revision, patterns=[f"{inner}/{pattern}" for pattern in patterns])
    if not (root / inner).is_dir():
        raise InputError(f"{repo} has no folder {inner}", f"see https://huggingface.co/{repo}/tree/main")
    return Origin(repo, root / inner, commit, inner)


def understand(wish: Wish) -> AuthorsFolder:
    """Find the folder and its parts, and check what can be checked before anything is written.

    Raises:
        InputError: it is no folder of the authors, of a kind that is not known, or parts of it are missing, damaged or
            do not belong together.
        AccessError: a repository is neither here nor reachable.
    """
    place = find(wish.name, wish.revision)
    index = _index(place)
    family, pipeline = _kind(place, index)
    own, notes = {}, []
    if index is None:
        own[family.component] = place.root, ["diffusers", family.model_class]
    for part, value in trust.components(index or {}).items():
        if (place.root / part).is_dir():
            own[part] = place.root / part, value
    given: dict[str, Origin] = {}
    if wish.ae is not None:
        entry = catalog.find_autoencoder(wish.ae)
        given["autoencoder"] = found = find(
            entry.where if entry else wish.ae, patterns=["*.json", "*.safetensors", "*.md"]
        )
        own["vae"] = found.root, ["diffusers", str(_config(found.root).get("_class_name"))]
    if wish.base is not None:
        given["base"], completing = _base(wish.base, family)
        own = {**completing, **own}
    wanted, optional = _signature(family)
    if lost := sorted(wanted - own.keys()):
        raise _lacks(place, family, lost, bool(wish.base))
    notes += [f"{part} is no part of a {family.pipeline_class}" for part in sorted(own.keys() - wanted - optional)]
    parts = {part: found for part, found in own.items() if part in wanted | optional}
    stock = {family.component: family.model_class, "vae": AUTOENCODER}
    for part, cls in stock.items():
        notes += _as_stock(place, part, parts[part][1], cls)
        parts[part] = parts[part][0], ["diffusers", cls]
    code = [path for path in trust.foreign_files(place.root) if path.parent == place.root]
    notes += [f"{path.name} is code, which is neither read nor run" for path in code]
    made = manifests.read(place.root) if (place.root / manifests.FILE).is_file() else {}
    folder = AuthorsFolder(place, family, pipeline, parts, given, made, notes)
    _check(folder)
    return folder


def _index(place: Origin) -> dict[str, Any] | None:
    """model_index.json; None for a transformer's own folder."""
    root = place.root
    if (root / INDEX).is_file():
        return read_object(root / INDEX)
    if (root / "config.json").is_file() and families.recognise(legacy.current(read_object(root / "config.json"))):
        return None
    inside = sorted(path.parent.name for path in root.glob(f"*/{INDEX}"))
    raise InputError(
        f"{place.name} holds no {INDEX}" + (f"; its folders {', '.join(inside)} do" if inside else ""),
        f"dcgen-convert adopt {place.name}/{inside[0]} -o BUNDLE" if inside else "give the folder that holds it",
    )


def _kind(place: Origin, index: Mapping[str, Any] | None) -> tuple[Family, str | None]:
    """(family, pipeline class) of the folder."""
    if index is None:
        config = legacy.current(read_object(place.root / "config.json"))
        return _with_layout(families.family_of(config, place.name), place), None
    name = authors.pipeline_class(index)
    if name in authors.OTHERS:
        raise InputError(
            f"{place.name} is a {name} of the DC-Gen authors, which {authors.OTHERS[name]}",
            "bundles of this program draw pictures from text",
        )
    if (place.root / manifests.FILE).is_file() and manifests.read(place.root).get("layout") != "official":
        raise InputError(
            f"{place.name} is a bundle of this program already: there is nothing to adopt",
            "verify, sample, quantize and convert take it as it is",
        )
    if name in authors.PIPELINES:
        return families.get(authors.PIPELINES[name]), name
    stock = next((item for item in families.FAMILIES.values() if item.pipeline_class == name), None)
    vae = trust.components(index).get("vae")
    if stock and stock.official_layout and vae is not None and vae[1] == AUTOENCODER:
        return stock, name
    if stock:
        raise InputError(
            f"{place.name} is a {name} of stock diffusers: there is nothing to adopt",
            "convert and quantize take it as it is",
        )
    raise InputError(
        f"{place.name} names the pipeline class {name}, which this program does not know",
        f"known classes of the DC-Gen authors: {', '.join(authors.PIPELINES)}",
    )


def _with_layout(family: Family, place: Origin) -> Family:
    if not family.official_layout:
        raise InputError(
            f"{place.name} is a {family.name} transformer, and the DC-Gen authors published none of that kind",
            f"known classes of theirs: {', '.join(authors.PIPELINES)}",
        )
    return family


def _signature(family: Family) -> tuple[set[str], set[str]]:
    """(parts that the stock pipeline needs, parts that it may have)."""
    import diffusers

    cls = getattr(diffusers, family.pipeline_class)
    wanted, _ = cls._get_signature_keys(cls)
    optional = set(cls._optional_components)
    return set(wanted) - optional, optional


def _base(name: str, family: Family) -> tuple[Origin, dict[str, tuple[Path, list[str]]]]:
    """The pipeline that gives text encoders, tokenizers and scheduler: (place, part -> folder and class)."""
    entry = catalog.find_source(name)
    found = find(entry.where if entry else name, entry.revision if entry else None, COMPLETING)
    index = Source(name, found.root).index
    kind = index.get("_class_name")
    if kind not in family.pipelines:
        raise InputError(
            f"the base {name} is a {kind}, a {family.name} model needs a {family.pipeline_class}",
            "name the model that was converted, e.g. --base flux-krea",
        )
    place = Origin(name, found.root, found.revision)
    parts = {
        part: (found.root / part, value)
        for part, value in trust.components(index).items()
        if part not in (family.component, "vae") and (found.root / part).is_dir()
    }
    return place, parts


def _lacks(place: Origin, family: Family, lost: list[str], completed: bool) -> InputError:
    """What the user can do about missing parts."""
    said = f"{place.name} has no {' and no '.join(lost)}"
    if family.component in lost:
        return InputError(said, AGAIN)
    hints = ["the autoencoder that it was trained with: --ae dc-ae-f32 (Res1K) or --ae dc-ae-1.5-f64 (Res4K)"]
    hints = hints if "vae" in lost else []
    if others := [part for part in lost if part != "vae"]:
        hints.append(f"the base model, which has the same {', '.join(others)}: --base flux-krea")
    return InputError(said, AGAIN if completed and "vae" not in lost else "give " + "; and ".join(hints))


def _as_stock(place: Origin, part: str, value: list[str], wanted: str) -> list[str]:
    """Notes on a part that stands for the stock class ``wanted``; InputError when it is another class."""
    library, name = value
    if name != wanted:
        hint = "give the autoencoder as a folder of diffusers: --ae" if part == "vae" else f"only a {wanted} is taken"
        raise InputError(f"the {part} of {place.name} is a {library}.{name}, and not a {wanted}", hint)
    return (
        [] if library == "diffusers" else [f"{library}.{name} is code, and the {wanted} of diffusers takes its place"]
    )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{path} does not exist", AGAIN)
    return read_object(path)


def _check(folder: AuthorsFolder) -> None:
    """InputError unless the parts are whole, fit their configs, and belong together."""
    family, network = folder.family, folder.family.component
    for path, _ in folder.parts.values():
        check_component(path)
    config, vae, scheduler = (folder.config(part) for part in (network, "vae", "scheduler"))
    if "quantization_config" in config:
        raise InputError(f"{folder.place.name} is already quantised", "give the dense model")
    if folder.made.get("lora"):
        raise InputError(
            f"{folder.place.name} keeps its LoRA in a file of its own", "convert it again with --merge-lora"
        )
    _require_scale(folder.parts["vae"][0] / "config.json", vae)
    _agree(folder.parts[network][0], config, family.model_class)
    _agree(folder.parts["vae"][0], vae, AUTOENCODER)
    reads, channels = config.get("in_channels"), folder.grid[1]
    if reads != channels:
        raise InputError(
            f"the transformer of {folder.place.name} reads {reads} numbers per token, its autoencoder has {channels} "
            "channels",
            "do they belong together? a converted model reads one cell of the deep latent per token",
        )
    if scheduler.get("_class_name") != FLOW_EULER:
        raise InputError(
            f"the scheduler of {folder.place.name} is a {scheduler.get('_class_name')}, the authors' pipeline takes a "
            f"{FLOW_EULER}",
            AGAIN,
        )


def _agree(folder: Path, config: dict[str, Any], cls: str) -> None:
    """InputError unless the weights in ``folder`` are those that ``config`` asks for, in a dense dtype."""
    if config.get("_class_name") != cls:
        raise InputError(f"{folder / 'config.json'} names {config.get('_class_name')}, and not {cls}", AGAIN)
    tensors = read_weights(folder)
    shapes = {name: entry.shape for name, entry in tensors.items()}
    require_agreement(config, shapes, cls, folder, "is it complete, and is its config the right one?", AGAIN)
    odd = next((name for name, entry in tensors.items() if entry.dtype not in DENSE), None)
    if odd:
        raise InputError(f"{odd} in {folder} is {tensors[odd].dtype}", "give the weights in 16 or 32 bits")


def _require_scale(path: Path, config: Mapping[str, Any]) -> None:
    """InputError without the factor by which the model's latents are scaled: diffusers would take 1."""
    scale = config.get("scaling_factor")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise InputError(
            f"{path} has no usable scaling_factor ({scale!r}), so the scale of the latents is not known",
            "give the autoencoder that the model was trained with: --ae",
        )


def stock_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """An autoencoder's config with the keys that AutoencoderDC knows."""
    from diffusers import AutoencoderDC

    known = {*inspect.signature(AutoencoderDC.__init__).parameters, "_class_name", "_diffusers_version"}
    return {key: value for key, value in config.items() if key in known}


def stage(folder: AuthorsFolder, where: Path) -> None:
    """Make ``where`` a pipeline folder of the parts, with links: what `write_bundle` copies from.

    Raises:
        InputError: a part would run code of its own.
    """
    where.mkdir(parents=True)
    for part, (path, _) in folder.parts.items():
        if part != "vae":
            (where / part).symlink_to(path.resolve())
    path, target = folder.parts["vae"][0], where / "vae"
    target.mkdir()
    for name, plain in plan_copy(path).items():
        (target / plain).parent.mkdir(parents=True, exist_ok=True)
        if name != plain and name.endswith(".json"):
            write_index(path / name, target / plain)
        elif name != "config.json":
            (target / plain).symlink_to((path / name).resolve())
    write_json(target / "config.json", stock_config(folder.config("vae")))
    for pattern in ("README.md", *LICENCES):
        for file in folder.place.root.glob(pattern):
            (where / file.name).symlink_to(file.resolve())
    index = {"_class_name": folder.family.pipeline_class} | {part: value for part, (_, value) in folder.parts.items()}
    write_json(where / INDEX, index)
    trust.require(where, index, "fetch the folder again, or take these parts from the base model with --base")
