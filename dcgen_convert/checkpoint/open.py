"""The base model that SOURCE names, found and checked: a pipeline folder as it is, or one that stage import writes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dcgen_convert import families
from dcgen_convert.checkpoint.agreement import require_agreement
from dcgen_convert.checkpoint.components import check_component, plan_copy
from dcgen_convert.checkpoint.held import PACKED, SCALES
from dcgen_convert.checkpoint.source import (
    WHOLE,
    Source,
    check_scheduler,
    check_variant,
    resolve_folder,
)
from dcgen_convert.core import names
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_object
from dcgen_convert.families import authors

DENSE = ("F64", "F32", "F16", "BF16")  # dtypes of weights that can be trained and merged as they are


def load_source(
    name: str,
    repo_or_path: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    base: str | None = None,
    loras: Sequence[str] = (),
    home: Path | None = None,
) -> Source:
    """Resolve and check the base model: family known, weights complete by their headers.

    Args:
        base: catalogue name, folder or hub id of the pipeline that completes a transformer which comes alone; by
            default the published one of its kind.
        loras: FILE[:scale] texts, fused before anything else happens.
        home: folder where stage `import` writes the pipeline if SOURCE is not one as it is.
    """
    path = Path(os.path.expanduser(repo_or_path))
    root = None
    if not path.is_file():
        root, revision = resolve_folder(repo_or_path, revision=revision, offline=offline, patterns=WHOLE)
    if root is not None and base is None and not loras and is_plain(root):
        source = Source(name, root, revision)
        _ = source.index, source.family
        authors.refuse(source.index, name, source.family)
        check_variant(source.index, source.family, root)
        check_scheduler(root, source.family)
        if (root / names.MANIFEST).is_file() and (root / names.LORA).is_file():
            raise InputError(
                f"{root} is a bundle that keeps its LoRA in a file of its own", f"fuse it: --lora {root / names.LORA}"
            )
        lost = next((part for part, folder in source.parts.items() if not folder.is_dir()), None)
        if lost is not None:
            raise InputError(
                f"{root} has no folder {lost}, which its model_index.json names", "fetch the whole checkpoint again"
            )
        for part, folder in source.parts.items():
            if part not in source.family.components:
                check_component(folder)
        for own in source.of_experts():
            _check_network(own)
        return source
    from dcgen_convert.checkpoint.imported import import_source

    return import_source(name, root or path, revision, base=base, loras=loras, home=home, offline=offline)


def _check_network(source: Source) -> None:
    """InputError for a network that lacks tensors or has others than its config says."""
    for module in (source.family.embedder, source.family.head):
        if f"{module}.weight" not in source.tensors:
            raise InputError(
                f"{source.transformer} lacks {module}.weight, which every {source.family.name} model has",
                "is the checkpoint complete?",
            )
    require_agreement(
        source.config,
        {name: entry.shape for name, entry in source.tensors.items()},
        source.family.model_class,
        source.transformer,
        "is the checkpoint complete, and is its config the right one?",
        "fetch the checkpoint again",
    )


def is_plain(root: Path) -> bool:
    """Whether diffusers can load a folder as it is, with weights that can be trained and merged.

    A folder without model_index.json counts as plain, unless it is a transformer's own: so the caller refuses it with
    the right message.
    """
    source = Source(str(root), root)
    if not (root / "model_index.json").is_file():
        config = root / "config.json"
        return not config.is_file() or families.recognise(read_object(config)) is None
    folders = [folder for folder in source.parts.values() if folder.is_dir()]
    named = all(_is_named_plainly(folder) for folder in folders)
    family = families.family_of(source.config, root, source.index)
    tensors = [pair for own in source.of_experts() for pair in own.tensors.items()]
    odd = any(name.endswith((*SCALES, *PACKED)) or name in family.unused for name, _ in tensors)
    return named and not odd and all(entry.dtype in DENSE for _, entry in tensors)


def _is_named_plainly(folder: Path) -> bool:
    """Whether no file that counts is a precision variant, and no index of lost shards lies beside the weights."""
    plan = plan_copy(folder)
    stray = {path.name for path in folder.glob("*.safetensors.index.json")} - plan.keys()
    return not stray and all(name == copied for name, copied in plan.items())
