"""LoRA files of other tools, matched with a transformer's weights by name.

Three kinds of names are known: diffusers' and PEFT's, the original layout's, and kohya's with underscores.
dW = scale (alpha / rank) up @ down. An update of a fused linear is split at the rows of its key map.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dcgen_convert.checkpoint import keymap
from dcgen_convert.checkpoint.headers import Entry, read_header
from dcgen_convert.checkpoint.held import FLOATS, PREFIXES, Change, Held
from dcgen_convert.checkpoint.key_tables import TABLES
from dcgen_convert.checkpoint.keymap import LISTED, Cut, Shape
from dcgen_convert.checkpoint.merge import METADATA, Update
from dcgen_convert.core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

DOWN = re.compile(r"\.(lora_A(\.default)?|lora_down|lora\.down)\.weight$")
UP = re.compile(r"\.(lora_B(\.default)?|lora_up|lora\.up)\.weight$")
ALPHA = ".alpha"
WRAPPER = "base_model.model."
KOHYA = ("lora_unet_", "lora_transformer_")
TEXT = ("text_encoder", "lora_te", "te.", "te1.", "te2.", "text_encoders.")
PATTERNS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class Target:
    """Rows ``cut`` of a weight, which take rows [first, ...) of the update's ``up``."""

    cut: Cut
    first: int


@dataclass(frozen=True)
class Pair:
    """One low-rank update of a file. alpha: None where the file states none; then alpha is the rank."""

    module: str
    down: Held
    up: Held
    alpha: float | Held | None  # a number, or the tensor that holds it
    targets: tuple[Target, ...] = ()


@dataclass(frozen=True)
class Lora:
    """A LoRA file, matched. text: number of its tensors for text encoders, which are not merged."""

    path: Path
    scale: float
    pairs: tuple[Pair, ...]
    text: int

    def updates(self) -> dict[str, list[tuple[int, Update]]]:
        """Weight -> (first row, update of the rows from there on), read from the file."""
        found: dict[str, list[tuple[int, Update]]] = {}
        for pair in self.pairs:
            down, up = (held.read(0, held.rows).float() for held in (pair.down, pair.up))
            alpha = pair.alpha.read(0, 1).item() if isinstance(pair.alpha, Held) else pair.alpha
            rank = len(down)
            scale = self.scale * (rank if alpha is None else alpha) / rank
            if not (down.isfinite().all() and up.isfinite().all() and math.isfinite(scale)):
                raise InputError(f"{self.path} holds NaN or infinite values in {pair.module}", "fetch it again")
            update = Update(down, up, scale)
            for target in pair.targets:
                rows = target.cut.stop - target.cut.start
                part = replace(update, up=up[target.first : target.first + rows])
                found.setdefault(target.cut.name, []).append((target.cut.start, part))
        return found


def parse(text: str) -> tuple[Path, float]:
    """FILE[:scale] -> (file, scale). InputError when the file is not there or the scale is no finite number."""
    name, colon, number = text.rpartition(":")
    if not colon or Path(text).expanduser().is_file():
        name, number = text, "1"
    path = Path(name).expanduser()
    try:
        scale = float(number)
    except ValueError:
        path, scale = Path(text).expanduser(), 1.0
    if not path.is_file():
        raise InputError(f"--lora {text}: {path} is no file", "give FILE or FILE:scale")
    if not abs(scale) < float("inf"):
        raise InputError(f"--lora {text}: the scale must be a finite number", "for example --lora FILE:0.8")
    return path, scale


def read(text: str, family: str, shapes: Mapping[str, Shape]) -> Lora:
    """The LoRA file of an option value, matched with weights of ``shapes`` (diffusers' names), from its header.

    Raises:
        InputError: no LoRA, another kind than plain LoRA, weights that the transformer lacks (all are counted), or
            shapes that do not fit.
    """
    path, scale = parse(text)
    entries, metadata = read_header(path)
    pairs, aside = _pairs(path, entries, _alpha(path, metadata))
    if not pairs:
        raise InputError(f"{path} holds no LoRA of a transformer", f"dcgen-convert inspect {path}")
    places = _places(family, shapes, [pair.module for pair in pairs])
    lost = [pair.module for pair in pairs if pair.module not in places]
    if lost:
        more = f" and {len(lost) - LISTED} more" if len(lost) > LISTED else ""
        raise InputError(
            f"merged {len(pairs) - len(lost)} of {len(pairs)} LoRA updates of {path}: the {family} transformer has no "
            f"{', '.join(lost[:LISTED])}{more}",
            "is the LoRA made for this model?",
        )
    return Lora(path, scale, tuple(_fitted(path, pair, *places[pair.module]) for pair in pairs), aside)


