"""One pass through a model, block by block, that gathers what quantisation needs to know about every target's inputs.

The model's own forward is run for every block and every call. Blocks that are done answer with the output that was
kept; the first block that is not done is run, and the forward stops there. So the signature of a model's blocks need
not be known, and no activation stays in memory after its block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcgen_convert.checkpoint.headers import Entry
from dcgen_convert.core import clock, pulse
from dcgen_convert.core.errors import CheckFailed, InputError
from dcgen_convert.svdquant import trees
from dcgen_convert.svdquant.settings import QuantSettings
from dcgen_convert.svdquant.skeleton import load
from dcgen_convert.svdquant.spool import Spool
from dcgen_convert.svdquant.stats import Gatherer, Stats

Call = Mapping[str, Any] | Path  # keyword arguments of the transformer's forward, or the file of `trees` with them


class _Reached(Exception):
    """Stops a forward at the block that it names."""

    def __init__(self, block: str) -> None:
        super().__init__(block)
        self.block = block


def repeated_blocks(model: nn.Module, targets: Sequence[str], known: Sequence[str] = ()) -> list[str]:
    """Paths of all members of the module lists that are known or hold a target.

    Errors: InputError for a target outside every module list.
    """
    holders = dict.fromkeys(known)
    for target in targets:
        holder = holding_list(model, target)
        if holder is None:
            raise InputError(
                f"{target} is not inside a repeated block, so its inputs cannot be gathered.",
                hint="Leave it out of the targets.",
            )
        holders[holder] = None
    lists = {holder: model.get_submodule(holder) for holder in holders}
    return [f"{holder}.{name}" for holder, members in lists.items() for name, _ in members.named_children()]


def holding_list(model: nn.Module, path: str) -> str | None:
    """Path of the outermost ModuleList around a module, or None."""
    parts = path.split(".")
    for length in range(1, len(parts)):
        holder = ".".join(parts[:length])
        if isinstance(model.get_submodule(holder), nn.ModuleList):
            return holder
    return None


class Walker:
    """Runs a model's repeated blocks in the order in which its forward reaches them.

    model: a skeleton with everything outside `blocks` loaded. `spool` keeps block outputs, `done` are blocks whose
    output it already has. Per block: `step`, and `finish` when its outputs and statistics are safe.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        entries: dict[str, Entry],
        calls: Sequence[Call],
        spool: Spool,
        settings: QuantSettings,
        done: Sequence[str] = (),
    ) -> None:
        self.model, self.entries, self.calls, self.spool, self.settings = model, entries, calls, spool, settings
        self.left = list(blocks)
        self.dtype = run_dtype(settings.device)
        self._latest: dict[str, str] = {}  # module list -> the block whose output is kept
        self._call = 0
        self._blocks, self._rows = len(blocks), 0  # rows: pictures of the call, twice with guidance in one pass
        for block in blocks:
            self._stop_at(block)
        self.catch_up(done)

    def catch_up(self, done: Sequence[str]) -> None:
        """Take note of the blocks that were run, here or by another walker over the same spool, in that order."""
        for block in done:
            if block in self.left:
                self._latest[block.rpartition(".")[0]] = block
                self.left.remove(block)
                self._answer_for(block)

    def needed(self, targets: Sequence[str]) -> bool:
        """Whether a block that holds a target is left."""
        return any(target.startswith(f"{block}.") for block in self.left for target in targets)

    def step(self, targets: Sequence[str]) -> tuple[str, dict[str, Stats]]:
        """Run the next block on every call: its path and {target: statistics}. Layers that read the same tensor have
        one Stats in common.
        """
        block = self._next()
        module = self.model.get_submodule(block)
        load(module, block, self.entries, self.settings.device, self.dtype)
        inside = [target for target in targets if target.startswith(f"{block}.")]
        collector = _Collector(module, block, inside, len(self.calls), self.settings)
        self._run_and_stop_at(block)
        for call in range(len(self.calls)):
            with clock.timed("run the blocks", lambda: self._rows / self._blocks):
                self._forward(call)
            collector.end_call()
        collector.close()
        module.to("meta")
        return block, collector.stats()

    def finish(self, block: str) -> None:
        """Answer for the block from now on, and forget what it started from."""
        before = self._latest.get(block.rpartition(".")[0])
        self.catch_up([block])
        if before:
            self.spool.drop(before)

    def _next(self) -> str:
        """The block that the first call's forward reaches next."""
        reached = self._forward(0)
        if reached is None:
            raise InputError(
                f"The calibration calls never reach {self.left[0]}.", hint="Check the calls against the model."
            )
        return reached

    @torch.no_grad()
    def _forward(self, call: int) -> str | None:
        self._call = call
        pulse.bump()
        given = read_call(self.calls[call], self.settings.device, self.dtype)
        self._rows = next(len(value) for value in given.values() if isinstance(value, list) or torch.is_tensor(value))
        try:
            self.model(**given)
        except _Reached as reached:
            return reached.block
        return None

    def _stop_at(self, block: str) -> None:
        def forward(*_args: Any, **_kwargs: Any) -> Any:
            raise _Reached(block)

        self.model.get_submodule(block).forward = forward

    def _answer_for(self, block: str) -> None:
        def forward(*_args: Any, **_kwargs: Any) -> Any:
            return self.spool.get(self._latest[block.rpartition(".")[0]], self._call, self.settings.device)

        self.model.get_submodule(block).forward = forward

    def _run_and_stop_at(self, block: str) -> None:
        module = self.model.get_submodule(block)

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = type(module).forward(module, *args, **kwargs)
            with clock.timed("keep block outputs", self._rows / self._blocks):
                self.spool.put(block, self._call, output)
            raise _Reached(block)

        module.forward = forward


