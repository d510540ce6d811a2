"""`--hostfile FILE`: one agent per host, started over ssh; each starts the ranks of its host (see `launch`).

An agent gets what it needs, secrets of the environment included, as one JSON line on its stdin; every further line is
the number of a signal. When this process dies, of whatever, that stdin ends, and the agent stops its ranks.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from dcgen_convert.core.errors import InputError, RankLost
from dcgen_convert.core.files import read_lines
from dcgen_convert.ranks import join
from dcgen_convert.ranks.join import NODE
from dcgen_convert.ranks.machine import Machine

SSH = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=5"]
LINE = re.compile(r"([A-Za-z0-9_][\w.@:%-]*)\s+slots=(\d{1,4})")  # a host that began with - would be an option of ssh
MOST = 1024  # ranks of one host
SSH_FAILED = 255  # its exit code when not the command, but the connection failed
GRACE = 20.0  # seconds for the other agents to end by themselves after the one of rank 0
PORTS = range(20_000, 32_000)  # below those that systems give to outgoing connections
PASSED = ("PATH", "LD_LIBRARY_PATH", "LANG", "CI")
PASSED_FAMILIES = ("HF_", "DCGEN_", "PYTHON", "NCCL_", "GLOO_", "TORCH_", "OMP_", "CUDA_", "DS_")


@dataclass(frozen=True)
class Node:
    """One host of a job: its ranks, its number of ``nodes``, ``world`` ranks on all of them, and the store's place."""

    ranks: int
    number: int = 0
    nodes: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    others: int = 0

    @property
    def world(self) -> int:
        return self.ranks + self.others

    @classmethod
    def of_environment(cls) -> Node | None:
        """What this process is told to be by `run`; None when it is no agent."""
        return cls(**json.loads(os.environ[NODE])) if NODE in os.environ else None


def slots(path: str) -> dict[str, int]:
    """Host -> number of ranks of a hostfile with lines `HOST slots=N`; `#` begins a comment.

    Raises:
        InputError: no such file, a line of another form (named), or no host.
    """
    if not Path(path).is_file():
        raise InputError(f"the hostfile {path} does not exist", "give a file with lines like: node1 slots=8")
    found: dict[str, int] = {}
    for number, line in enumerate(read_lines(Path(path)), 1):
        text = line.partition("#")[0].strip()
        match = LINE.fullmatch(text)
        if text and (match is None or match[1] in found or not 0 < int(match[2]) <= MOST):
            raise InputError(
                f"{path} line {number} is not HOST slots=N for a new host, N from 1 to {MOST}: {text!r}",
                "e.g. node1 slots=8",
            )
        if match:
            found[match[1]] = int(match[2])
    if not found:
        raise InputError(f"the hostfile {path} names no host", "give a file with lines like: node1 slots=8")
    return found


def ranks_of(hostfile: str, most: int | None) -> dict[str, int]:
    """Host -> number of ranks, at most ``most``; InputError when a host is not reachable."""
    each = {host: min(count, most or count) for host, count in slots(hostfile).items()}
    first, far = next(iter(each)), [host for host in each if not is_here(host)]
    if far and shutil.which("ssh") is None:
        raise InputError("other hosts need ssh, which is not on PATH", "install ssh, or start the ranks with torchrun")
    if far and first.startswith(("localhost", "127.")):
        raise InputError(
            f"other hosts of {hostfile} cannot reach {first}", "write the name that they know this host by"
        )
    for host in far:
        if subprocess.run([*SSH, host, "true"], stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode:
            raise InputError(f"{host} of the hostfile is not reachable by ssh without a password", f"ssh {host} true")
    return each


def world_of(machine: Machine) -> int:
    """Ranks of a job on ``machine``, on all hosts; those of the launcher that started this process count too.

    Raises:
        InputError: the hostfile is not there, or damaged.
    """
    if machine.hostfile:
        return sum(min(count, machine.gpus or count) for count in slots(machine.hostfile).values())
    return machine.gpus or join.world()


def is_here(host: str) -> bool:
    """Whether ``host`` is this one."""
    return host in ("localhost", "127.0.0.1", socket.gethostname())


def run(arguments: list[str], each: dict[str, int], result: IO[str]) -> int:
    """Run `dcgen-convert ARGUMENTS` on all hosts; the exit code of the first, which has rank 0 and writes ``result``.

    Raises:
        RankLost: the agent of the first host was lost.
    """
    first, port, world = next(iter(each)), random.choice(PORTS), sum(each.values())
    env = {key: value for key, value in os.environ.items() if key in PASSED or key.startswith(PASSED_FAMILIES)}
    agents: dict[str, subprocess.Popen] = {}

    def send(number: int, _frame: object) -> None:
        for agent in agents.values():
            _write(agent, str(number))

    handlers = {number: signal.signal(number, send) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number, (host, count) in enumerate(each.items()):
            node = Node(count, number, len(each), first, port, world - count)
            command = [sys.executable, "-m", "dcgen_convert.ranks.hosts"]
            command = command if is_here(host) else [*SSH, host, " ".join(command)]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL if number else result}
            agents[host] = subprocess.Popen(command, bufsize=0, start_new_session=True, **pipes)
            document = {"arguments": arguments, "folder": os.getcwd(), "env": {**env, NODE: json.dumps(asdict(node))}}
            _write(agents[host], json.dumps(document))
        return _wait(agents, first)
    finally:
        for agent in agents.values():
            agent.kill()
            agent.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _write(agent: subprocess.Popen, line: str) -> None:
    assert agent.stdin is not None  # a pipe
    with suppress(OSError):  # it has ended
        agent.stdin.write(f"{line}\n".encode())


def _wait(agents: dict[str, subprocess.Popen], first: str) -> int:
    code = agents[first].wait()
    deadline = time.monotonic() + GRACE
    while any(agent.poll() is None for agent in agents.values()) and time.monotonic() < deadline:
        time.sleep(0.1)
    if code < 0 or code == SSH_FAILED:
        raise RankLost(f"{first}, the host of rank 0, was lost")
    return code


def follow_stdin() -> None:
    """As an agent: pass on the signals that `run` sends, and stop when it died."""

    def follow() -> None:
        for line in open(0, closefd=False):  # noqa: SIM115
            os.kill(os.getpid(), int(line))
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True, name="stdin").start()


def main() -> None:
    """Become the agent that the line on stdin describes."""
    with open(0, "rb", buffering=0, closefd=False) as stdin:  # unbuffered: the next lines are not for this program
        document = json.loads(stdin.readline())
    os.chdir(document["folder"])
    os.environ.update(document["env"])
    os.execv(sys.executable, [sys.executable, "-m", "dcgen_convert.cli", *document["arguments"]])


if __name__ == "__main__":
    main()
