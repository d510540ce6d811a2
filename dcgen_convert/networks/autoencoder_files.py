"""Autoencoders that are not a diffusers folder yet.

These are: a single file, the first K channels of structured latents, and latents with a scale per channel. Each is
rewritten as an ordinary folder, so that no other module has to know about it.

C latent channels, K <= C of them in use, W width of the innermost level, f compression.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcgen_convert.checkpoint import trust
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import atomic_save, fresh_folder, once, read_json, read_object, sha256, write_json
from dcgen_convert.families import catalog, deep_autoencoders
from dcgen_convert.networks import video_weights

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX, PICKLE = catalog.WEIGHTS
NAME = re.compile(r"(.+?(?:\.safetensors|\.pt))(?::(.+?))??(?::([0-9A-Fa-f]{64}))?")  # FILE[:CONFIG][:SHA256]
TEXTS = ("README*", "LICENSE*")
NORMALISED = "autoencoder"  # folder in the stage `latents`


def is_file(name: str) -> bool:
    """Whether ``name`` is FILE.safetensors[:CONFIG], FILE.pt:CONFIG[:SHA256], or an alias that needs such a file."""
    return NAME.fullmatch(name) is not None or _alias_of_file(name) is not None


def file_and_config(name: str) -> tuple[Path, dict[str, Any]]:
    """The file of FILE.safetensors[:CONFIG] or FILE.pt:CONFIG[:SHA256], and its config.

    CONFIG is an alias, which stands for its published config, or a folder with a config.json. Without CONFIG it is the
    config.json beside the file.

    Raises:
        InputError: there is no such file, nothing says which autoencoder it is, a pickle of anything but DC-AE-V or
            without a SHA-256, or an alias without its file.
    """
    path, config, _ = _read(name)
    return path, config


def _read(name: str) -> tuple[Path, dict[str, Any], str | None]:
    """(file, config, stated SHA-256 of a pickle)."""
    found, entry = NAME.fullmatch(name), _alias_of_file(name)
    if found is None:
        raise InputError(
            f"the weights of {name} are published as a pickle, which is not fetched",
            f"fetch it from {(entry and entry.repo) or 'its authors'}, and give --ae FILE.pt:{name}:SHA256",
        )
    path, which, stated = Path(found[1]).expanduser(), found[2] or "", found[3]
    if not path.is_file():
        raise InputError(f"no such file: {path}", "check the path given with --ae")
    config = _config(path, which) if which or path.suffix == SUFFIX else {}
    if path.suffix == SUFFIX:
        return path, config, None
    if config.get("_class_name") != trust.VIDEO_CLASS:
        raise InputError(
            f"{path} is a pickle checkpoint, which is refused because loading it runs code",
            f"convert it to safetensors first; a DC-AE-V is given as {path.name}:ALIAS:SHA256",
        )
    entry = catalog.AUTOENCODERS.get(which)
    stated = stated or (entry.sha256 if entry else None)
    if stated is None:
        raise InputError(
            f"{path} is a pickle, which is read only when its SHA-256 is stated",
            f"take it from where the authors publish the file, and give --ae {path.name}:{which}:SHA256",
        )
    return path, config, stated.lower()


def _config(path: Path, which: str) -> dict[str, Any]:
    """Of an alias, of a folder, or beside the file."""
    if which in catalog.AUTOENCODERS:
        return published_config(which)
    folder = Path(which).expanduser() if which else path.parent
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{path} does not say which autoencoder it is: `in` and `mix` share their tensor names, but not their "
            "scaling factor"
            if not which
            else f"{which} is neither an alias nor a folder with a config.json",
            f"give it as {path.name}:dc-ae-f32-in, another alias, or {path.name}:FOLDER with a config.json",
        )
    return read_object(folder / "config.json")


def _alias_of_file(name: str) -> catalog.AutoencoderEntry | None:
    entry = catalog.AUTOENCODERS.get(name)
    return entry if entry and entry.given else None


def published_config(alias: str) -> dict[str, Any]:
    """Config of a published DC-AE 1.0 of the kinds `in`, `mix` and `sana-1.x`, or of a DC-AE-V.

    Raises:
        InputError: another kind; diffusers cannot translate the tensor names of its original files.
    """
    entry = catalog.AUTOENCODERS[alias]
    if not entry.given and deep_autoencoders.kind_of(entry) not in (deep_autoencoders.IN, deep_autoencoders.SANA):
        raise InputError(
            f"the original files of {alias} cannot be read: diffusers cannot translate their tensor names",
            f"use --ae {alias}, which takes {entry.repo or 'the shipped folder'}, or give a folder with a config.json",
        )
    return deep_autoencoders.config_of(entry)


def folder_of_file(name: str, work: Path) -> Path:
    """Write the file of ``name``, as `file_and_config` takes it, as a folder in ``work``, unless it is there."""
    path, config, stated = _read(name)
    return once(
        work / "autoencoder",
        {"file": sha256(path), "config": config},
        partial(write_file_as_folder, path, config, stated=stated),
    )


def prefix_of_folder(origin: Path, channels: int, work: Path) -> Path:
    """Write the first ``channels`` latent channels of the autoencoder ``origin`` as a folder in ``work``; return it."""
    made_of = {path.name: sha256(path) for path in sorted(origin.glob(f"*{SUFFIX}"))} | {"channels": channels}
    return once(work / f"autoencoder-{channels}", made_of, lambda folder: write_rewritten(origin, folder, channels))


def write_file_as_folder(path: Path, config: dict[str, Any], output: Path, stated: str | None = None) -> None:
    """Write the single file ``path`` as the folder ``output`` of the class that ``config`` names.

    The tensor names are those of the class or those of the authors.

    Args:
        stated: the SHA-256 of a pickle.

    Raises:
        InputError: the tensors do not fit the config; the message names the first tensor that differs. Or a pickle
            with another SHA-256, or with more than tensors in it.
    """
    import torch
    from diffusers import AutoencoderDC
    from diffusers.loaders.single_file_utils import convert_autoencoder_dc_checkpoint_to_diffusers
    from safetensors.torch import load_file

    from dcgen_convert.networks.autoencoder_dc_video import AutoencoderDCVideo

    video = config.get("_class_name") == trust.VIDEO_CLASS
    with torch.device("meta"):
        model = (AutoencoderDCVideo if video else AutoencoderDC).from_config(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tensors = video_weights.read_pickle(path, stated) if path.suffix == PICKLE else load_file(path)
    if tensors.keys() != shapes.keys():
        translate = video_weights.translated if video else convert_autoencoder_dc_checkpoint_to_diffusers
        tensors = translate(tensors)
    tensors = {
        name: value for name, value in tensors.items() if not name.endswith("num_batches_tracked") or name in shapes
    }
    for name in sorted(shapes.keys() | tensors.keys()):
        found, wanted = tensors.get(name), shapes.get(name)
        if found is None or tuple(found.shape) != wanted:
            raise InputError(
                f"{path} holds {name} as {'nothing' if found is None else tuple(found.shape)}, its config asks for "
                f"{wanted or 'nothing'}",
                "is it the right config? give it as FILE:ALIAS or FILE:FOLDER",
            )
    _write(tensors, config, output)


def write_rewritten(folder: Path, output: Path, channels: int | None = None, rms: Tensor | None = None) -> None:
    """Write the AutoencoderDC ``folder`` as another one: its latents are the first ``channels`` divided by ``rms``.

    Encoding: z'_c = z_c / rms_c for c < K. Decoding takes the channels beyond K as zero, as DC-AE 1.5 does when it
    trains its structured latents (arXiv 2508.00413). Both maps are linear, so they go into the weights of
    encoder.conv_out and decoder.conv_in. The shortcuts beside these two go into the weights too, because their groups
    depend on C: one is a mean over W / C channels, the other repeats each channel W / C times.

    Args:
        channels: K; None: all.
        rms: (K,) scale of every channel; the new scaling_factor is 1. None: the latents keep their scale.
    """
    import torch
    from safetensors.torch import load_file

    config = read_json(folder / "config.json")
    tensors = {name: value for path in sorted(folder.glob(f"*{SUFFIX}")) for name, value in load_file(path).items()}
    c = config["latent_channels"]
    k = channels or c
    scale = torch.ones(k, dtype=torch.float64) if rms is None else rms.double().cpu()
    out, bias, into = (
        tensors[name] for name in ("encoder.conv_out.weight", "encoder.conv_out.bias", "decoder.conv_in.weight")
    )
    dtype = out.dtype
    out, bias, into = out.double(), bias.double(), into.double()  # out (C, W, 3, 3), into (W, C, 3, 3)
    if config.get("encoder_out_shortcut", True):
        group = out.shape[1] // c
        out[:, :, 1, 1] += torch.eye(c, dtype=torch.float64).repeat_interleave(group, 1) / group
    if config.get("decoder_in_shortcut", True):
        into[:, :, 1, 1] += torch.eye(c, dtype=torch.float64).repeat_interleave(into.shape[0] // c, 0)
    tensors["encoder.conv_out.weight"] = (out[:k] / scale[:, None, None, None]).to(dtype)
    tensors["encoder.conv_out.bias"] = (bias[:k] / scale).to(dtype)
    tensors["decoder.conv_in.weight"] = (into[:, :k] * scale[:, None, None]).to(dtype)
    config = {**config, "latent_channels": k, "encoder_out_shortcut": False, "decoder_in_shortcut": False}
    texts = [path for pattern in TEXTS for path in folder.glob(pattern)]
    _write(tensors, config if rms is None else {**config, "scaling_factor": 1.0}, output, texts)


def _write(tensors: dict[str, Tensor], config: dict[str, Any], output: Path, texts: Iterable[Path] = ()) -> None:
    atomic_save(tensors, fresh_folder(output) / f"diffusion_pytorch_model{SUFFIX}", {"format": "pt"})
    for path in texts:
        shutil.copyfile(path, output / path.name)
    write_json(output / "config.json", config)
