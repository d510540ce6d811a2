"""One quantisation: its inputs, and the hidden work folder from which it goes on after a stop."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dcgen_convert.checkpoint.headers import Entry
from dcgen_convert.checkpoint.tensors import read_tensor
from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import digest_tensor, read_json, write_json
from dcgen_convert.families import QuantTargets
from dcgen_convert.svdquant import trees
from dcgen_convert.svdquant.calibrate import Call
from dcgen_convert.svdquant.checks import check_awq_shape, check_finite, check_plain_shape, check_svdq_shape
from dcgen_convert.svdquant.settings import QuantSettings
from dcgen_convert.svdquant.source import read_folder


@dataclass(frozen=True)
class Quantisation:
    """What is quantised, how, and where the work lies.

    config, entries  the source, from `source.read_folder`
    targets          exact module paths: `svdq` become W4A4, `awq` become W4A16. `blocks` are the module lists of which
                     one member is loaded at a time; a list that holds a target counts without being named
    calls            keyword arguments of the transformer's forward, for the calibration
    work             the work folder: `blocks/` that are finished, `outputs/` of blocks, `stats/` of blocks in work
    """

    config: dict[str, Any]
    entries: dict[str, Entry]
    targets: QuantTargets
    settings: QuantSettings
    calls: Sequence[Call]
    work: Path

    @classmethod
    def of_folder(
        cls, source: Path, output: Path, targets: QuantTargets, settings: QuantSettings, calls: Sequence[Call]
    ) -> Quantisation:
        """The quantisation of the folder ``source`` into ``output``. Nothing is checked or written."""
        return cls(*read_folder(source), targets, settings, calls, output.with_name(f".{output.name}.partial"))

    def check(self) -> str:
        """Refuse, by its name, a target that cannot be quantised, from headers alone; then NaN or infinity anywhere.

        Returns the hash of the weights, which are read here once: a time stamp says nothing about them.
        """
        targets = self.targets
        if not targets.svdq and not targets.awq:
            hint = "Check the family's targets with `dcgen-convert plan`."
            raise InputError("No layer is planned for quantisation.", hint)
        if self.settings.calibration == "calls" and targets.svdq and not self.calls:
            hint = "Use --calibration none to quantise without data."
            raise InputError("Calibration needs at least one call.", hint)
        both = sorted(set(targets.svdq) & set(targets.awq))
        if both:
            raise InputError(f"{both[0]} is planned both as W4A4 and as W4A16.", "Leave it in one of the two lists.")
        check_w4a4_shape = check_plain_shape if self.settings.plain else check_svdq_shape
        for names, check_shape in ((targets.svdq, check_w4a4_shape), (targets.awq, check_awq_shape)):
            for name in names:
                if f"{name}.weight" not in self.entries:
                    hint = "Check the family's targets against the checkpoint."
                    raise InputError(f"The checkpoint holds no {name}.weight.", hint)
                check_shape(name, self.entries[f"{name}.weight"].shape)
        weights = hashlib.sha256()
        for name, entry in self.entries.items():
            tensor = read_tensor(entry)
            check_finite(name, tensor)
            digest_tensor(weights, name, tensor)
        return weights.hexdigest()

    def make_work_folder(self, weights: str, console: Console) -> None:
        """Make the work folder, or keep one that belongs to this very quantisation; ``weights``: from `check`."""
        plan, fingerprint = self.work / "plan.json", self.fingerprint(weights)
        if self.work.exists() and not (plan.is_file() and read_json(plan) == fingerprint):
            console.say("quantize: an unfinished run with other inputs or settings lies here; it is discarded")
            shutil.rmtree(self.work)
        for name in ("blocks", "stats"):
            (self.work / name).mkdir(parents=True, exist_ok=True)
        write_json(plan, fingerprint)

    def fingerprint(self, weights: str) -> dict[str, Any]:
        """What decides the output's bytes, short enough to compare."""
        return {
            "config": hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest(),
            "weights": weights,
            "targets": {"svdq": list(self.targets.svdq), "awq": list(self.targets.awq)},
            "settings": asdict(self.settings),
            "calls": _hash_calls(self.calls),
        }

    def tensors_file(self, block: str) -> Path:
        """The finished tensors of a block."""
        return self.work / "blocks" / f"{block}.safetensors"

    def records_file(self, block: str) -> Path:
        """The records of a finished block. The block is finished when this file is there."""
        return self.work / "blocks" / f"{block}.json"

    def stats_file(self, block: str) -> Path:
        """The statistics of a block that was run and is not finished."""
        return self.work / "stats" / f"{block}.safetensors"

    def walked(self) -> list[str]:
        """Blocks that were run, in the order in which the forward reached them. Each is finished, or its statistics are
        kept.
        """
        path = self.work / "walked.json"
        return read_json(path) if path.is_file() else []

    def mark_walked(self, block: str) -> None:
        """Remember that a block was run on every call. Its outputs and statistics are kept by then."""
        write_json(self.work / "walked.json", [*self.walked(), block])


def _hash_calls(calls: Sequence[Call]) -> str:
    digest = hashlib.sha256()
    for call in calls:
        if isinstance(call, Path):
            digest.update(call.read_bytes())
            continue
        structure, tensors = trees.flatten(call)
        digest.update(structure.encode())
        for name, tensor in tensors.items():
            digest_tensor(digest, name, tensor)
    return digest.hexdigest()
