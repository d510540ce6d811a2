"""Process bring-up: one process without a launcher, or one rank of many. The same calls serve both.

torch and DeepSpeed are imported inside the functions. DeepSpeed binds its logger to stdout when it is imported; stdout
belongs to the result, so the import happens with stdout turned away.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dcgen_convert.core.errors import ResourceError
from dcgen_convert.ranks.join import TIMEOUT, free_port
from dcgen_convert.ranks.join import rank as rank
from dcgen_convert.ranks.join import world as world_size

if TYPE_CHECKING:
    import torch


@cache
def deepspeed() -> ModuleType:
    """The deepspeed package, imported quietly, without its compiled shared-memory op.

    The op is built on first use (a minute, needs a compiler on PATH) and gloo does without it.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed as module
        from deepspeed.utils import logger

        with _no_compiler():
            import deepspeed.runtime.zero.muon.original_muon
    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:
        handler.setLevel(logging.ERROR)
    module.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return module


@contextlib.contextmanager
def _no_compiler() -> Iterator[None]:
    """`torch.compile` as a decorator that changes nothing.

    DeepSpeed imports its Muon optimizer, which nothing here uses, and decorates three of its functions with
    `torch.compile`. That alone imports torch's compiler, two seconds in every process that trains.
    """
    import torch

    names = vars(torch)
    before, names["compile"] = names["compile"], lambda function: function
    try:
        yield
    finally:
        names["compile"] = before


@contextlib.contextmanager
def launch_environment() -> Iterator[None]:
    """RANK, WORLD_SIZE, ... as DeepSpeed demands them; set here when no launcher did, and taken back afterwards.

    Taken back because child processes inherit the environment and would otherwise try to join this process's group.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ResourceError(
                f"RANK and WORLD_SIZE are set, but {' and '.join(missing)} not: this rank cannot find the others",
                hint="start the ranks with torchrun, or unset RANK and WORLD_SIZE for one process",
            )
        os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
        yield
        return
    os.environ["LOCAL_RANK"] = "0"  # ZeRO 3 reads it in every first forward pass, so this one stays
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    before = {name: os.environ.get(name) for name in alone}
    os.environ.update(alone)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def join() -> None:
    """Make or join the process group, once. Call inside `launch_environment`."""
    import torch

    module = deepspeed()
    if not module.comm.is_initialized():  # it takes over the group that the ranks met in
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        module.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=TIMEOUT)


def leave() -> None:
    """Destroy the process group if there is one."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def mean_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Mean of each value over the ranks (one small collective); the values themselves with one rank."""
    import torch

    if world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor)
    return (tensor / world_size()).tolist()


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` summed over the ranks, in place."""
    import torch

    if world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def of_rank_0(value: int, device: torch.device) -> int:
    """Rank 0's ``value`` on every rank."""
    import torch

    if world_size() == 1:
        return value
    tensor = torch.tensor([value], device=device)
    torch.distributed.broadcast(tensor, 0)
    return int(tensor.item())


def of_all(value: object, device: torch.device) -> list[Any]:
    """Every rank's ``value`` (small, of JSON's types), by rank, on every rank."""
    import torch

    if world_size() == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    torch.distributed.all_gather(lengths, torch.tensor([len(data)], device=device))
    longest = max(int(length) for length in lengths)
    found = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in lengths]
    torch.distributed.all_gather(found, torch.nn.functional.pad(data, (0, longest - len(data))))
    return [
        json.loads(part[: int(length)].cpu().numpy().tobytes()) for part, length in zip(found, lengths, strict=True)
    ]


def agree(ok: bool, device: torch.device) -> bool:
    """Whether ``ok`` holds on every rank. Ranks that would wait for a failed one learn of it here."""
    import torch

    if world_size() == 1:
        return ok
    flag = torch.tensor([int(ok)], device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
    return bool(flag.item())
