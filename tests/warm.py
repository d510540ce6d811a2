"""Processes that need not import the large packages again, which takes 9 s of a core.

Python's fork server imports them once per test process (`preloaded`). Each process is a fork of it, with arguments,
folder, environment, streams and signals of its own. It calls the real main function.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path

HERE = str(Path(__file__).parent)
SERVER = multiprocessing.get_context("forkserver")
# What a run or an import in the test process may have set meanwhile; each run has its own value, or sets it itself.
OWN = {"PYTEST_CURRENT_TEST", "DS_ACCELERATOR", "TQDM_DISABLE", "TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"}
# What torch and a training in the test process leave behind: no run needs it, and a fork would seem impossible.
LEFT = {"LOCAL_RANK", "PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHINDUCTOR_CACHE_DIR"}


def environment() -> dict[str, str]:
    """For the command: this repository's package, and no terminal."""
    path = os.pathsep.join(filter(None, [str(Path(HERE).parent), os.environ.get("PYTHONPATH", "")]))
    dropped = set() if "RANK" in os.environ else LEFT
    own = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**own, "CI": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


FIRST = environment()


def serves(env: dict[str, str], arguments: Sequence[str] = ()) -> bool:
    """Whether a fork may do: in a test, in the environment of the server, with quiet libraries."""
    changed = {name for name in env.keys() | FIRST.keys() if env.get(name) != FIRST.get(name)}
    return "PYTEST_CURRENT_TEST" in env and changed <= OWN and not {"-v", "--verbose"} & set(arguments)


def _start_server() -> None:
    """Let it import everything; a second call does nothing."""
    before = dict(os.environ)
    os.environ.update(FIRST, PYTHONPATH=os.pathsep.join([HERE, FIRST["PYTHONPATH"]]))
    try:
        SERVER.set_forkserver_preload(["preloaded"])
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


class WarmProcess:
    """A process that calls ``main`` with ``arguments`` in sys.argv; it offers what tests use of `subprocess.Popen`.

    Args:
        stderr: file to append to, instead of what `communicate` returns.
    """

    def __init__(
        self,
        main: Callable[[], object],
        arguments: Sequence[str],
        env: dict[str, str],
        cwd: Path | None = None,
        stderr: Path | None = None,
    ):
        _start_server()
        self.args = arguments
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name, "stdout"), stderr or Path(self._folder.name, "stderr")]
        streams = [str(file) for file in self._files]
        self._process = SERVER.Process(target=_run, args=(main, [*arguments], env, str(cwd or Path.cwd()), streams))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    returncode = property(poll)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        out, err = (file.read_text(encoding="utf-8") if file.exists() else "" for file in self._files)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(main: Callable[[], object], arguments: list[str], env: dict[str, str], cwd: str, streams: list[str]) -> None:
    """In the new process."""
    import numpy
    import preloaded

    for descriptor, file in enumerate(streams, 1):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:] = [cwd, *(path for path in preloaded.PATH if path not in ("", HERE))]
    sys.argv = ["dcgen-convert", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed()
    numpy.random.seed()  # or every run would draw the same numbers
    try:
        sys.exit(main())
    finally:
        atexit._run_exitfuncs()  # a child of the fork server ends without them
