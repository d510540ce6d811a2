"""LoRA files of other tools, matched with a transformer's weights by name.

Four kinds of names are known: diffusers' and PEFT's, the original layout's, kohya's with underscores, and XLabs'.
dW = scale (alpha / rank) up @ down; `lora_strength` finds alpha. An update of a fused linear is split at the rows of
its key map. Some files hold an update twice, for fused and for split linears: it is applied once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dcgen_convert.checkpoint import keymap
from dcgen_convert.checkpoint.headers import Entry, read_header
from dcgen_convert.checkpoint.held import FLOATS, PREFIXES, Change, Held, number_of
from dcgen_convert.checkpoint.key_tables import TABLES
from dcgen_convert.checkpoint.keymap import LISTED, Cut, Shape
from dcgen_convert.checkpoint.lora_strength import Stated, stated
from dcgen_convert.checkpoint.updates import Update
from dcgen_convert.core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

DOWN = re.compile(r"(\.(lora_A(\.default)?|lora_down|lora\.down)|(?<=_lora|lora[12])\.down)\.weight$")
UP = re.compile(r"(\.(lora_B(\.default)?|lora_up|lora\.up)|(?<=_lora|lora[12])\.up)\.weight$")
XLABS = {  # block of FLUX, in XLabs' words and in diffusers' -> update -> the linears whose outputs it stacks
    ("double_blocks", "transformer_blocks"): {
        "qkv_lora1": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "qkv_lora2": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "proj_lora1": ("attn.to_out.0",),
        "proj_lora2": ("attn.to_add_out",),
    },
    ("single_blocks", "single_transformer_blocks"): {
        "qkv_lora": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "proj_lora": ("proj_out",),
    },
}
ALPHA = ".alpha"
WRAPPER = "base_model.model."
KOHYA = ("lora_unet_", "lora_transformer_")
TEXT = ("text_encoder", "lora_te", "te.", "te1.", "te2.", "text_encoders.")
SAME = 0.05  # |difference| / |update| up to which two updates of the same rows are one update that was written twice


@dataclass(frozen=True)
class Target:
    """Rows ``cut`` of a weight, which take rows [first, ...) of the update's ``up``.

    repeats: whether another update of the same file has these rows already.
    """

    cut: Cut
    first: int
    repeats: bool = False

    @property
    def rows(self) -> slice:
        """Of the update's ``up``."""
        return slice(self.first, self.first + self.cut.stop - self.cut.start)


@dataclass(frozen=True)
class Pair:
    """One low-rank update of a file.

    Attributes:
        alpha: a number, or the tensor that holds it; None where the file states none: then alpha is the rank.
        rslora: whether alpha is divided by the root of the rank.
    """

    module: str
    down: Held
    up: Held
    alpha: float | Entry | None
    rslora: bool = False
    targets: tuple[Target, ...] = ()

    def strength(self, rank: int) -> float:
        """The factor of up @ down."""
        if self.alpha is None:
            return 1.0
        alpha = number_of(self.alpha) if isinstance(self.alpha, Entry) else self.alpha
        return alpha / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True)
class Lora:
    """A LoRA file, matched.

    Attributes:
        text: number of its tensors for text encoders, which are not merged.
        config: the adapter_config.json beside it, if that says how strong it is.
    """

    path: Path
    scale: float
    pairs: tuple[Pair, ...]
    text: int
    config: Path | None = None

    def updates(self) -> dict[str, list[tuple[int, Update]]]:
        """Weight -> (first row, update of the rows from there on), read from the file."""
        found: dict[str, list[tuple[int, Update]]] = {}
        for pair in self.pairs:
            down, up = (held.read(0, held.rows).float() for held in (pair.down, pair.up))
            scale = self.scale * pair.strength(len(down))
            if not (down.isfinite().all() and up.isfinite().all() and math.isfinite(scale)):
                raise InputError(f"{self.path} holds NaN or infinite values in {pair.module}", "fetch it again")
            for target in pair.targets:
                part = Update(down, up[target.rows], scale)
                if target.repeats:
                    self._require_same(pair, target, part, found[target.cut.name])
                else:
                    found.setdefault(target.cut.name, []).append((target.cut.start, part))
        return found

    def _require_same(self, pair: Pair, target: Target, part: Update, others: list[tuple[int, Update]]) -> None:
        """InputError unless ``part`` is what ``others`` do with the same rows."""
        wanted = next(
            update for start, update in others if start == target.cut.start and len(update.up) == len(part.up)
        )
        first, second = (update.up.flatten(1) @ update.down.flatten(1) * update.scale for update in (wanted, part))
        if (first - second).norm() > SAME * first.norm():
            raise InputError(
                f"{self.path} holds two different updates of {target.cut.name}, one of them as {pair.module}",
                "keep one of the two in the file",
            )


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
    strengths = stated(path, metadata, entries)
    pairs, aside = _pairs(path, entries, strengths)
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
    fitted = _once(path, [_fitted(path, pair, *places[pair.module]) for pair in pairs])
    return Lora(path, scale, tuple(fitted), aside, strengths.config)


