"""The trained state behind a DeepSpeed engine, for every ZeRO stage: fp32 weights, Adam moments, moving average.

Each rank owns flat fp32 *partitions* of the trained parameters. The moving average is kept as one more Adam state of
each partition ("ema"): it is sharded and offloaded with the moments, one in-place operation updates it, and
DeepSpeed's own accessors can gather it.

T trained parameters, W ranks. Sources: deepspeed 0.19.8 `runtime/zero/stage_1_and_2.py`, `stage3.py`,
`utils/tensor_fragment.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dcgen_convert.train import distributed
from dcgen_convert.train.orthogonal import Piece

WEIGHT = "param"  # fp32 (master) weight
MOMENTS = ("exp_avg", "exp_avg_sq")
EMA = "ema"


class TrainedState:
    """Reads and writes full fp32 tensors of a sharded training state.

    Every method is collective: all ranks call it alike.
    """

    def __init__(
        self, optimizer: Any, stage: int, parameters: list[nn.Parameter], rank: int, world: int, ema: bool
    ) -> None:
        """``optimizer`` is what `deepspeed.initialize` returned; call before the first step."""
        self.stage, self.rank, self.world = stage, rank, world
        self._optimizer = optimizer
        self._access = distributed.deepspeed().utils
        self.keys = (WEIGHT, *MOMENTS, EMA) if ema else (WEIGHT, *MOMENTS)
        if stage == 0:
            self.adam, self.partitions = optimizer, parameters
        elif stage == 3:
            self.adam, self.partitions = optimizer.optimizer, optimizer.fp32_partitioned_groups_flat
        else:
            self.adam, self.partitions = optimizer.optimizer, optimizer.single_partition_of_fp32_groups
        # torch makes these states in the first step; made here they can also be read and loaded before it.
        fused = bool(self.adam.defaults.get("fused"))
        for partition in self.partitions:
            zeros = {key: torch.zeros_like(partition, requires_grad=False) for key in MOMENTS}
            average = {EMA: partition.detach().clone()} if ema else {}
            step = torch.zeros((), dtype=torch.float32, device=partition.device if fused else "cpu")
            self.adam.state[partition] = {"step": step, **zeros, **average}
        if stage in (1, 2):
            # DeepSpeed has no public name for this: it tells each parameter its slice of the states just made.
            optimizer._lazy_init_hp_params_optimizer_state()  # noqa: SLF001

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """ema <- decay ema + (1 - decay) weight, on this rank's partitions."""
        averages = [self.adam.state[partition][EMA] for partition in self.partitions]
        torch._foreach_lerp_(averages, [partition.detach() for partition in self.partitions], 1 - decay)

    def set_step(self, step: int) -> None:
        """Adam's step counter, which its bias correction uses."""
        for partition in self.partitions:
            self.adam.state[partition]["step"].fill_(float(step))

    def read(self, parameter: nn.Parameter, key: str) -> Tensor:
        """Full fp32 tensor of one parameter, in the parameter's true shape, on every rank."""
        if self.stage == 0:
            value = parameter if key == WEIGHT else self.adam.state[parameter][key]
        elif key == WEIGHT:
            value = self._access.safe_get_full_fp32_param(parameter)
        else:
            value = self._access.safe_get_full_optimizer_state(parameter, key)
        return value.detach().reshape(true_shape(parameter))

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Set one full fp32 tensor; the weight's low-precision copy follows."""
        value = value.to(device=parameter.device, dtype=torch.float32)
        if self.stage == 3:
            # DeepSpeed's setters of whole tensors fail on the last rank when the ranks do not divide the size.
            local = local_slice(value, _of_deepspeed(parameter).ds_tensor.numel(), self.rank)
            if key == WEIGHT:
                self._access.safe_set_local_fp32_param(parameter, local)
            else:
                self._access.safe_set_local_optimizer_state(parameter, local, key)
        elif self.stage == 0:
            target = parameter if key == WEIGHT else self.adam.state[parameter][key]
            target.copy_(value)
        elif key == WEIGHT:
            self._access.safe_set_full_fp32_param(parameter, value)
        else:
            self._access.safe_set_full_optimizer_state(parameter, value, key)
        if key == WEIGHT:
            self._show(parameter, value)

    def piece(self, parameter: nn.Parameter, key: str) -> tuple[int, Tensor]:
        """This rank's part of a tensor: (offset in the flattened whole, flat fp32 view); empty where it holds nothing.

        The parts of all ranks make the whole. Not collective. ZeRO 1 to 3.
        """
        number, start, place, count = self._place(parameter)
        flat = self.partitions[number]
        return start, (flat if key == WEIGHT else self.adam.state[flat][key])[place : place + count]

    def pieces_of(self, matrices: Sequence[nn.Parameter], device: torch.device) -> dict[int, list[Piece]]:
        """id of a flat tensor -> what this rank holds there of ``matrices``, all of one parameter group. Collective."""
        found = [(p, *self._place(p)) for p in matrices]  # (parameter, number of the flat tensor, start, place, count)
        partial = [0 < count < true_shape(p).numel() for p, _, _, _, count in found]
        split = [any(of_ranks) for of_ranks in zip(*distributed.of_all(partial, device), strict=True)]
        result: dict[int, list[Piece]] = {}
        for (p, number, start, place, count), parts in zip(found, split, strict=True):
            rows = true_shape(p)[0]
            piece = Piece((rows, true_shape(p).numel() // rows), start, place, count, parts)
            result.setdefault(id(p if self.stage == 0 else self.partitions[number]), []).append(piece)
        return result

    def _place(self, parameter: nn.Parameter) -> tuple[int, int, int, int]:
        """Where this rank holds its part: number of the flat tensor, start in the parameter, place there, count."""
        if self.stage == 0:
            return 0, 0, 0, parameter.numel()
        partitioned = _of_deepspeed(parameter)
        if self.stage == 3:
            number, place, length = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
            start = self.rank * length
            # the last ranks' parts end in padding
            return number, start, place, max(0, min(length, partitioned.ds_numel - start))
        mapping = partitioned._hp_mapping  # noqa: SLF001  DeepSpeed has no public name for it
        if mapping is None:
            return 0, 0, 0, 0
        here = mapping.hp_fragment_address
        return mapping.param_group_index, mapping.lp_fragment_address.start, here.start, here.numel

    @contextmanager
    def averaged(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Let the model compute with the moving average; the trained weights come back afterwards."""
        # With ZeRO what the forward pass reads is a copy of the fp32 weights; without, they must be kept.
        before = [parameter.detach().clone() for parameter in parameters] if self.stage == 0 else None
        for parameter in parameters:
            self._show(parameter, self.read(parameter, EMA))
        try:
            yield
        finally:
            for number, parameter in enumerate(parameters):
                self._show(parameter, before[number] if before else self.read(parameter, WEIGHT))

    @torch.no_grad()
    def _show(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set what the forward pass reads."""
        if self.stage == 3:
            shard = _of_deepspeed(parameter).ds_tensor.data
            shard.copy_(local_slice(value, shard.numel(), self.rank))
        # ZeRO 3 keeps small parameters gathered.
        if self.stage != 3 or _of_deepspeed(parameter).ds_status.name == "AVAILABLE":
            parameter.data.copy_(value)


def _of_deepspeed(parameter: nn.Parameter) -> Any:
    """The parameter with the attributes that DeepSpeed adds: ds_tensor, ds_numel, ds_status, _hp_mapping."""
    return parameter


def true_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the whole parameter; ZeRO 3 leaves an empty tensor in its place."""
    return getattr(parameter, "ds_shape", parameter.shape)


def local_slice(value: Tensor, length: int, rank: int) -> Tensor:
    """This rank's part of a flattened tensor, zero-padded to ``length`` as ZeRO 3 stores it."""
    part = value.flatten()[rank * length : (rank + 1) * length]
    return torch.nn.functional.pad(part, (0, length - part.numel()))
