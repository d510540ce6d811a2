"""`--hostfile FILE`: the ranks of several hosts, started by DeepSpeed's launcher (ssh through pdsh; one host needs
neither).

That launcher prints on stdout, turns signals into kills and loses exit codes. So the run folder, which every host sees,
carries what matters: rank 0 leaves its result and exit code in OUTCOME, and looks for STOP once a second.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import InputError, RankLost
from dcgen_convert.core.files import atomic_write, read_json, write_json
from dcgen_convert.ranks import join

if TYPE_CHECKING:  # the command line imports this file before it knows the verb
    from dcgen_convert.ranks.machine import Machine

OUTCOME, STOP, LOG = "outcome.json", "stop", "log-launcher.txt"
SSH_SECONDS = 15  # longest wait for one host
LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*")


def slots(path: str) -> dict[str, int]:
    """Host -> number of ranks of a hostfile with lines `HOST slots=N`; `#` begins a comment.

    Raises:
        InputError: no such file, a line of another form (named), or no host.
    """
    if not Path(path).is_file():
        raise InputError(f"the hostfile {path} does not exist", "give a file with lines like: node1 slots=8")
    found: dict[str, int] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        text = line.partition("#")[0].strip()
        match = LINE.fullmatch(text)
        if text and (match is None or match[1] in found or not int(match[2])):
            raise InputError(f"{path} line {number} is not HOST slots=N for a new host: {text!r}", "e.g. node1 slots=8")
        if match and text:
            found[match[1]] = int(match[2])
    if not found:
        raise InputError(f"the hostfile {path} names no host", "give a file with lines like: node1 slots=8")
    return found


def run(arguments: list[str], machine: Machine, run_dir: Path, console: Console, result: IO[str]) -> int:
    """Run `dcgen-convert ARGUMENTS` on the hosts of ``machine.hostfile``; the job's exit code.

    Raises:
        InputError: a bad hostfile, or several hosts without pdsh.
        RankLost: rank 0 left no outcome.
    """
    hosts = slots(machine.hostfile)
    here = list(hosts) in (["localhost"], ["127.0.0.1"], [socket.gethostname()])
    if not here:
        _require_reachable(hosts)
    each = {host: min(count, machine.gpus or count) for host, count in hosts.items()}
    console.say(
        f"ranks: {sum(each.values())} on {', '.join(each)}; rank 0 speaks, the others write logs in the run folder"
    )
    for name in (OUTCOME, STOP):
        (run_dir / name).unlink(missing_ok=True)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(Path(machine.hostfile).absolute())]
    command += ["--master_port", str(join.free_port()), "--no_local_rank", "--no_ssh_check"]
    # Without the second flag DeepSpeed starts the ranks of a single host here, whatever its name.
    command += ["--master_addr", "127.0.0.1"] if here else ["--force_multi"]
    command += ["--num_gpus", str(machine.gpus)] if machine.gpus else []
    # The ranks must know that they came from here, also where the hostfile is that of a run's record.
    command += ["--module", "dcgen_convert.cli", *arguments, "--hostfile", machine.hostfile]
    command += ["--gpus", str(machine.gpus)] if machine.gpus else []
    received: list[int] = []

    def handler(number: int, frame: object) -> None:
        received.append(number)
        atomic_write(run_dir / STOP, str(number))

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    with open(run_dir / LOG, "ab") as log:
        launcher = subprocess.Popen(
            command, stdout=log, stdin=subprocess.DEVNULL, env=join.alone(), start_new_session=True
        )
    try:
        while launcher.poll() is None and len(received) < 3:
            time.sleep(0.2)
    finally:
        _end(launcher)
        for number, kept in before.items():
            signal.signal(number, kept)
    return _outcome(run_dir, result, launcher.returncode)


def _require_reachable(hosts: Iterable[str]) -> None:
    """InputError naming what is missing for DeepSpeed's launcher, which would answer with a traceback."""
    for name in ("pdsh", "ssh"):
        if shutil.which(name) is None:
            raise InputError(
                f"other hosts need {name}, which is not on PATH", f"install {name}, or start the ranks with torchrun"
            )
    for host in hosts:
        probe = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_SECONDS}", host, "true"]
        if subprocess.run(probe, stdin=subprocess.DEVNULL, capture_output=True).returncode:
            raise InputError(f"{host} of the hostfile is not reachable by ssh without a password", f"ssh {host} true")


def _end(launcher: subprocess.Popen) -> None:
    """Ask the launcher to kill its ranks, then kill what is left on this host."""
    if launcher.poll() is None:
        launcher.terminate()
        with suppress(subprocess.TimeoutExpired):
            launcher.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()


def _outcome(run_dir: Path, result: IO[str], code: int) -> int:
    path = run_dir / OUTCOME
    if not path.exists():
        raise RankLost(
            f"the launcher ended with code {code} and rank 0 left no result; its output is in {run_dir / LOG}"
        )
    outcome = read_json(path)
    result.write(outcome["result"])
    result.flush()
    return outcome["code"]


def leave(run_dir: Path, code: int, result: str) -> None:
    """Rank 0's last word: what the parent prints and returns."""
    with suppress(OSError):  # a full disk: the parent then says that nothing was left
        write_json(run_dir / OUTCOME, {"code": code, "result": result})


def heed_stop(run_dir: Path) -> None:
    """Turn the parent's request to stop into the signal that it got. Call on rank 0."""

    def watch() -> None:
        while True:
            try:
                number = int((run_dir / STOP).read_text())
                (run_dir / STOP).unlink()
                os.kill(os.getpid(), number)
            except (OSError, ValueError):
                time.sleep(1.0)

    threading.Thread(target=watch, daemon=True, name="stop").start()
