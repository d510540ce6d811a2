"""A thin layer over `deepspeed.initialize`: the same training step on one CPU process and on many GPUs.

    engine = Engine(model, trainable, settings)
    record = engine.step(loss_of, micro_batches)
    weights = engine.export()
    engine.close()

One process can use several engines, one after the other (head alignment, then LoRA phases). After a ZeRO 3 engine the
model's weights stay partitioned, so the model must be loaded again. With ZeRO 2, fp32 and one process a step is bitwise
equal to that of a plain PyTorch loop.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dcgen_convert.core import pulse
from dcgen_convert.core.errors import CheckFailed, InternalError
from dcgen_convert.families.base import Network
from dcgen_convert.planning.memory import BUCKET
from dcgen_convert.train import distributed
from dcgen_convert.train.orthogonal import MATRICES, OrthogonalAdamW
from dcgen_convert.train.settings import EngineSettings
from dcgen_convert.train.state import EMA, WEIGHT, TrainedState, true_shape


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    Its index (the first is 0), loss and gradient norm of the global batch, rate, wall seconds.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    seconds: float
    stop: bool  # some rank asked to stop (a signal)


class _Pass(nn.Module):
    """What DeepSpeed wraps: one forward pass is one loss, however often the loss calls the model.

    DeepSpeed prepares the backward pass in its own forward; without that ZeRO 3 loses accumulated gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, loss_of: Callable[[Any], Tensor], batch: Any) -> Tensor:
        return loss_of(batch)


