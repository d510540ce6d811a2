"""Starting the ranks of a job: `--gpus N` on this host, `--hostfile FILE` on several (see `hosts`).

The command becomes the parent of N copies of itself, which torch's elastic agent starts and watches. Rank 0 speaks,
with the parent's own streams; the others write to log files in the run folder. The parent holds the store through which
the ranks know of one another, so that it knows what the others saw when rank 0 is killed. After a crash everything
starts again, with a new store, as often as `--restarts` says; the run's journal says where to go on.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING

import psutil

from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import InputError, RankLost, ResourceError, Terminated, TerminatedRun
from dcgen_convert.ranks import hosts, join
from dcgen_convert.ranks.link import END, FAILURE, PARENT, failure
from dcgen_convert.ranks.machine import Machine

if TYPE_CHECKING:
    from torch.distributed import Store

LOG = "log-launcher.txt"
SAVE_SECONDS = 1800  # longest wait for the ranks after SIGINT or SIGTERM: they write a checkpoint first


def wanted(machine: Machine) -> bool:
    """Whether this process must start the ranks; False when it is one of them, or alone.

    Raises:
        InputError: another launcher has started the ranks, and an option says otherwise.
    """
    if "RANK" not in os.environ:
        return bool(machine.hostfile) or (machine.gpus or 1) > 1 or machine.restarts > 0
    count = machine.gpus if join.LAUNCHED in os.environ or machine.hostfile else join.world()
    if machine.gpus not in (None, count):
        raise InputError(f"a launcher has started {count} ranks, --gpus asks for {machine.gpus}", "leave out --gpus")
    if machine.restarts and join.LAUNCHED not in os.environ:
        raise InputError("a launcher has started the ranks, so --restarts has no effect", "torchrun has --max-restarts")
    return False


def run(
    arguments: list[str],
    machine: Machine,
    run_dir: Path,
    console: Console,
    result: IO[str],
    require: Callable[[int], None],
) -> int:
    """Run `dcgen-convert ARGUMENTS` as the ranks that ``machine`` asks for, again after a crash; the exit code.

    Args:
        require: is called with the number of ranks before any is started, and raises what they cannot do.

    Raises:
        InputError: a bad hostfile, or a host that is not reachable.
        ResourceError: this host has GPUs, but fewer than ranks.
        RankLost: a rank was killed or crashed, and rank 0 could not say so.
        Terminated, KeyboardInterrupt: a signal came before rank 0 listened for it.
    """
    node = hosts.Node.of_environment()
    if node is not None:
        return _run_here(arguments, node, run_dir, result)
    each = hosts.ranks_of(machine.hostfile, machine.gpus) if machine.hostfile else {"localhost": machine.gpus or 1}
    require(sum(each.values()))
    _say(each, console)
    os.environ[join.JOB] = uuid.uuid4().hex
    try:
        for left in reversed(range(machine.restarts + 1)):
            os.environ[join.LAUNCHED] = str(left)
            code = _once(arguments, each, run_dir, console, result, last=left == 0)
            if code != join.AGAIN:
                break
            console.say(f"the ranks start again and go on from the journal of {run_dir}; restarts left: {left - 1}")
    finally:
        del os.environ[join.JOB], os.environ[join.LAUNCHED]
    return code


def _once(
    arguments: list[str], each: dict[str, int], run_dir: Path, console: Console, result: IO[str], last: bool
) -> int:
    try:
        if len(each) == 1 and hosts.is_here(*each):
            return _run_here(arguments, hosts.Node(sum(each.values())), run_dir, result)
        return hosts.run(arguments, each, result)
    except RankLost as error:
        if last:
            raise
        console.warn(error.message)
        return join.AGAIN


def _say(each: dict[str, int], console: Console) -> None:
    import torch

    count, found = sum(each.values()), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if list(each) == ["localhost"] and found and count > found:
        raise ResourceError(
            f"--gpus asks for {count} GPUs, this host has {found}", f"use --gpus {found} or a --hostfile"
        )
    place = f"{count} GPUs" if found else f"{count} CPU processes, for want of a GPU"
    place = place if list(each) == ["localhost"] else f"{count} on {', '.join(each)}"
    console.say(f"ranks: {place}; rank 0 speaks, the others write {join.log_name(1)} ... in the run folder")


def _run_here(arguments: list[str], node: hosts.Node, run_dir: Path, result: IO[str]) -> int:
    """The ranks of this host, under torch's agent; the exit code of rank 0, where it is one of them."""
    from torch.distributed import TCPStore
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    patience, first = timedelta(seconds=join.JOIN_SECONDS), node.number == 0
    store = TCPStore(node.address, node.port, None, first, patience, wait_for_workers=False, multi_tenant=True)
    config = LaunchConfig(
        min_nodes=node.nodes,
        max_nodes=node.nodes,
        nproc_per_node=node.ranks,
        rdzv_backend="static",
        rdzv_endpoint=f"{node.address}:{store.port}",
        rdzv_configs={"rank": node.number, "timeout": join.JOIN_SECONDS},
        run_id="dcgen",
        max_restarts=0,  # `run` starts again: with a new store, and only after a crash
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        signals_to_handle="SIGINT,SIGTERM",
        shutdown_timeout=SAVE_SECONDS,
    )
    command = ["-m", "dcgen_convert.cli", *(argument.replace("$", "$$") for argument in arguments)]
    with _prepared(node, run_dir, result):
        try:
            elastic_launch(config, sys.executable)(*command)
            return 0
        except ChildFailedError as error:
            codes = {rank: found.exitcode for rank, found in error.failures.items()}
            return _outcome(codes, store, run_dir) if node.number == 0 else RankLost.exit_code
        except SignalException as error:
            if node.number == 0 and node.world > 1 and _said(store, END) != str(128 + error.sigval):
                raise (Terminated if error.sigval == signal.SIGTERM else KeyboardInterrupt) from error
            return 128 + error.sigval
        finally:
            for child in psutil.Process().children(recursive=True):
                child.kill()


