"""Which rank this process is, by the variables of whatever started it, and how the ranks find one another.

torchrun and DeepSpeed's launcher set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; those of SLURM (srun)
and MPI are translated to these. No torch at import: the command line reads this before it knows the verb.
"""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import closing, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

import psutil

from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import DcgenError, InputError, RankLost, ResourceError
from dcgen_convert.ranks.crew import SOLO, Crew, Leader, Member
from dcgen_convert.ranks.link import PARENT, SILENCE

if TYPE_CHECKING:
    from torch.distributed import Store

JOIN_SECONDS = 300  # longest wait for all ranks, or hosts, to be there: they load Python at very different speeds
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
JOB_NAMES = ("SLURM_JOB_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID")
LAUNCHED = "DCGEN_LAUNCHED"  # set for ranks that this command started: how often it will start them again
JOB = "DCGEN_JOB"  # a name that all starts of one job have in common
NODE = "DCGEN_NODE"  # set for the agents of `hosts`
AGENT = "TORCHELASTIC_RUN_ID"  # set by torch's elastic agent, whoever runs it
AGAIN = 75  # exit code of a crash after which the ranks start again; only the command that started them sees it
TIMEOUT = timedelta(minutes=30)  # longest wait of one collective: a save by rank 0, or a slow rank's data
FOR_EVER = timedelta(days=7)  # longest work of rank 0 alone, while the others wait for the next task


def adopt(env: MutableMapping[str, str] = os.environ) -> None:
    """Translate what SLURM or MPI says into RANK, WORLD_SIZE, ...; what is set already stays."""
    if "RANK" in env and "WORLD_SIZE" in env:
        return
    place = _slurm(env) or _mpi(env)
    if place is None or int(place["WORLD_SIZE"]) == 1:
        return
    if "MASTER_PORT" not in env:  # every rank must come to the same number without talking to the others
        name = next((env[key] for key in JOB_NAMES if env.get(key)), "") + env.get("SLURM_STEP_ID", "")
        place["MASTER_PORT"] = str(20_000 + zlib.crc32(name.encode()) % 20_000)
    for key, value in place.items():
        env.setdefault(key, value)


def _slurm(env: Mapping[str, str]) -> dict[str, str] | None:
    # SLURM_STEP_NUM_TASKS is srun's own: a batch script that starts one process also sees SLURM_NTASKS.
    if "SLURM_PROCID" not in env or "SLURM_STEP_NUM_TASKS" not in env:
        return None
    place = {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": env.get("SLURM_LOCALID", "0"),
    }
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    return {**place, "MASTER_ADDR": first_host(nodes)} if nodes else place


def _mpi(env: Mapping[str, str]) -> dict[str, str] | None:
    for rank, size, local, local_size in MPI:
        if rank in env and size in env:
            place = {"RANK": env[rank], "WORLD_SIZE": env[size], "LOCAL_RANK": env.get(local, "0")}
            return {**place, "MASTER_ADDR": "127.0.0.1"} if env.get(local_size) == env[size] else place
    return None


def first_host(nodes: str) -> str:
    """First host of a SLURM node list: `gpu[07-09,12],login` -> `gpu07`."""
    found = re.match(r"([^,\[]+)(?:\[([^\]]*)\]([^,\[]*))?", nodes)
    if found is None:
        return nodes
    head, numbers, tail = found.groups()
    return head + (re.split(r"[-,]", numbers)[0] + (tail or "") if numbers else "")


def rank(env: Mapping[str, str] = os.environ) -> int:
    """This process's rank, 0 without a launcher."""
    return int(env.get("RANK") or 0)


def world(env: Mapping[str, str] = os.environ) -> int:
    """Number of ranks of the job that this process belongs to, 1 without a launcher."""
    return int(env.get("WORLD_SIZE") or 1) if "RANK" in env else 1


def alone(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment for a child process that is no rank."""
    return {key: value for key, value in env.items() if key not in (*PLACE, LAUNCHED, JOB, NODE, AGENT, PARENT)}


def is_launched(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several ranks that this command started."""
    return world(env) > 1 and LAUNCHED in env


def starts_again(env: Mapping[str, str] = os.environ) -> bool:
    """Whether the command that started this process will start it again after a crash."""
    return int(env.get(LAUNCHED, 0)) > 0


def log_name(number: int) -> str:
    """File in the run folder that rank ``number`` logs to."""
    return f"log-rank-{number}.txt" if number else "log.txt"


def join(log: str, give_up: Callable[[DcgenError], None], console: Console, silence: float = SILENCE) -> Crew:
    """Meet the other ranks; `SOLO` without any. Every rank calls it.

    Args:
        log: this rank's log file, named when it is lost.
        give_up: must end the process; see `crew`.
        silence: seconds without a sign of life or of progress that end the job, 0 for any number.
    Raises:
        InputError: the launcher did not say where rank 0 is.
        ResourceError: this host has fewer GPUs than ranks.
        RankLost: rank 0 is not there.
    """
    count = world()
    if count == 1:
        return SOLO
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"this is rank {rank()} of {count}, but these variables are not set: {', '.join(missing)}",
            "set them to the host of rank 0 and a free port, or start the ranks with torchrun",
        )
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
    _take_gpu()
    _take_interface(os.environ["MASTER_ADDR"])
    import torch
    import torch.distributed as dist

    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    prefix = f"dcgen/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    stores = [_store(prefix, host=rank() == 0 and not hosted and first) for first in (True, False)]
    crew = (Member if rank() else Leader)(rank(), count, stores[1], hosted, log, give_up, silence)
    crew.meet()
    console.detail(f"rank {rank()} of {count} on {socket.gethostname()}, process {os.getpid()}")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    store = dist.PrefixStore("groups", stores[0])
    dist.init_process_group(backend, store=store, rank=rank(), world_size=count, timeout=TIMEOUT)
    crew.control = dist.new_group(backend="gloo", timeout=FOR_EVER)
    crew.close_ring(dist.new_group(backend="gloo", timeout=FOR_EVER))
    return crew


def _take_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        return
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= count:
        raise ResourceError(
            f"rank {rank()} needs GPU {local} of {socket.gethostname()}, which shows {count} (the first is 0)",
            "start as many ranks as the host has GPUs; CUDA_VISIBLE_DEVICES may hide some",
        )
    torch.cuda.set_device(local)


def _store(prefix: str, host: bool) -> Store:
    """A connection of its own to torch's store, at MASTER_ADDR:MASTER_PORT; ``host``: this process holds the store."""
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = timedelta(seconds=JOIN_SECONDS)
    try:
        store = dist.TCPStore(address, port, None, host, patience, wait_for_workers=False, multi_tenant=True)
    except dist.DistError as error:
        raise RankLost(f"rank {rank()} found no rank 0 at {address}:{port}: {str(error).splitlines()[0]}") from error
    return dist.PrefixStore(prefix, store)


def _take_interface(address: str) -> None:
    """Let gloo use the network that leads to rank 0; it would take the one that this host's name resolves to."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe, suppress(OSError):
        probe.connect((address, 9))  # sends nothing
        here = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if here in [found.address for found in addresses]:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