def _pairs(path: Path, entries: Mapping[str, Entry], strengths: Stated) -> tuple[list[Pair], int]:
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
        name = _plain(module)
        own = entries[f"{module}{ALPHA}"] if module in alphas else strengths.alpha_of(name, low[0], path)
        if isinstance(own, Entry) and math.prod(own.shape) != 1:
            raise InputError(f"{path}: {module}{ALPHA} is {list(own.shape)}, one number is wanted", "fetch it again")
        rslora = strengths.rslora and not isinstance(own, Entry)
        pairs.append(Pair(name, _held(path, down, entries), _held(path, ups[module], entries), own, rslora))
    return pairs, len(entries) - len(mine)


def _once(path: Path, pairs: list[Pair]) -> list[Pair]:
    """``pairs`` with the targets marked that an earlier pair has; pairs of split linears come first.

    Raises:
        InputError: two updates meet in some of their rows only.
    """
    taken: dict[str, list[Cut]] = {}
    found = []
    for pair in sorted(pairs, key=lambda pair: (len(pair.targets), pair.module)):
        targets = []
        for target in pair.targets:
            cuts, cut = taken.setdefault(target.cut.name, []), target.cut
            met = [other for other in cuts if other.start < cut.stop and cut.start < other.stop]
            if any((other.start, other.stop) != (cut.start, cut.stop) for other in met):
                raise InputError(f"{path} holds two updates that meet in some rows of {cut.name}, one is {pair.module}")
            targets.append(replace(target, repeats=bool(met)))
            cuts.append(cut)
        found.append(replace(pair, targets=tuple(targets)))
    return found


def _held(path: Path, name: str, entries: Mapping[str, Entry]) -> Held:
    entry = entries[name]
    if entry.dtype not in FLOATS:
        raise InputError(f"{path} holds {name} as {entry.dtype}, which is no floating-point number", "fetch it again")
    return Held(entry, entry.shape, entry.dtype)


def _plain(module: str) -> str:
    """A module's name without the prefixes that tools put before it."""
    module = module.removeprefix(WRAPPER)
    return next((module.removeprefix(prefix) for prefix in (*PREFIXES, *KOHYA) if module.startswith(prefix)), module)


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
    if family == "flux":
        names = _xlabs(shapes, modules) | names
    return {module: names[module] for module in modules if module in names}


def _xlabs(shapes: Mapping[str, Shape], modules: list[str]) -> dict[str, tuple[Shape, tuple[Cut, ...]]]:
    """Those of ``modules`` that have XLabs' names -> shape and rows, as `_places` gives them."""
    found = {}
    for (theirs, ours), updates in XLABS.items():
        pattern = re.compile(rf"{theirs}\.(\d+)\.processor\.({'|'.join(updates)})")
        for module, match in ((module, pattern.fullmatch(module)) for module in modules):
            names = [f"{ours}.{match[1]}.{linear}.weight" for linear in updates[match[2]]] if match else []
            if names and all(name in shapes for name in names):
                rows = sum(shapes[name][0] for name in names)
                found[module] = ((rows, *shapes[names[0]][1:]), tuple(Cut(n, 0, shapes[n][0]) for n in names))
    return found


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