@contextmanager
def _prepared(node: hosts.Node, run_dir: Path, result: IO[str]) -> Iterator[None]:
    """The ranks inherit stdout and the environment; the agent's own words go to a log file."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGTSTP)
    handlers = {number: signal.getsignal(number) for number in signals}
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # the ranks would not stop, but find that the store is silent
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // node.ranks)))
    os.environ[PARENT] = str(os.getpid())
    agent = logging.getLogger("torch.distributed.elastic")
    agent.handlers, agent.propagate = [logging.FileHandler(run_dir / LOG)], False
    stdout = os.dup(1)
    os.dup2(result.fileno(), 1)
    try:
        yield
    finally:
        del os.environ[PARENT]
        os.dup2(stdout, 1)
        os.close(stdout)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _outcome(codes: dict[int, int], store: Store, run_dir: Path) -> int:
    """Rank 0's exit code, when it could say why; else RankLost with what the other ranks saw, or the agent."""
    stopped = TerminatedRun.exit_code  # rank 0's, because the agent stopped it: another rank was killed before
    if codes.get(0, -1) > 0 and not (codes[0] == stopped and min(codes.values()) < 0):
        return codes[0]
    if told := _said(store, FAILURE):
        raise failure(json.loads(told), "")
    rank = next((rank for rank, code in codes.items() if code < 0), min(codes))
    raise RankLost(f"rank {rank} {_fate(codes[rank])}; its log is {run_dir / join.log_name(rank)}")


def _said(store: Store, key: str) -> str:
    """What the ranks left in the store under ``key``."""
    return store.get(f"dcgen/0/{key}").decode() if store.check([f"dcgen/0/{key}"]) else ""


def _fate(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    name = signal.Signals(-code).name
    hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"
