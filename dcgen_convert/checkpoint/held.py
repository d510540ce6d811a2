"""Tensors as a file holds them (plain, 8-bit with or without scales, or GGUF blocks), and their rows as numbers.

Only headers are read, until somebody asks for rows.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dcgen_convert.checkpoint.headers import FLOAT8, Entry, read_header, read_weights
from dcgen_convert.checkpoint.stream import CHUNK, Copied, Item, require_finite
from dcgen_convert.checkpoint.tensors import as_bytes
from dcgen_convert.core.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Change = Callable[[int, "Tensor"], "Tensor"]  # (number of the first row, float32 rows) -> changed rows
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.")
# What all-in-one files carry beside the transformer; it comes from the base instead.
COMPANIONS = (
    "text_encoders.",
    "text_encoder.",
    "vae.",
    "first_stage_model.",
    "cond_stage_model.",
    "conditioner.",
    "model_ema.",
)
# The noise schedule that a Stable Diffusion file of the original code repeats.
SCHEDULE = re.compile(
    r"betas|((sqrt|log)_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|posterior_(mean_coef[12]|variance|"
    r"log_variance_clipped)"
)
SCALES = (".scale_weight", ".weight_scale")
# Of float8 matrix products, about the product and not the weight.
ACTIVATIONS = (".scale_input", ".input_scale", ".comfy_quant")
MARKS = ("scaled_fp8",)
FLOATS = ("F64", "F32", "F16", "BF16", *FLOAT8)
INTEGERS = {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}
UPCAST = "BF16"
LOSSLESS = {"F32": "F32", "F16": "F16", "BF16": "BF16"}  # GGUF formats whose numbers fit a dtype as they are
LOSSES = {
    "F8_E4M3": "float8 e4m3: they become bfloat16, but keep 3 bits of mantissa (each up to 6 % off the original "
    "weight)",
    "F8_E4M3 scaled": "scaled float8 e4m3: they become bfloat16, but keep 3 bits of mantissa (each up to 6 % off the "
    "original weight)",
    "F8_E5M2": "float8 e5m2: they become bfloat16, but keep 2 bits of mantissa (each up to 12 % off the original "
    "weight)",
    "F8_E5M2 scaled": "scaled float8 e5m2: they become bfloat16, but keep 2 bits of mantissa (each up to 12 % off "
    "the original weight)",
}
GGUF_LOSS = "GGUF {}: they become bfloat16, but what that format rounded away stays lost"
# A leaf that only a packed format has -> who packs so.
PACKED = {
    ".qweight": "nunchaku or GPTQ",
    ".wscales": "nunchaku",
    ".weight_scale_2": "NVFP4",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes 8-bit",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes NF4",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes FP4",
}


@dataclass(frozen=True)
class Held:
    """One tensor in a file.

    Attributes:
        entry: where its bytes lie.
        dtype: the dtype in which its numbers are written.
        scale: the factor of an 8-bit tensor; None: it has none.
        gguf: its block format; None: it has none.
    """

    entry: Entry
    shape: tuple[int, ...]
    dtype: str
    scale: Entry | None = None
    gguf: str | None = None

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def plain(self) -> bool:
        """Whether its bytes can be taken as they are."""
        return self.gguf is None and self.dtype == self.entry.dtype

    @property
    def row_bytes(self) -> int:
        return (self.entry.end - self.entry.start) // max(self.rows, 1)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop), (stop - start, ...): as stored when plain, else float32, not yet rounded to `dtype`."""
        import torch

        shape = (stop - start, *self.shape[1:])
        if self.gguf is not None:
            return self._dequantised(self.gguf, start, stop).reshape(shape)
        data = bytearray(_bytes_of(self.entry, start * self.row_bytes, stop * self.row_bytes))
        stored = torch.frombuffer(data, dtype=torch_dtype(self.entry.dtype)).reshape(shape)
        if self.plain:
            return stored
        numbers = stored.float()
        if self.scale is not None:
            factors = torch.frombuffer(bytearray(_bytes_of(self.scale)), dtype=torch_dtype(self.scale.dtype)).float()
            factors = factors[start:stop] if len(factors) == self.rows > 1 else factors
            numbers = numbers * factors.reshape(-1, *[1] * (len(shape) - 1))
        return numbers

    def _dequantised(self, kind: str, start: int, stop: int) -> Tensor:
        from dcgen_convert.checkpoint.gguf_file import dequantise, whole_blocks

        if whole_blocks(kind, math.prod(self.shape[1:])):
            data = bytearray(_bytes_of(self.entry, start * self.row_bytes, stop * self.row_bytes))
            return dequantise(data, kind, stop - start)
        whole = dequantise(bytearray(_bytes_of(self.entry)), kind, 1)  # a block reaches over the end of a row
        return whole.reshape(self.rows, -1)[start:stop]