def _pairs(path: Path, entries: Mapping[str, Entry], alpha: float | None) -> tuple[list[Pair], int]:
    """(the updates of a file in name order, number of tensors for text encoders)."""
    mine = {name: entry for name, entry in entries.items() if not name.removeprefix(WRAPPER).startswith(TEXT)}
    downs = {DOWN.sub("", name): name for name in mine if DOWN.search(name)}
    ups = {UP.sub("", name): name for name in mine if UP.search(name)}
    alphas = {name.removesuffix(ALPHA) for name in mine if name.endswith(ALPHA)}
    other = [name for name in mine if not (DOWN.search(name) or UP.search(name) or name.endswith(ALPHA))]
    if other:
        raise InputError(f"{path}: {other[0]} is no plain LoRA weight (down, up, alpha), and only those can be merged")
    single = sorted((downs.keys() ^ ups.keys()) | (alphas - downs.keys()))
    if single:
        raise InputError(f"{path}: {single[0]} lacks its down or up weight", "fetch it again")
    pairs = []
    for module, down in sorted(downs.items()):
        low, high = entries[down].shape, entries[ups[module]].shape
        if any(len(shape) < 2 or 0 in shape for shape in (low, high)) or low[0] != high[1]:
            raise InputError(f"{path}: down and up of {module} are {list(low)} and {list(high)}, which do not multiply")
        own = _held(path, f"{module}{ALPHA}", entries) if module in alphas else alpha
        if isinstance(own, Held) and math.prod(own.shape) != 1:
            raise InputError(f"{path}: {module}{ALPHA} is {list(own.shape)}, one number is wanted", "fetch it again")
        pairs.append(Pair(_plain(module), _held(path, down, entries), _held(path, ups[module], entries), own))
    if len({pair.module for pair in pairs}) < len(pairs):
        raise InputError(f"{path} holds two updates of one weight under different prefixes")
    return pairs, len(entries) - len(mine)


def _held(path: Path, name: str, entries: Mapping[str, Entry]) -> Held:
    entry = entries[name]
    if entry.dtype not in FLOATS:
        raise InputError(f"{path} holds {name} as {entry.dtype}, which is no floating-point number", "fetch it again")
    return Held(entry, entry.shape, entry.dtype)


def _plain(module: str) -> str:
    """A module's name without the prefixes that tools put before it."""
    module = module.removeprefix(WRAPPER)
    return next((module.removeprefix(prefix) for prefix in (*PREFIXES, *KOHYA) if module.startswith(prefix)), module)


def _alpha(path: Path, metadata: Mapping[str, str]) -> float | None:
    """alpha of all updates, as diffusers writes it into the metadata (there as alpha and rank); None: not stated."""
    if not isinstance(metadata, Mapping) or METADATA not in metadata:
        return None
    try:
        config = {
            key.rpartition(".")[2]: value
            for key, value in json.loads(metadata[METADATA]).items()
            if "text_encoder" not in key
        }
        odd = [key for key in PATTERNS if config.get(key)]
        alpha = float(config["lora_alpha"]) if "lora_alpha" in config else None
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise InputError(f"{path} has damaged LoRA metadata: {error}", "fetch it again") from error
    if odd:
        raise InputError(f"{path} uses {odd[0]}: only plain LoRA can be merged")
    return alpha


def _places(family: str, shapes: Mapping[str, Shape], modules: list[str]) -> dict[str, tuple[Shape, tuple[Cut, ...]]]:
    """Module, as the file calls it -> the weight's shape and the rows of diffusers' tensors that make it up."""
    known = {
        name: (shape, (Cut(name, 0, shape[0]),)) for name, shape in shapes.items() if shape and name.endswith(".weight")
    }
    names = _spelled(known)
    if any(module not in names for module in modules):
        for layout in (layout for owner, layout in TABLES if owner == family):
            table = keymap.find(family, layout)
            assert table is not None, f"{family} has no key map for {layout}"
            original = table.backward(shapes)
            names = (
                _spelled({name: (s.shape, s.cuts) for name, s in original.items() if name.endswith(".weight")}) | names
            )
    return {module: names[module] for module in modules if module in names}


def _spelled(weights: Mapping[str, tuple]) -> dict[str, tuple]:
    """Module -> value, with dots and with underscores."""
    plain = {name.removesuffix(".weight"): value for name, value in weights.items()}
    return {name.replace(".", "_"): value for name, value in plain.items()} | plain


def _fitted(path: Path, pair: Pair, shape: Shape, cuts: tuple[Cut, ...]) -> Pair:
    """``pair`` with the rows that it changes; InputError when it does not fit a weight of ``shape``."""
    down, up = pair.down.shape, pair.up.shape
    inputs, wanted = down[1:], shape[1:]
    same = inputs == wanted or (all(n == 1 for n in inputs[1:]) and inputs[:1] == wanted)
    if up[0] != shape[0] or not same or any(n != 1 for n in up[2:]):
        raise InputError(
            f"{path}: the update of {pair.module} is {list(up)} x {list(down)}, the weight is {list(shape)}"
        )
    targets, first = [], 0
    for cut in cuts:
        targets.append(Target(cut, first))
        first += cut.stop - cut.start
    return replace(pair, targets=tuple(targets))


class Merger:
    """Adds the updates of several files to the rows of each weight; keeps the largest change."""

    def __init__(self, loras: tuple[Lora, ...]) -> None:
        self.largest = 0.0
        self._updates: dict[str, list[tuple[int, Update]]] = {}
        for lora in loras:
            for name, updates in lora.updates().items():
                self._updates.setdefault(name, []).extend(updates)

    def of(self, name: str) -> Change | None:
        """What to apply to the rows of that weight, or None."""
        updates = self._updates.get(name)
        return partial(self._merged, updates) if updates else None

    def _merged(self, updates: list[tuple[int, Update]], first: int, rows: Tensor) -> Tensor:
        """(n, ...) float32 rows from row ``first`` on, with their part of every update added."""
        total = rows.new_zeros(rows.shape)
        for start, update in updates:
            low, high = max(first, start), min(first + len(rows), start + len(update.up))
            if low < high:
                part = replace(update, up=update.up[low - start : high - start])
                total[low - first : high - first] += part.delta(rows[low - first : high - first])
        self.largest = max(self.largest, total.abs().max().item())
        return rows + total
