"""Where a run happens: GPUs, hosts, network, trackers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """Where a run happens and who watches: no part of the recipe, so it never changes a fingerprint.

    track: "tensorboard" | "wandb" | None; rank_timeout: seconds without a sign of life or of progress that end the job,
    0 disables; restarts: how often the ranks start again after a crash; check: whether what earlier stages wrote is
    compared with its hashes before it is used.
    """

    gpus: int | None = None
    hostfile: str | None = None
    offline: bool = False
    track: str | None = None
    rank_timeout: float = 120.0
    restarts: int = 0
    check: bool = True