Part = tuple[Held, int, int]  # rows [start, stop) of a tensor


@dataclass(frozen=True)
class Contents:
    """A transformer's tensors by name.

    Attributes:
        aside: prefix of another component -> number of its tensors, which are not used.
        formats: block format or 8-bit kind -> number of tensors that have it.
    """

    path: Path
    tensors: dict[str, Held]
    aside: dict[str, int] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: held.shape for name, held in self.tensors.items()}

    def losses(self) -> list[str]:
        """What rounding to fewer bits has taken from the weights, one sentence per format."""
        return [
            f"{count} tensors are {LOSSES.get(kind, GGUF_LOSS.format(kind))}"
            for kind, count in sorted(self.formats.items())
        ]


@dataclass(frozen=True)
class Numbers(Item):
    """Rows whose bytes cannot be copied as they are: they are upcast, dequantised, or changed by ``update``."""

    name: str
    parts: tuple[Part, ...]
    update: Change | None = None

    def chunks(self) -> Iterator[memoryview]:
        for first, file, rows in row_chunks(self.parts):
            changed = rows if self.update is None else self.update(first, rows.float())
            data = as_bytes(changed, self.dtype)
            require_finite(data, self.dtype, self.name, file)
            yield data


def row_chunks(parts: tuple[Part, ...]) -> Iterator[tuple[int, Path, Tensor]]:
    """The rows of ``parts``, one below the other, in pieces of `CHUNK` bytes of float32: (number of the first row, file
    that holds them, rows as `Held.read` gives them).
    """
    done = 0
    for held, start, stop in parts:
        step = max(1, CHUNK // max(1, 4 * math.prod(held.shape[1:])))
        for first in range(start, stop, step):
            rows = held.read(first, min(first + step, stop))
            yield done, held.entry.file, rows
            done += len(rows)


def item_of(name: str, shape: tuple[int, ...], parts: list[Part], update: Change | None = None) -> Item:
    """What to write for a tensor that is a stack of rows of others."""
    first = parts[0][0]
    same = all(held.plain and held.dtype == first.dtype and held.entry.file == first.entry.file for held, _, _ in parts)
    if same and update is None:
        ranges = tuple((h.entry.start + a * h.row_bytes, h.entry.start + b * h.row_bytes) for h, a, b in parts)
        return Copied(first.dtype, shape, name, first.entry, ranges)
    if len({held.dtype for held, _, _ in parts}) > 1:
        raise InputError(f"{name} would be made of tensors of several dtypes", "is the checkpoint two in one?")
    return Numbers(first.dtype, shape, name, tuple(parts), update)


def read_contents(path: Path) -> Contents:
    """The transformer in a safetensors or GGUF file, or in a folder of safetensors shards, from headers alone.

    Raises:
        InputError: damaged, packed in a 4-bit format, not of floating point, or with tensors that belong to nothing.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        from dcgen_convert.checkpoint.gguf_file import read_gguf

        blocks = read_gguf(path)
        names, aside = split_names(blocks, path)
        tensors: dict[str, Held] = {}
        formats: Counter[str] = Counter()
        for short, name in names.items():
            entry, kind = blocks[name]
            if 0 in entry.shape:
                raise InputError(
                    f"{path} holds {name} {list(entry.shape)}, which is empty", "is the checkpoint complete?"
                )
            tensors[short] = Held(entry, entry.shape, LOSSLESS.get(kind, UPCAST), gguf=kind)
            if kind not in LOSSLESS:
                formats[kind] += 1
        return Contents(path, tensors, aside, dict(formats))
    entries = read_weights(path) if path.is_dir() else read_header(path)[0]
    return from_entries(path, entries)


def from_entries(path: Path, entries: Mapping[str, Entry]) -> Contents:
    """`read_contents` of tensors whose header is read."""
    refuse_packed(path, entries)
    names, aside = split_names(entries, path)
    scales = _scales(path, {short: entries[name] for short, name in names.items()})
    tensors: dict[str, Held] = {}
    formats: Counter[str] = Counter()
    for short, name in names.items():
        if short.endswith((*SCALES, *ACTIVATIONS)) or short in MARKS:
            continue
        entry = entries[name]
        if 0 in entry.shape:
            raise InputError(f"{path} holds {name} {list(entry.shape)}, which is empty", "is the checkpoint complete?")
        if entry.dtype not in FLOATS:
            raise InputError(
                f"{path} holds {name} as {entry.dtype}, which is no floating-point weight", "give the dense model"
            )
        scale = scales.pop(short.removesuffix(".weight"), None) if short.endswith(".weight") else None
        if entry.dtype in FLOAT8:
            tensors[short] = Held(entry, entry.shape, UPCAST, _checked_scale(scale, entry, name, path))
            formats[entry.dtype + (" scaled" if scale else "")] += 1
        else:
            if scale is not None:
                scales[short] = scale
            tensors[short] = Held(entry, entry.shape, entry.dtype)
    if scales:
        raise InputError(
            f"{path} has {len(scales)} scales without an 8-bit weight, first for {sorted(scales)[0]}",
            "is the checkpoint complete?",
        )
    return Contents(path, tensors, aside, dict(formats))


def _scales(path: Path, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Module -> scale of its 8-bit weight; InputError when a module has two."""
    scales: dict[str, Entry] = {}
    for name, entry in entries.items():
        leaf = next((leaf for leaf in SCALES if name.endswith(leaf)), None)
        if leaf is None:
            continue
        module = name.removesuffix(leaf)
        if module in scales:
            raise InputError(f"{path} holds two scales of {module}", "is the checkpoint two in one?")
        scales[module] = entry
    return scales


def refuse_packed(path: Path, names: Mapping[str, object]) -> None:
    """InputError for a checkpoint that is quantised to packed integers already."""
    for name in names:
        leaf = next((leaf for leaf in PACKED if name.endswith(leaf)), None)
        if leaf:
            raise InputError(
                f"{path} is already quantised ({PACKED[leaf]}: it holds {name}), and training or merging needs dense "
                "weights",
                "give the dense model",
            )


def split_names(names: Mapping[str, object], path: Path) -> tuple[dict[str, str], dict[str, int]]:
    """({name without its prefix: name in the file} of the transformer, tensors of other components by prefix)."""
    prefix = next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in names)), "")
    found: dict[str, str] = {}
    aside: Counter = Counter()
    for name in names:
        companion = next((start for start in COMPANIONS if name.startswith(start)), None)
        if companion:
            aside[companion.rstrip(".")] += 1
        elif prefix and SCHEDULE.fullmatch(name):
            aside["noise schedule"] += 1
        elif prefix and not name.startswith(prefix) and name not in MARKS:
            raise InputError(
                f"{path} holds {name} beside the tensors under {prefix}: what is it part of?",
                "take it out, or give the diffusers folder",
            )
        else:
            found[name.removeprefix(prefix)] = name
    return found, dict(aside)