class _Collector:
    """Hooks on the targets of one block. The first call shows which targets read the same tensor: the first of them
    owns the statistics of all.
    """

    def __init__(
        self, module: nn.Module, block: str, targets: Sequence[str], calls: int, settings: QuantSettings
    ) -> None:
        self.calls, self.settings, self.call = calls, settings, 0
        self.owner: dict[str, str] = {}
        self.owned: dict[str, Gatherer] = {}
        self._seen: list[tuple[torch.Tensor, str]] = []
        self._targets = targets
        self._handles = [
            module.get_submodule(target[len(block) + 1 :]).register_forward_pre_hook(self._hook(target))
            for target in targets
        ]

    def _hook(self, target: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(_module: nn.Module, args: tuple[Any, ...]) -> None:
            self._take(target, args[0])

        return record

    def _take(self, target: str, x: torch.Tensor) -> None:
        owner = next((name for tensor, name in self._seen if tensor is x), target)
        if self.owner.setdefault(target, owner) != owner:
            raise CheckFailed(
                f"{target} shares its input with {owner} in call {self.call} but with {self.owner[target]} in call 0."
            )
        if owner == target:
            self._seen.append((x, target))
            if target not in self.owned:
                settings = self.settings
                self.owned[target] = Gatherer(target, x.shape[-1], self.calls, settings.seed, settings.device)
            self.owned[target].add(x, self.call)

    def end_call(self) -> None:
        self._seen.clear()
        self.call += 1

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def stats(self) -> dict[str, Stats]:
        silent = [target for target in self._targets if target not in self.owner]
        if silent:
            raise InputError(
                f"{silent[0]} received no input in any calibration call.", hint="Leave it out of the targets."
            )
        owned = {}
        for name, gatherer in self.owned.items():
            if not bool(torch.isfinite(gatherer.amax).all()):
                raise InputError(
                    f"The calibration calls send NaN or infinity into {name}.",
                    hint="Check the calls, and the model in float32.",
                )
            owned[name] = gatherer.stats(readers=sum(owner == name for owner in self.owner.values()))
        return {target: owned[self.owner[target]] for target in self._targets}


def read_call(call: Call, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """One call's arguments on the device; floating tensors as `dtype`."""
    tree = trees.load(call) if isinstance(call, Path) else call
    return trees.map_tensors(
        tree, lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None, copy=True)
    )


def run_dtype(device: str) -> torch.dtype:
    """float32 on a CPU, where bfloat16 is slow; bfloat16 elsewhere, as the model will be run."""
    return torch.float32 if device == "cpu" else torch.bfloat16
