"""Which rank this process is, by the variables of whatever started it, and how the ranks find one another.

torchrun and DeepSpeed's launcher set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; those of SLURM (srun)
and MPI are translated to these. No torch at import: the command line reads this before it knows the verb.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import time
import zlib
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import closing
from datetime import timedelta

from dcgen_convert.core.errors import DcgenError, InputError, RankLost, ResourceError
from dcgen_convert.ranks.crew import SILENCE, SOLO, Crew, Leader, Member, Peer

JOIN_SECONDS = 300.0  # longest wait for all ranks to be there: hosts load Python at very different speeds
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
JOB_NAMES = ("SLURM_JOB_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID")
LAUNCHED = "DCGEN_LAUNCHED"  # set for ranks that this command started: their stdin ends when that command dies
DEAD_PEER = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 25_000}  # s, s, probes, ms


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
    return {key: value for key, value in env.items() if key not in (*PLACE, LAUNCHED)}


def log_name(number: int) -> str:
    """File in the run folder that rank ``number`` logs to."""
    return f"log-rank-{number}.txt" if number else "log.txt"


def join(log: str, give_up: Callable[[DcgenError], None], console, timeout: float = SILENCE) -> Crew:
    """Meet the other ranks; `SOLO` without any. Every rank calls it.

    Args:
        log: this rank's log file, named when it is lost.
        give_up: must end the process; see `crew`.
        timeout: seconds after which a silent rank counts as frozen, 0 for never.
    Raises:
        InputError: the launcher did not say where rank 0 is.
        ResourceError: this host has fewer GPUs than ranks.
        RankLost: not every rank came.
    """
    count = world()
    if count == 1:
        return SOLO
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"this is rank {rank()} of {count}, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} "
            "not set",
            "set them to the host of rank 0 and a free port, or start the ranks with torchrun",
        )
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
    _take_gpu()
    address, store = os.environ["MASTER_ADDR"], _store()
    if rank() == 0:
        return Leader(_accept(address, store, count), give_up, timeout)
    line = _connect(address, store, log)
    console.detail(f"rank {rank()} of {count} on {socket.gethostname()}, process {os.getpid()}")
    return Member(rank(), count, Peer(0, line), give_up, timeout)


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


def _store():
    """The key-value store of the launcher, or of rank 0."""
    import torch

    try:
        store, _, _ = next(torch.distributed.rendezvous("env://", timeout=timedelta(seconds=JOIN_SECONDS)))
    except torch.distributed.DistError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankLost(f"rank {rank()} found no rank 0 at {place}: {str(error).splitlines()[0]}") from error
    return store


def _accept(address: str, store, count: int) -> list[Peer]:
    """The lines of all other ranks, by rank."""
    try:
        server = socket.create_server((address, 0), backlog=count)
    except OSError:  # an address that others use and this host does not know, as behind a bridge
        server = socket.create_server(("", 0), backlog=count)
    token, peers = secrets.token_hex(16), {}
    deadline = time.monotonic() + JOIN_SECONDS
    with server:
        store.set("dcgen/line", f"{server.getsockname()[1]} {token}")
        while len(peers) < count - 1:
            server.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                peer = _greet(server.accept()[0], token)
            except TimeoutError:
                absent = ", ".join(str(number) for number in range(1, count) if number not in peers)
                raise RankLost(
                    f"rank {absent} of {count} did not come within {JOIN_SECONDS:.0f} s",
                    "look at the logs of the ranks, then start all of them again",
                ) from None
            if peer is not None:
                peers[peer.rank] = peer
    return [peers[number] for number in sorted(peers)]


def _greet(line: socket.socket, token: str) -> Peer | None:
    """The rank at the other end; None for a caller that does not know the token."""
    line.settimeout(10)
    peer = Peer(-1, line)
    try:
        hello = (peer.receive() or [{}])[0]
    except (ValueError, IndexError):
        hello = {}
    if not secrets.compare_digest(str(hello.get("token")), token):
        line.close()
        return None
    _outlive(line)
    peer.rank, peer.log = hello["rank"], hello["log"]
    return peer


def _connect(address: str, store, log: str) -> socket.socket:
    port, token = store.get("dcgen/line").decode().split()
    try:
        line = socket.create_connection((address, int(port)), timeout=30)
    except OSError as error:
        raise RankLost(f"rank {rank()} cannot reach rank 0 at {address}:{port}: {error}") from error
    _outlive(line)
    Peer(0, line).send({"token": token, "rank": rank(), "log": log})
    return line


def _outlive(line: socket.socket) -> None:
    """Blocking, but a host that vanishes without closing its connections is noticed within half a minute."""
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in DEAD_PEER.items():
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