def torch_dtype(name: str) -> torch.dtype:
    """torch dtype of a safetensors dtype name."""
    import torch

    plain = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", **FLOAT8}
    return getattr(torch, plain[name])


def number_of(entry: Entry) -> float:
    """The one number in a tensor of whatever dtype."""
    import torch

    dtype = getattr(torch, INTEGERS[entry.dtype]) if entry.dtype in INTEGERS else torch_dtype(entry.dtype)
    return float(torch.frombuffer(bytearray(_bytes_of(entry)), dtype=dtype).item())


def _checked_scale(scale: Entry | None, entry: Entry, name: str, path: Path) -> Entry | None:
    if scale is None:
        return None
    numbers = math.prod(scale.shape)
    if scale.dtype not in ("F32", "F16", "BF16") or numbers not in (1, entry.shape[0] if entry.shape else 1):
        raise InputError(
            f"{path}: the scale of {name} is {scale.dtype} {list(scale.shape)}, one number or one per row is wanted"
        )
    return scale


def _bytes_of(entry: Entry, start: int = 0, stop: int | None = None) -> bytes:
    """Bytes [start, stop) of a tensor; all of them by default."""
    count = (entry.end - entry.start if stop is None else stop) - start
    with open(entry.file, "rb") as file:
        file.seek(entry.start + start)
        data = file.read(count)
    if len(data) != count:
        raise InputError(f"{entry.file} ends within a tensor", "fetch it again")
    return data
