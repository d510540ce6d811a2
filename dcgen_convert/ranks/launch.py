"""Starting the ranks of a job: `--gpus N` on this host, `--hostfile FILE` on several (see `hosts`).

The command becomes the parent of N copies of itself. Rank 0 speaks, with the parent's own streams; the others write to
log files in the run folder. The parent forwards signals to rank 0, which stops the others, and sees to it that nothing
of the job outlives a dead rank or the parent.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import InputError, RankLost, ResourceError, Terminated
from dcgen_convert.ranks import join
from dcgen_convert.ranks.machine import Machine

POLL = 0.1  # seconds between two looks at the ranks
GRACE = 10.0  # seconds for the ranks to end by themselves after one has ended; they notice within two


def wanted(machine: Machine) -> bool:
    """Whether this process must start the ranks; False when it is one of them, or alone.

    Raises:
        InputError: a launcher has started another number of ranks than --gpus asks for.
    """
    count = join.world()
    if count == 1:
        return bool(machine.hostfile) or (machine.gpus or 1) > 1
    asked = None if machine.hostfile or join.LAUNCHED in os.environ else machine.gpus
    if asked not in (None, count):
        raise InputError(f"a launcher has started {count} ranks, --gpus asks for {asked}", "leave out --gpus")
    return False


def run(arguments: list[str], count: int, run_dir: Path, console: Console, result: IO[str]) -> int:
    """Run `dcgen-convert ARGUMENTS` as ``count`` ranks on this host; the job's exit code.

    Raises:
        ResourceError: this host has GPUs, but fewer than ``count``.
        RankLost: a rank was killed or crashed, and rank 0 could not say so.
        Terminated, KeyboardInterrupt: a signal came before rank 0 listened for it.
    """
    _say(count, console)
    environment = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(join.free_port()),
        join.LAUNCHED: "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count)),
    }
    started: list[subprocess.Popen] = []
    with _forwarding(started) as received:
        try:
            for number in range(count):
                place = {**environment, "RANK": str(number), "LOCAL_RANK": str(number)}
                started.append(_start(arguments, {**join.alone(), **place}, number, run_dir, result))
            return _wait(started, run_dir, received)
        finally:
            for process in started:
                process.kill()
                process.wait()


def _say(count: int, console: Console) -> None:
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found and count > found:
        raise ResourceError(
            f"--gpus asks for {count} GPUs, this host has {found}", f"use --gpus {found} or a --hostfile"
        )
    place = f"{count} GPUs" if found else f"{count} CPU processes, for want of a GPU"
    console.say(f"ranks: {place}; rank 0 speaks, the others write {join.log_name(1)} ... in the run folder")


def _start(arguments: list[str], env: dict[str, str], number: int, run_dir: Path, result: IO[str]) -> subprocess.Popen:
    """One rank in a session of its own: Ctrl-C reaches the parent alone, which passes it on once."""
    command = [sys.executable, "-m", "dcgen_convert.cli", *arguments]
    settings = {"stdin": subprocess.PIPE, "env": env, "start_new_session": True}
    if number == 0:
        return subprocess.Popen(command, stdout=result, **settings)
    with open(run_dir / join.log_name(number), "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, **settings)


@contextmanager
def _forwarding(started: list[subprocess.Popen]) -> Iterator[list[int]]:
    """Pass SIGINT and SIGTERM to rank 0; a third one kills. Yields the signals received."""
    received: list[int] = []

    def handler(number: int, frame: object) -> None:
        received.append(number)
        for process in started if len(received) > 2 else started[:1]:
            process.send_signal(signal.SIGKILL if len(received) > 2 else number)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, kept in before.items():
            signal.signal(number, kept)


def _wait(started: list[subprocess.Popen], run_dir: Path, received: list[int]) -> int:
    """Until every rank has ended, or has to."""
    deadline = None
    while any(process.poll() is None for process in started):
        ended = [process.returncode for process in started if process.returncode is not None]
        if deadline is None and ended and (started[0].returncode is not None or any(ended)):
            deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(POLL)
    code = started[0].poll()
    if code is not None and code >= 0:
        return code  # rank 0 has said why
    if received and (code is None or -code in received or len(received) > 2):
        raise Terminated if received[0] == signal.SIGTERM else KeyboardInterrupt
    # Others that ended with a lost rank's code say that rank 0, which is still there, has frozen.
    fates = [process.poll() for process in started]
    number = next((i for i, fate in enumerate(fates) if i and fate and fate != RankLost.exit_code), 0)
    number = 0 if code is not None else number
    raise RankLost(f"rank {number} {_fate(started[number])}; its log is {run_dir / join.log_name(number)}")


def _fate(process: subprocess.Popen) -> str:
    if process.returncode is None:
        return "does not answer: it is stopped, or it hangs"
    if process.returncode >= 0:
        return f"ended with code {process.returncode}"
    name = signal.Signals(-process.returncode).name
    hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"
