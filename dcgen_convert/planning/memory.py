"""Training memory per GPU by ZeRO stage: the terms of a mixed-precision AdamW step, from parameter counts alone.

F frozen, T trained parameters, N GPUs, B the elements of a reduce bucket; weights and gradients of e = 2 (bf16) or 4 B.
A step has two moments, and the higher one counts:

    always         e F + e T weights; fp32 master, two moments and the moving average, 12 T or 16 T
    backward pass  gradients and buckets; activations
    update         the gradients of this GPU's partition, again as one flat tensor, and again as fp32

The activations are freed in the backward pass, before the update: the two do not add up. The parameter terms were
checked against a census of live tensors (tests/planning/test_census.py), the activations against a FakeTensor run of
the FLUX graph (2.31 GiB per sample at 4096 + 512 tokens). `other` is an assumption.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

GIB = 2**30
BUCKET = 2e8  # elements of ZeRO's reduce bucket
FLAT = 5e8  # elements that ZeRO-0 reduces at once
LIVE = 1e9  # elements that ZeRO-3 keeps gathered (stage3_max_live_parameters)
CONTEXT = 1.5 * GIB  # CUDA context, NCCL buffers: assumed
FRAGMENTATION = 0.08  # assumed
GPUS = {"H100-80": 79.1, "H200-141": 139.8}
"""GiB that torch may use on cards sold as 80 and 141 GB."""
GPU_COUNTS = (1, 2, 4, 8, 16)
MODES = ((0, "none"), (1, "none"), (2, "none"), (3, "none"), (2, "optimizer"), (3, "all"))
"""(ZeRO stage, offload), lightest machinery first."""


@dataclass(frozen=True)
class Training:
    """What is trained, wherever it runs. frozen, trained: parameters; sample: bytes of one picture's activations.

    element: bytes of a weight or gradient; ema: whether a moving average is kept; overlap: whether ZeRO 1 and 2 fill a
    second bucket while one is reduced, as they do on GPUs.
    """

    frozen: float
    trained: float
    sample: float
    element: int = 2
    ema: bool = False
    overlap: bool = True

    @property
    def states(self) -> float:
        """Bytes of fp32 master, two moments and the average."""
        return (16 if self.ema else 12) * self.trained


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU by kind, and bytes of host memory for the whole job.

    step: what reduction and update need beyond the gradients and activations of the backward pass.
    """

    zero: int
    offload: str
    gpus: int
    weights: float
    grads: float
    optimizer: float
    activations: float
    step: float
    other: float
    host: float

    @property
    def total(self) -> float:
        return self.weights + self.grads + self.optimizer + self.activations + self.step + self.other

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


def estimate(training: Training, gpus: int, zero: int, offload: str, micro_batch: int) -> Memory:
    """Bytes per GPU of one configuration.

    zero 0: no sharding (the N GPUs hold the same). offload "optimizer": states and fp32 gradients on the host;
    "all" (zero 3): weights too.
    """
    t, n, e = float(training.trained), gpus, training.element
    every = training.frozen + t
    live = min(LIVE, every)  # a smaller model cannot have more of them gathered
    shards = n if zero else 1
    part = t / shards  # of the trained parameters, what this GPU updates
    bucket = e * min(BUCKET, t)
    weights = e * (every / n + live) if zero == 3 and n > 1 else e * every
    filled = (1 + training.overlap) * bucket
    # Stage 0 reduces flat copies after the backward pass; stage 3 copies its bucket and reduces the copy.
    buckets = {0: e * min(FLAT, t), 1: filled, 2: filled, 3: (2 + 1 / n) * bucket}[zero]
    grads = reduced = e * (t if zero < 2 else part) + buckets
    if zero == 0:
        grads = e * t
    elif zero >= 2 and t <= BUCKET:  # all gradients are in one bucket: it is reduced when the activations are gone
        grads = filled if zero == 2 else e * part + bucket
    states = training.states / shards
    update = e * part + (e * part if e < 4 else 0) + 4 * part + (bucket if zero == 3 else 0)
    if zero == 0 and e == 4:
        states, update = states - 4 * t, 0.0  # the weights are their own master
    host = 0.0
    if offload in ("optimizer", "all"):
        host, states, update = training.states + 4 * t, 0.0, 0.0
    if offload == "all":
        host, weights = host + e * every, e * live
    activations = training.sample * micro_batch
    step = max(0.0, max(reduced, update) - grads - activations)
    other = CONTEXT + FRAGMENTATION * (weights + grads + states + activations + step)
    return Memory(zero, offload, n, weights, grads, states, activations, step, other, host)


def max_micro_batch(training: Training, gpus: int, zero: int, offload: str, gpu_bytes: float) -> int:
    """The largest micro-batch that fits in `gpu_bytes`; 0 when not even one sample does."""
    empty = estimate(training, gpus, zero, offload, 0)
    if empty.total > gpu_bytes:
        return 0
    left = gpu_bytes - empty.total + (1 + FRAGMENTATION) * empty.step  # activations may take the update's place
    return int(left / (training.sample * (1 + FRAGMENTATION)))


@dataclass(frozen=True)
class Choice:
    """What `choose` decided, and the reason in one line. zero None: nothing fits on this many GPUs."""

    zero: int | None
    offload: str
    reason: str


def choose(training: Training, gpus: int, micro_batch: int, gpu_bytes: float) -> Choice:
    """The lightest ZeRO stage and offload that fits; never stage 0, whose bf16 training is wrong."""
    for zero, offload in MODES[1:]:
        need = estimate(training, gpus, zero, offload, micro_batch).total
        if need <= gpu_bytes:
            where = f", {offload} offload" if offload != "none" else ""
            room = f"{need / GIB:.1f} of {gpu_bytes / GIB:.1f} GiB on each of {gpus} GPU(s)"
            text = f"ZeRO-{zero}{where}: {room} at micro-batch {micro_batch}"
            return Choice(zero, offload, text)
    return Choice(
        None, "none", f"no ZeRO stage fits {gpu_bytes / GIB:.1f} GiB on {gpus} GPU(s) at micro-batch {micro_batch}"
    )


def smallest_change(training: Training, gpus: int, gpu_bytes: float) -> str:
    """What to change when not even a micro-batch of 1 fits: stage and offload, then the number of GPUs."""
    for count in (gpus, *(n for n in (2, 4, 8, 16, 32, 64) if n > gpus)):
        choice = choose(training, count, 1, gpu_bytes)
        if choice.zero is not None:
            more = f" --gpus {count}" if count != gpus else ""
            return f"--zero {choice.zero} --offload {choice.offload}{more} with micro_batch 1"
    return "a GPU with more memory, or a lower resolution or rank: 64 GPUs do not suffice"


def table(training: Training) -> list[dict]:
    """The table of ZeRO stage x GPUs in GiB, with the largest micro-batch on each known card."""
    rows = []
    for zero, offload in MODES:
        for gpus in (1,) if zero == 0 else GPU_COUNTS:
            row = estimate(training, gpus, zero, offload, 1).gib()
            for card, gib in GPUS.items():
                row[f"max_micro_batch_{card}"] = max_micro_batch(training, gpus, zero, offload, gib * GIB)
            rows.append(row)
    return rows
