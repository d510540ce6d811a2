"""Whose Python a pipeline folder would run.

A diffusers folder can bring Python files of its own, and its JSON files decide which of them run. Without the user's
word only the code of diffusers, of transformers and of this program runs: everything else is refused before it is
loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_object, sha256

LIBRARIES = ("diffusers", "transformers")
# A diffusers class that lives beside its pipeline.
SAFETY_CHECKER = ("stable_diffusion", "StableDiffusionSafetyChecker")
ADAPTER_CLASS, VIDEO_CLASS, LTX_CLASS = "AutoencoderDCAdapter", "AutoencoderDCVideo", "AutoencoderLTX2ForWan"
# Begin of the module name of an in-bundle autoencoder -> its class.
CARRIED = {
    "autoencoder_dc_adapter_": ADAPTER_CLASS,
    "autoencoder_dc_video_": VIDEO_CLASS,
    "autoencoder_ltx2_": LTX_CLASS,
}
# Module name of an in-bundle autoencoder -> sha256 of every file that this program has written under that name.
ADAPTERS = {
    "autoencoder_dc_adapter_v1": ("155ea1f9545d982f2e5d0bf03bc34d6dd148dc440f6b0160d9241d26822ec705",),
    "autoencoder_dc_adapter_v2": (
        "3875d957b43d3f585b3fda60b8b1e3a85416641f17eed907fb07b23a96292a34",
        "8954b76bca7e4ba51146b5a99df67646a08764ed1a7dc397054412680e676b75",  # with the licence's line
    ),
    "autoencoder_dc_adapter_v3": ("7a1e401a45df3677b51c6325346c8a0fa286194d1f27a029824ed8981dfaabfc",),
    "autoencoder_dc_adapter_v4": ("3274b246d1401e5263977e7a80e4cef56c85504cced59dab381ced3ea650c7a3",),
    "autoencoder_dc_video_v1": ("91587abce81b14cde6f5e2c5d2b1d53ab93eec4692dc44cba08ab28a1d24abfc",),
    "autoencoder_dc_video_v2": ("e02652af1d3cf85a11649ea2b5bce6f37085e7abefc2742a94135a11d385aea4",),
    "autoencoder_dc_video_v3": ("940d1ab4c4a1bc3de74bf3ef1b5ee68b9d3c1eed7858d1c0608eac7b3d2c5764",),
    "autoencoder_dc_video_v4": ("5b8304cdea69bb90294c4621daf50cdf6a1b5e7e86773b2bab551d02e5091da4",),
    "autoencoder_ltx2_v1": ("7952588887d09e34e2d737cff02b62d7b28eee91631071b27f5912345f4e7fae",),
}
CODE = (".py", ".pyc", ".pyd", ".so")
FOLLOWS_AUTO_MAP = re.compile(r"Auto(?!encoder)|\w*Processor$")  # classes that look for another class in a JSON file
HINT = "--trust-remote-code runs it; give the flag only when you trust the author of these files"


def is_component(value: Any) -> bool:
    """Whether a model_index.json value names a class to load, as against a setting or an absent optional part."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def components(index: Mapping[str, Any]) -> dict[str, list[str]]:
    """Part -> (library, class) of all that a model_index.json names as parts."""
    return {name: value for name, value in index.items() if not name.startswith("_") and is_component(value)}


def is_adapter(value: Any) -> bool:
    """Whether a model_index.json value names this program's own autoencoder class."""
    return is_component(value) and value[0] in ADAPTERS and value[1] == class_of(value[0])


def class_of(module: str) -> str:
    """The class in one of the ``ADAPTERS``."""
    return next(found for begin, found in CARRIED.items() if module.startswith(begin))


def is_custom(value: Any) -> bool:
    """Whether a model_index.json value names a class of neither library, and not this program's adapter."""
    return (
        is_component(value) and value[0] not in LIBRARIES and tuple(value) != SAFETY_CHECKER and not is_adapter(value)
    )


def is_own(file: Path) -> bool:
    """Whether ``file`` is an adapter exactly as this program has written it."""
    return file.suffix == ".py" and file.stem in ADAPTERS and sha256(file) in ADAPTERS[file.stem]


def require(root: Path, index: Mapping[str, Any], hint: str = HINT) -> None:
    """InputError when loading the pipeline folder ``root`` would run code that is foreign.

    Args:
        index: the folder's model_index.json.
        hint: what the user can do.
    """
    found = foreign(root, index)
    if found:
        raise InputError(f"{root} asks for code that this program does not know: {'; '.join(found)}", hint)


def foreign(root: Path, index: Mapping[str, Any]) -> list[str]:
    """One sentence for every part of the pipeline folder ``root`` that would run foreign code; no code is run."""
    found = []
    if isinstance(index.get("_class_name"), list):
        found.append(f"model_index.json takes the pipeline itself from {index.get('_class_name')}")
    for name, (library, class_name) in components(index).items():
        found += _of_component(root, name, library, class_name)
    return found


def foreign_files(root: Path) -> list[Path]:
    """The code files under ``root`` that this program has not written."""
    return sorted(path for path in root.rglob("*") if path.suffix in CODE and path.is_file() and not is_own(path))


def _of_component(root: Path, name: str, library: str, class_name: str) -> Iterator[str]:
    folder = root / name
    file = folder / f"{library}.py"
    if name == "vae" and is_adapter([library, class_name]):
        if file.is_file() and not is_own(file):
            yield describe(root, file)
    elif is_custom([library, class_name]) or library in ADAPTERS:
        yield (
            f"model_index.json takes {name} from {library}.{class_name}, which is part of neither "
            f"{' nor '.join(LIBRARIES)}"
        )
    elif file.is_file():  # diffusers prefers it to the installed library of that name
        yield describe(root, file)
    elif "Pipeline" in class_name:
        yield f"model_index.json names the pipeline {class_name} as its part {name}"
    for path in sorted(path for path in folder.glob("*config.json") if not path.name.startswith(".")):
        for key in _calls(read_object(path), bool(FOLLOWS_AUTO_MAP.match(class_name))):
            yield f"{name}/{path.name} names code under {key}"


def describe(root: Path, file: Path) -> str:
    """The sentence for a foreign code file under ``root``."""
    name = file.relative_to(root).as_posix()
    if file.parent.name == "__pycache__":  # it could hold other code than the file that it stands for
        return f"{name} is bytecode that Python has kept of a file that it ran: delete its folder"
    if file.stem in ADAPTERS:
        return f"{name} differs from every version of it that this program has written"
    return f"{name} is code that this program has not written"


def _calls(config: Mapping[str, Any], followed: bool) -> Iterator[str]:
    """Keys of a config by which a library would load code: `auto_map`, and attention from a hub repository.

    Args:
        followed: whether the class that reads ``config`` obeys an `auto_map` at its top; the classes of inner models
            do.
    """
    for key, value in config.items():
        from_hub = key.endswith("attn_implementation") and "/" in str(value)
        if from_hub or (followed and key == "auto_map"):
            yield key
        elif isinstance(value, dict) and key != "auto_map":
            yield from (f"{key}.{inner}" for inner in _calls(value, True))
