"""Training memory per GPU by ZeRO stage: the terms of a mixed-precision AdamW step, from parameter counts alone.

F frozen, T trained parameters, N GPUs; weights and gradients of 2 (bf16) or 4 B, fp32 master and two moments (12 T),
the moving average (4 T), 4 T of step transient (fused AdamW). The T terms are checked against a census of live tensors
(tests/plan/test_census.py); activations against a FakeTensor run of the FLUX graph (2.31 GiB per sample at 4096 + 512
tokens); `other` is an assumption.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

GIB = 2**30
BUCKET = 2e8  # elements of ZeRO's reduce bucket
LIVE = 1e9  # elements that ZeRO-3 keeps gathered (stage3_max_live_parameters)
CONTEXT = 1.5 * GIB  # CUDA context, NCCL buffers: assumed
FRAGMENTATION = 0.08  # assumed
GPUS = {"H100-80": 79.1, "H200-141": 139.8}
"""GiB that torch may use on cards sold as 80 and 141 GB."""
GPU_COUNTS = (1, 2, 4, 8, 16)
MODES = ((0, "none"), (1, "none"), (2, "none"), (3, "none"), (2, "optimizer"), (3, "all"))
"""(ZeRO stage, offload), lightest machinery first."""


@dataclass(frozen=True)
class Numbers:
    """What is kept per parameter. element: bytes of a weight or gradient; ema: whether a moving average is kept."""

    element: int = 2
    ema: bool = False

    @property
    def optimizer(self) -> int:
        """Bytes per trained parameter: fp32 master, two moments, 4 B of transient, the average."""
        return 20 if self.ema else 16


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU by kind, and bytes of host memory for the whole job."""

    zero: int
    offload: str
    gpus: int
    weights: float
    grads: float
    optimizer: float
    activations: float
    other: float
    host: float

    @property
    def total(self) -> float:
        return self.weights + self.grads + self.optimizer + self.activations + self.other

    def gib(self) -> dict:
        """The same in GiB, rounded for people and JSON."""
        sizes = {key: round(value / GIB, 2) for key, value in asdict(self).items() if isinstance(value, float)}
        return {
            "zero": self.zero,
            "offload": self.offload,
            "gpus": self.gpus,
            **sizes,
            "total": round(self.total / GIB, 2),
        }


def activations(tokens: int, width: int, blocks: int, checkpointing: bool = True) -> float:
    """Bytes per sample at 2 B a number. tokens: image + text. With checkpointing: tokens D 2 B (1.04 blocks + 28).

    28 is the peak inside one block that is being recomputed; measured on FLUX, scaled by width and blocks elsewhere.
    Without checkpointing every block keeps its 20: tokens D 2 B (20 blocks + 12).
    """
    return float(tokens * width * 2 * (1.04 * blocks + 28 if checkpointing else 20 * blocks + 12))


def memory(
    frozen: float,
    trained: float,
    gpus: int,
    zero: int,
    offload: str,
    sample_bytes: float,
    micro_batch: int,
    numbers: Numbers = Numbers(),  # noqa: B008  frozen
) -> Memory:
    """Bytes per GPU of one configuration.

    zero 0: no sharding (the N GPUs hold the same). offload "optimizer": 16 T (20 T with an average) on the host;
    "all" (zero 3): weights too.
    """
    f, t, n, each = float(frozen), float(trained), gpus, numbers.element
    live_parameters = min(LIVE, f + t)  # a smaller model cannot have more of them gathered
    bucket = min(BUCKET, t)
    weights = each * (f + t)
    if zero == 3 and n > 1:
        weights = each * (f + t) / n + each * live_parameters
    grads = each * t
    if zero >= 2:
        grads = each * t / n + 2 * each * bucket  # two of them: one fills while the other is reduced
    optimizer = numbers.optimizer * t / (n if zero else 1)
    host = 0.0
    if offload in ("optimizer", "all"):
        host, optimizer = numbers.optimizer * t, 0.0
    if offload == "all":
        host, weights = host + each * (f + t), each * live_parameters
    live = sample_bytes * micro_batch
    other = CONTEXT + FRAGMENTATION * (weights + grads + optimizer + live)
    return Memory(zero, offload, n, weights, grads, optimizer, live, other, host)


def max_micro_batch(
    frozen: float,
    trained: float,
    gpus: int,
    zero: int,
    offload: str,
    sample_bytes: float,
    gpu_bytes: float,
    numbers: Numbers = Numbers(),  # noqa: B008
) -> int:
    """The largest micro-batch that fits in `gpu_bytes`; 0 when not even one sample does."""
    empty = memory(frozen, trained, gpus, zero, offload, 0.0, 0, numbers)
    left = gpu_bytes - empty.total
    return max(0, int(left / (sample_bytes * (1 + FRAGMENTATION))))


@dataclass(frozen=True)
class Choice:
    """What `choose` decided, and the reason in one line. zero None: nothing fits on this many GPUs."""

    zero: int | None
    offload: str
    reason: str


def choose(
    frozen: float,
    trained: float,
    gpus: int,
    sample_bytes: float,
    micro_batch: int,
    gpu_bytes: float,
    numbers: Numbers = Numbers(),  # noqa: B008
) -> Choice:
    """The lightest ZeRO stage and offload that fits; never stage 0, whose bf16 training is wrong."""
    for zero, offload in MODES[1:]:
        need = memory(frozen, trained, gpus, zero, offload, sample_bytes, micro_batch, numbers).total
        if need <= gpu_bytes:
            where = f", {offload} offload" if offload != "none" else ""
            room = f"{need / GIB:.1f} of {gpu_bytes / GIB:.1f} GiB on each of {gpus} GPU(s)"
            text = f"ZeRO-{zero}{where}: {room} at micro-batch {micro_batch}"
            return Choice(zero, offload, text)
    return Choice(
        None, "none", f"no ZeRO stage fits {gpu_bytes / GIB:.1f} GiB on {gpus} GPU(s) at micro-batch {micro_batch}"
    )


def smallest_change(
    frozen: float,
    trained: float,
    gpus: int,
    sample_bytes: float,
    gpu_bytes: float,
    numbers: Numbers = Numbers(),  # noqa: B008
) -> str:
    """What to change when not even a micro-batch of 1 fits: stage and offload, then the number of GPUs."""
    for count in (gpus, *(n for n in (2, 4, 8, 16, 32, 64) if n > gpus)):
        choice = choose(frozen, trained, count, sample_bytes, 1, gpu_bytes, numbers)
        if choice.zero is not None:
            more = f" --gpus {count}" if count != gpus else ""
            return f"--zero {choice.zero} --offload {choice.offload}{more} with micro_batch 1"
    return "a GPU with more memory, or a lower resolution or rank: 64 GPUs do not suffice"


def table(frozen: float, trained: float, sample_bytes: float, numbers: Numbers = Numbers()) -> list[dict]:  # noqa: B008
    """The table of ZeRO stage x GPUs in GiB, with the largest micro-batch on each known card."""
    rows = []
    for zero, offload in MODES:
        for gpus in (1,) if zero == 0 else GPU_COUNTS:
            row = memory(frozen, trained, gpus, zero, offload, sample_bytes, 1, numbers).gib()
            for card, gib in GPUS.items():
                row[f"max_micro_batch_{card}"] = max_micro_batch(
                    frozen, trained, gpus, zero, offload, sample_bytes, gib * GIB, numbers
                )
            rows.append(row)
    return rows
