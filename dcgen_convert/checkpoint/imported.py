"""Base models that must first be written as a pipeline folder; stage `import` does that, tensor by tensor.

They are: a single file, a transformer alone, precision variants, 8-bit or GGUF weights, and a model with LoRAs to be
fused. All later stages work on the folder:

    transformer/  (of a U-Net: unet/) written anew; embedder and head have the first shard to themselves, so that
                  stage `surgery` can link the other shards
    the rest      links to the components of the base
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dcgen_convert import families
from dcgen_convert.checkpoint import lora as loras_
from dcgen_convert.checkpoint import stream
from dcgen_convert.checkpoint.agreement import require_agreement
from dcgen_convert.checkpoint.components import check_component, plan_copy, write_index
from dcgen_convert.checkpoint.licence import FILES as LICENCES
from dcgen_convert.checkpoint.lora import Lora, Merger
from dcgen_convert.checkpoint.record import source_record
from dcgen_convert.checkpoint.single import Single, read_single
from dcgen_convert.checkpoint.sizes import AXES
from dcgen_convert.checkpoint.source import (
    COMPLETING,
    Source,
    check_scheduler,
    check_variant,
    resolve_folder,
)
from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import AccessError, InputError
from dcgen_convert.core.files import read_object, sha256, write_json
from dcgen_convert.core.journal import fingerprint
from dcgen_convert.families import Family, bases, catalog, legacy

STAGE = "import"
SHARD = 4 << 30  # bytes per shard; the embedder and the head have one of their own
WEIGHTS = "diffusion_pytorch_model"
FORMAT = 1  # of what this module writes; part of the fingerprint


@dataclass(frozen=True, kw_only=True)
class Imported(Source):
    """A source whose folder ``root`` is written by `lay_out`.

    Attributes:
        single: the transformer's tensors.
        base: pipeline folder from which everything else is taken.
        base_name, base_revision: how the user or the table of published bases names that pipeline.
        loras: LoRA files to fuse.
        own: config that came with the transformer; None: it came without one.
    """

    single: Single
    base: Path
    base_name: str
    base_revision: str | None = None
    loras: tuple[Lora, ...] = ()
    own: dict[str, Any] | None = None
    imported = True

    @property
    def transformer(self) -> Path:
        return self.root / self.family.component

    @property
    def vae(self) -> Path:
        return self.base / "vae"  # it is asked for before `lay_out` too

    @cached_property
    def index(self) -> dict[str, Any]:
        return Source(self.name, self.base).index

    @cached_property
    def family(self) -> Family:
        return families.of_pipeline(self.single.family, self.index)

    @cached_property
    def config(self) -> dict[str, Any]:
        return self.own or self.single.config(_template(self.base, self.family))

    @property
    def content_files(self) -> dict[str, Path]:
        fused = {f"LoRA {number}": lora.path for number, lora in enumerate(self.loras, 1)}
        return (
            super().content_files | dict.fromkeys([self.family.component] * len(self.files), self.single.path) | fused
        )

    def contents(self, advance: Callable[[int], object] | None = None) -> dict[str, str]:
        scales = [lora.scale for lora in self.loras]
        return {**super().contents(advance), "import": fingerprint([FORMAT, self.config, self.index, scales])}

    @property
    def parts(self) -> dict[str, Path]:
        network = self.family.component
        rest = {part: folder for part, folder in Source(self.name, self.base).parts.items() if part != network}
        return rest | ({network: self.single.path} if self.single.path.is_dir() else {})

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.single.path,) if self.single.path.is_file() else ()

    def record(self, name: str) -> dict[str, Any]:
        path = self.single.path
        own = source_record(name, path, self.revision)["files"] if path.is_dir() else {path.name: sha256(path)}
        fused = [{"file": lora.path.name, "scale": lora.scale, "sha256": sha256(lora.path)} for lora in self.loras]
        rest = {
            f"{part}/{file}": digest
            for part, folder in self.parts.items()
            if part != self.family.component
            for file, digest in source_record(name, folder)["files"].items()
        }
        base = {"name": self.base_name, "revision": self.base_revision, "files": rest}
        return {"name": name, "revision": self.revision, "files": own, "loras": fused, "base": base}

    def check(self) -> None:
        """InputError when the transformer is not the one that the base's pipeline runs, or lacks tensors of its
        class.
        """
        check_variant(self.index, self.family, self.base)
        check_scheduler(self.base, self.family)
        whole = _template(self.base, self.family)
        if any(key in whole and key not in self.config for key in AXES):
            raise InputError(
                f"{self.single.path} has attention heads of another width than the base {self.base}, and no tensor "
                "tells its rotary axes",
                "name a pipeline with the same heads: --base FOLDER",
            )
        require_agreement(
            self.config,
            self.single.shapes,
            self.family.model_class,
            self.single.path,
            "is the checkpoint complete, and is --base of the same kind?",
            "name the pipeline folder that it belongs to: --base FOLDER",
        )
        old, new = (config.get("in_channels") for config in (whole, self.config))
        if old is not None and old != new:
            raise InputError(
                f"{self.single.path} reads {new} numbers per token where the base {self.base} reads {old}: an "
                "inpainting or "
                "editing variant, or a model that is converted already",
                "give a text-to-image model in its original latent space, or its own base with --base FOLDER",
            )
        for part, folder in Source(self.name, self.base).parts.items():
            if part != self.family.component:
                check_component(folder)

    def lay_out(self, console: Console) -> dict[str, Any]:
        """Write the pipeline folder; returns what was done, for the manifest."""
        for part, folder in Source(self.name, self.base).parts.items():
            if part != self.family.component:
                _link(folder, self.root / part)
        for pattern in ("README.md", *LICENCES):
            for path in self.base.glob(pattern):
                _symlink(path, self.root / path.name)
        losses = self.single.contents.losses()
        for text in losses:
            console.warn(f"{self.single.path.name}: {text}")
        for kind, count in self.single.contents.aside.items():
            console.say(
                f"{self.single.path.name}: {count} tensors of {kind} are left aside, {self.base_name} has its own"
            )
        if self.single.unused:
            console.say(f"{self.single.path.name}: not used by the network: {', '.join(self.single.unused)}")
        largest = self._write_transformer(console)
        for lora in self.loras:
            count = len(lora.pairs)
            console.say(
                f"merged {count} of {count} LoRA updates of {lora.path} at scale {lora.scale:g}, max |dW| = "
                f"{largest:.4g}"
            )
            if lora.text:
                console.warn(
                    f"{lora.path}: {lora.text} tensors for text encoders are not merged: only the transformer is "
                    "converted"
                )
        write_json(self.root / "model_index.json", self.index)
        merged = {lora.path.name: len(lora.pairs) for lora in self.loras}
        return {
            "layout": self.single.layout,
            "tensors": len(self.single.stacks),
            "losses": losses,
            "merged": merged,
            "base": self.base_name,
            **({"max_delta": largest} if merged else {}),
        }

    def _write_transformer(self, console: Console) -> float:
        """Shards and config; returns the largest |dW| of the LoRAs."""
        merger, folder = Merger(self.loras), self.transformer
        folder.mkdir(parents=True, exist_ok=True)
        items = {name: self.single.item(name, merger.of(name)) for name in self.single.stacks}
        shards = shards_of(items, (self.family.embedder, self.family.head))
        sizes = {name: item.size for name, item in items.items()}
        index: dict[str, str] = {}
        with console.progress("import", sum(sizes.values()), "B") as bar:
            for number, names in enumerate(shards, 1):
                file = f"{WEIGHTS}-{number:05d}-of-{len(shards):05d}.safetensors"
                stream.write(folder / file, {name: items[name] for name in names}, {"format": "pt"}, bar.advance)
                index |= dict.fromkeys(names, file)
        if self.loras and not merger.largest > 0:
            raise InputError(
                f"the LoRA {self.loras[0].path} changes nothing: every dW is zero", "is it the right file?"
            )
        total = {"total_size": sum(sizes.values())}
        write_json(
            folder / f"{WEIGHTS}.safetensors.index.json", {"metadata": total, "weight_map": dict(sorted(index.items()))}
        )
        write_json(folder / "config.json", self.config)
        return merger.largest


def shards_of(items: dict[str, stream.Item], remade: Sequence[str]) -> list[list[str]]:
    """Tensor names by shard: the modules ``remade`` by surgery first, then the others in order, `SHARD` bytes each."""
    first = [name for name in items if name.rpartition(".")[0] in remade]
    shards, filled = [first, []], 0
    for name in (name for name in items if name not in first):
        if shards[-1] and filled + items[name].size > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += items[name].size
    return [shard for shard in shards if shard]


def import_source(
    name: str,
    path: Path,
    revision: str | None,
    *,
    base: str | None,
    loras: Sequence[str],
    home: Path | None,
    offline: bool,
) -> Imported:
    """The source at ``path`` (a file or a folder), completed by ``base`` and with ``loras``.

    It is checked; nothing is written yet.
    """
    if home is None:
        raise InputError(f"{path} is no diffusers pipeline folder as it stands", "give the pipeline folder")
    whole = (path / "model_index.json").is_file()
    folder = families.network_folder(path) if whole else path
    own = None
    if path.is_dir():
        own = Source(name, path).config if whole else _own_config(path)
        _ = families.family_of(own, path)
    single = read_single(folder)
    if own and own["_class_name"] != single.family.model_class:
        raise InputError(
            f"{folder} says {own['_class_name']}, its tensors are of a {single.family.model_class}", "which one is it?"
        )
    own = own if single.layout == "diffusers" else None
    where, rest, rest_revision = (name, path, revision) if whole and base is None else _base(single, base, offline)
    source = Imported(
        name, home, revision, single=single, base=rest, base_name=where, base_revision=rest_revision, own=own
    )
    if source.family.further:
        raise InputError(
            f"{path}: a {source.family.name} model has several networks, and this program can fuse, rename or complete "
            "none of them",
            "give the diffusers folder as it was published, in 16 or 32 bits, without --lora and --base",
        )
    source.check()
    return replace(source, loras=tuple(loras_.read(text, single.family.name, single.shapes) for text in loras))


def _own_config(path: Path) -> dict[str, Any]:
    config = legacy.current(read_object(path / "config.json"))
    if "quantization_config" in config:
        raise InputError(f"{path} is already quantised", "give the dense model")
    return config


def _base(single: Single, asked: str | None, offline: bool) -> tuple[str, Path, str | None]:
    """(name, folder, revision) of the pipeline that completes a transformer.

    Raises:
        InputError: none is published for this kind and none was named, or what was named is of another kind.
        AccessError: it is not here and cannot be fetched.
    """
    if asked is None:
        published = bases.base_of(single.family.name, single.config())
        if published is None:
            raise InputError(
                f"{single.path} holds only a {single.family.name} transformer, without text encoders, autoencoder "
                "and scheduler",
                "name the pipeline that has them: --base FOLDER|REPO",
            )
        asked = published.repo
    entry = catalog.find_source(asked)
    where = entry.where if entry else asked
    try:
        folder, revision = resolve_folder(
            where, revision=entry.revision if entry else None, offline=offline, patterns=COMPLETING
        )
    except AccessError as error:
        raise AccessError(
            f"{single.path} holds only a transformer; its text encoders, autoencoder and scheduler come from "
            f"{where}, which is not in "
            "the local cache and cannot be fetched",
            "connect to the network, or name a folder that has them: --base FOLDER",
        ) from error
    found = families.recognise(_template(folder, single.family, whole=True))
    if found is not single.family:
        raise InputError(
            f"the base {asked} is a {found.name if found else 'pipeline of an unknown family'}, {single.path} is a "
            f"{single.family.name}",
            "name a pipeline of the same family: --base FOLDER|REPO",
        )
    return asked, folder, revision


def _template(base: Path, family: Family, whole: bool = False) -> dict[str, Any]:
    """The transformer config of a base folder; what ships for the family where the folder has none."""
    if not (base / "model_index.json").is_file():
        raise InputError(
            f"the base {base} has no model_index.json: not a diffusers pipeline folder", "--base FOLDER|REPO"
        )
    path = families.network_folder(base) / "config.json"
    if path.is_file():
        return legacy.current(read_object(path))
    return {"_class_name": family.model_class} if whole else bases.template_of(family.name)


def _link(folder: Path, target: Path) -> None:
    """Make ``target`` a link to the component ``folder``; precision variants get their plain names."""
    plan = plan_copy(folder)
    if all(name == plain for name, plain in plan.items()):
        _symlink(folder, target)
        return
    for name, plain in plan.items():
        (target / plain).parent.mkdir(parents=True, exist_ok=True)
        if name != plain and name.endswith(".json"):
            write_index(folder / name, target / plain)
        else:
            _symlink(folder / name, target / plain)


def _symlink(path: Path, target: Path) -> None:
    """A link that replaces a former one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    os.symlink(path.resolve(), target)