class Engine:
    """Trains ``parameters`` of ``model`` and nothing else.

    Attributes:
        step_count: finished optimizer steps.
        device: where the model computes.
        rank, world: this process among all.
    """

    def __init__(
        self,
        model: Network,
        parameters: Iterable[tuple[str, nn.Parameter]],
        settings: EngineSettings,
        matrices: Collection[str] = (),
    ) -> None:
        """Freeze the rest of the model, shard what ZeRO shards, make the optimizer.

        Args:
            model: full model on the CPU, any dtype; cast to ``settings.dtype``.
            parameters: (name, parameter) of what trains; the names appear in exports and checkpoints.
            matrices: names of those that take orthogonal steps (`orthogonal`) with the optimizer muon.
        """
        self.settings, self.model = settings, model
        self.named = dict(parameters)
        turned = [p for name, p in self.named.items() if name in matrices] if settings.optimizer == "muon" else []
        self.step_count = 0
        chosen = {id(parameter) for parameter in self.named.values()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
        model.eval()  # no dropout of its own: every random draw of a step is keyed by the objective
        if settings.checkpointing:
            model.enable_gradient_checkpointing()
        deepspeed = distributed.deepspeed()
        with distributed.launch_environment(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            distributed.join()
            self.rank, self.world = distributed.rank(), distributed.world_size()
            self.micro_batch, self.accumulation = settings.split(self.world)
            config = self._config()
            dtype = torch.bfloat16 if settings.dtype == "bf16" else torch.float32
            nn.Module.to(model, dtype)  # diffusers' own `to` warns of a list that is empty
            wrapped = _Pass(model)
            self._linear = nn.functional.linear
            if settings.zero == 3:
                # Before initialize, which would first move the whole model to every device: this moves and shares one
                # parameter after the other. Buffers it forgets.
                sharing = deepspeed.zero.Init(module=wrapped, config_dict_or_path=config)
                move_buffers(model, sharing.local_device)
            adam = self._optimizer(turned)
            self._engine, optimizer, _, _ = deepspeed.initialize(model=wrapped, optimizer=adam, config=config)
        self.device = torch.device(self._engine.device)
        self.state = TrainedState(
            optimizer, settings.zero, list(self.named.values()), self.rank, self.world, ema=settings.ema > 0
        )
        if isinstance(adam, OrthogonalAdamW):
            pieces, adam.device = self.state.pieces_of(turned, self.device), self.device
            adam.pieces_of = lambda partition: pieces[id(partition)]

    def _optimizer(self, turned: list[nn.Parameter]) -> torch.optim.AdamW:
        """Of all that trains; ``turned`` take orthogonal steps, and stand in a parameter group of their own."""
        settings, chosen = self.settings, {id(p) for p in turned}
        rest = [p for p in self.named.values() if id(p) not in chosen]
        groups = [(turned, True), (rest, False)]
        shared: dict[str, Any] = {
            "lr": settings.lr,
            "betas": settings.betas,
            "eps": settings.eps,
            "weight_decay": settings.weight_decay,
            "fused": torch.cuda.is_available() and settings.offload == "none",
        }
        if not turned:
            return torch.optim.AdamW(rest, **shared)
        return OrthogonalAdamW([{"params": found, MATRICES: kind} for found, kind in groups if found], **shared)

    def _config(self) -> dict[str, Any]:
        """DeepSpeed's own configuration for these settings."""
        settings = self.settings
        zero: dict[str, Any] = {
            "stage": settings.zero,
            "contiguous_gradients": True,
            "overlap_comm": torch.cuda.is_available(),
            # DeepSpeed allocates whole buckets, by default of 1 GB each, however little trains
            "reduce_bucket_size": min(int(BUCKET), sum(parameter.numel() for parameter in self.named.values())),
        }
        if settings.offload != "none":
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if settings.offload == "all":
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        config: dict[str, Any] = {
            "train_batch_size": settings.batch,
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": settings.clip,
            "bf16": {"enabled": settings.dtype == "bf16"},
            "zero_optimization": zero,
            # torch's AdamW with offload too: DeepSpeed's own is compiled on first use
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,  # `OrthogonalAdamW`, which our tests test
            "steps_per_print": None,
        }
        if settings.dtype == "bf16" and self.accumulation > 1 and settings.zero >= 2:
            config["data_types"] = {"grad_accum_dtype": "fp32"}  # sums of bf16 gradients lose the small ones
        return config

    def step(self, loss_of: Callable[[Any], Tensor], micro_batches: Sequence[Any], stop: bool = False) -> StepRecord:
        """One optimizer step over the micro-batches of this rank (``accumulation`` of them).

        Args:
            loss_of: micro-batch -> mean loss over its samples, computed with ``self.model``.
            stop: this rank wants to stop; the record says whether any rank does.
        Raises:
            CheckFailed: the loss is not finite; the weights are those before the step.
        """
        start = time.perf_counter()
        if len(micro_batches) != self.accumulation:
            raise InternalError(f"a step takes {self.accumulation} micro-batches, it got {len(micro_batches)}")
        lr = self.settings.learning_rate(self.step_count)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=self.device)
        grad_norm = math.nan
        for index, micro_batch in enumerate(micro_batches):
            pulse.bump()
            loss = self._engine(loss_of, micro_batch)
            total += loss.detach()
            self._engine.backward(loss)
            if index + 1 == self.accumulation:
                mean, stopping = distributed.mean_over_ranks(
                    [total.item() / self.accumulation, float(stop)], self.device
                )
                if not math.isfinite(mean):
                    raise CheckFailed(
                        f"the loss of step {self.step_count} is {mean}",
                        hint="lower the learning rate, or look at that batch",
                    )
                if self.settings.zero == 0:
                    grad_norm = torch.nn.utils.get_total_norm(
                        [p.grad for p in self.named.values() if p.grad is not None]
                    ).item()
            self._engine.step()
        if self.settings.zero:
            grad_norm = float(self._engine.get_global_grad_norm())
        if not math.isfinite(grad_norm):
            raise CheckFailed(
                f"the gradient of step {self.step_count} is not finite",
                hint="lower the learning rate, or look at that batch",
            )
        if self.settings.ema:
            self.state.update_average(self.settings.ema_decay(self.step_count))
        record = StepRecord(self.step_count, mean, grad_norm, lr, time.perf_counter() - start, stopping > 0)
        self.step_count += 1
        return record

    @torch.no_grad()
    def evaluate(self, loss_of: Callable[[Any], Tensor], batch: Any) -> Tensor:
        """``loss_of(batch)`` without gradient, with parameters gathered as in a step."""
        pulse.bump()
        return self._engine(loss_of, batch)

    @property
    def ema(self) -> dict[str, Tensor]:
        """Moving average of the trained weights, name -> full fp32 tensor on the CPU."""
        return dict(self.tensors(EMA))

    def tensors(self, key: str) -> Iterator[tuple[str, Tensor]]:
        """(name, full fp32 CPU tensor) of "param", "exp_avg", "exp_avg_sq" or "ema", one at a time; collective."""
        for name, parameter in self.named.items():
            pulse.bump()
            yield name, self.state.read(parameter, key).to("cpu", copy=True)

    @property
    def sharded(self) -> bool:
        """Whether every rank writes its own part of a checkpoint: when every weight trains, on several ranks."""
        everything = len(self.named) == sum(1 for _ in self.model.parameters())
        return everything and self.world > 1 and self.settings.zero > 0

    def pieces(self, key: str) -> Iterator[tuple[str, Tensor]]:
        """(name@offset, flat fp32 CPU tensor) of what this rank holds of the tensors that `tensors` gathers."""
        for name, parameter in self.named.items():
            pulse.bump()
            offset, part = self.state.piece(parameter, key)
            if part.numel():
                yield f"{name}@{offset}", part.detach().to("cpu", copy=True)

    def export(self) -> dict[str, Tensor]:
        """What the run made: the moving average if there is one, else the weights; full fp32, checked.

        Raises:
            CheckFailed: a tensor is empty, not finite, or not of its parameter's shape.
        """
        result = dict(self.tensors(EMA if self.settings.ema else WEIGHT))
        for name, tensor in result.items():
            check_export(name, tensor, true_shape(self.named[name]))
        return result

    def averaged(self) -> AbstractContextManager[None]:
        """Context in which the model computes with the moving average."""
        return self.state.averaged(list(self.named.values()))

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model and free the optimizer."""
        self._engine.destroy()
        nn.functional.linear = self._linear  # ZeRO 3 replaced it for the whole process, with another rounding
        del self._engine, self.state
        if self.settings.checkpointing:
            self.model.disable_gradient_checkpointing()


def move_buffers(model: nn.Module, device: torch.device | str) -> None:
    """Put the buffers of ``model`` on ``device``, and leave its parameters where they are."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


def check_export(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """CheckFailed unless ``tensor`` is non-empty, finite and of ``shape``.

    ZeRO 3 hands out empty tensors without a word.
    """
    if tensor.numel() == 0 or tuple(tensor.shape) != tuple(shape):
        raise CheckFailed(f"export: {name} has shape {tuple(tensor.shape)}, its parameter has {tuple(shape)}")
    if not torch.isfinite(tensor).all():
        raise CheckFailed(
            f"export: {name} holds values that are not finite",
            hint="resume from an earlier checkpoint with a lower rate",
        )
