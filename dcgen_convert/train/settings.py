"""What an engine is told, as one checked value. No torch here: `plan` reads it too."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from dcgen_convert.core.errors import RecipeError

ZERO_STAGES = (0, 1, 2, 3)
SCHEDULES = ("constant", "cosine")
OFFLOADS = ("none", "optimizer", "all")
OPTIMIZERS = ("adamw", "muon")


class Turn(NamedTuple):
    """Where a cosine changes its end: at ``step``, with ``progress`` of it behind, it goes on to end at ``end``."""

    step: int
    progress: float
    end: int


@dataclass(frozen=True)
class EngineSettings:
    """Settings of one training run.

    Attributes:
        steps: optimizer steps of the whole run (the cosine schedule ends there).
        lr: peak learning rate of the optimizer.
        warmup: steps over which the rate rises linearly from lr / warmup to lr; 0 disables it.
        schedule: "constant" (after warm-up) | "cosine" (to zero at ``steps``).
        batch: global batch, samples per optimizer step over all ranks.
        micro_batch: largest number of samples that one rank runs forward at once.
        dtype: "fp32" | "bf16" (bf16 weights and gradients, fp32 master weights and moments).
        zero: ZeRO stage; 0 keeps nothing sharded.
        offload: "none" | "optimizer" (moments and master weights in host memory) | "all" (weights too, ZeRO 3 only).
        clip: largest global gradient norm; 0 disables clipping.
        ema: decay of the moving average of the trained weights; 0 disables it.
        checkpointing: recompute activations in the backward pass.
        betas, eps, weight_decay: AdamW's, by default those of the published recipes (arXiv 2509.25180).
        optimizer: "adamw" | "muon" (orthogonal steps for matrices, AdamW for the rest).
        turn: of a cosine that ends at another step than ``steps``; None: none does.
    """

    steps: int
    lr: float
    warmup: int
    schedule: str
    batch: int
    micro_batch: int
    dtype: str
    zero: int
    offload: str
    clip: float
    ema: float
    checkpointing: bool
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    turn: Turn | None = None

    @property
    def last(self) -> int:
        """Steps that are really done, unless time runs out: fewer than ``steps`` when the schedule was shortened."""
        return min(self.steps, self.turn.end) if self.turn else self.steps

    def turned(self, step: int, end: int) -> EngineSettings:
        """The same, with a cosine that goes on from ``step`` without a jump and ends at ``end``."""
        return replace(self, turn=Turn(step, self._progress(step), end))

    def __post_init__(self) -> None:
        """RecipeError for a combination that cannot train or would train something else."""
        self._require(
            self.steps > 0 and self.batch > 0 and self.micro_batch > 0, "steps, batch and micro_batch must be positive"
        )
        self._require(self.dtype in ("fp32", "bf16"), f"dtype must be fp32 or bf16, it is {self.dtype!r}")
        self._require(self.zero in ZERO_STAGES, f"zero must be one of {ZERO_STAGES}, it is {self.zero!r}")
        self._require(self.schedule in SCHEDULES, f"schedule must be one of {SCHEDULES}, it is {self.schedule!r}")
        self._require(self.optimizer in OPTIMIZERS, f"optimizer must be one of {OPTIMIZERS}, it is {self.optimizer!r}")
        self._require(self.offload in OFFLOADS, f"offload must be one of {OFFLOADS}, it is {self.offload!r}")
        self._require(0 <= self.ema < 1, f"ema is a decay in [0, 1), it is {self.ema}")
        self._require(self.clip >= 0, f"clip is a gradient norm >= 0, it is {self.clip}")
        if self.dtype == "bf16" and self.zero == 0:
            # DeepSpeed's stage-0 bf16 optimizer takes a dummy Adam step: its bias correction is one step off.
            raise RecipeError(
                "ZeRO stage 0 trains differently with bf16, so it is refused", hint="use --zero 1, or --dtype fp32"
            )
        self._require(self.offload == "none" or self.zero >= 2, "offload needs ZeRO stage 2 or 3")
        self._require(self.offload != "all" or self.zero == 3, "offload all needs ZeRO stage 3")

    @staticmethod
    def _require(condition: bool, message: str) -> None:
        if not condition:
            raise RecipeError(f"adapt: {message}")

    def split(self, world: int) -> tuple[int, int]:
        """(samples per micro-batch, micro-batches per step) of one rank; the global batch stays what it is.

        RecipeError when the ranks cannot share the batch evenly.
        """
        if self.batch % world:
            raise RecipeError(
                f"a global batch of {self.batch} cannot be shared by {world} ranks",
                hint=f"use a batch that is a multiple of {world}",
            )
        local = self.batch // world
        micro = max(size for size in range(1, min(self.micro_batch, local) + 1) if local % size == 0)
        return micro, local // micro

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimizer step ``step`` (the first is 0)."""
        return self.lr * self.rate_factor(step)

    def rate_factor(self, step: int) -> float:
        """Factor on ``lr`` at ``step``, in [0, 1]: linear warm-up, then constant or half a cosine down to zero."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, self._progress(step))))

    def _progress(self, step: int) -> float:
        """How much of the cosine lies behind ``step``: 0 after the warm-up, 1 at the end."""
        if self.turn and step >= self.turn.step:
            gone = (step - self.turn.step) / max(1, self.turn.end - self.turn.step)
            return self.turn.progress + (1 - self.turn.progress) * gone
        return max(0, step - self.warmup) / max(1, self.steps - self.warmup)

    def ema_decay(self, step: int) -> float:
        """Decay used after optimizer step ``step``: short of ``ema`` at first, so that the start is forgotten.

        min(ema, (1 + s) / (10 + s)) with s finished steps, as in TensorFlow's ExponentialMovingAverage(num_updates).
        """
        return min(self.ema, (2 + step) / (11 + step))
