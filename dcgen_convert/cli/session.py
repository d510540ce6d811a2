"""One run of the command line: who owns stdout, how signals arrive, and how a failure leaves the process.

stdout carries the result only. While a verb works, file descriptor 1 points at stderr (DeepSpeed and its compilers
print to it) and a private copy is kept for the result.
"""

from __future__ import annotations

import faulthandler
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from typing import IO, TextIO, cast

import click

from dcgen_convert.core import pulse
from dcgen_convert.core.console import Console, Lasting, leave_reader
from dcgen_convert.core.errors import (
    DcgenError,
    InternalError,
    InterruptedRun,
    RankLost,
    Terminated,
    TerminatedRun,
    explain,
)
from dcgen_convert.ranks import hosts
from dcgen_convert.ranks import join as ranks
from dcgen_convert.ranks.crew import SOLO, Crew
from dcgen_convert.ranks.link import SILENCE, parent

ORPHAN_SECONDS = 60.0  # a rank whose parent died may write its checkpoint, as long as it gets on


class Session:
    """State of one invocation; `click` carries it as `ctx.obj`.

    Args:
        argv: the arguments, read here only to know how an error in the arguments themselves must be shown.
    """

    def __init__(self, argv: list[str]):
        self.argv = argv
        self.json = "--json" in argv
        ranks.adopt()
        self.rank = ranks.rank()
        self.crew: Crew = SOLO
        self._failing = threading.Lock()
        self._telling: int | None = None  # the thread that says what went wrong
        self.result: IO[str] | None = None  # where the result goes while a verb works
        self.run_dir: Path | None = None
        self.console = Console("json" if self.json else "human", verbose="-v" in argv or "--verbose" in argv)

    def begin(
        self,
        *,
        json: bool = False,
        quiet: bool = False,
        verbose: bool = False,
        events: str | None = None,
        log_file: str | None = None,
        run_dir: Path | None = None,
    ) -> Console:
        """Take stdout away from everyone but the result, listen for signals, and make the console.

        run_dir: the resumable run folder of this verb, if it has one; the log goes there unless `log_file` says
            otherwise.
        """
        self.json = json
        self.run_dir = run_dir
        self.listen()
        if not verbose:
            _hush()
        if run_dir is not None and (log_file is None or self.rank):
            log_file = str(run_dir / ranks.log_name(self.rank))
        mode, self.result = "json" if json else "human", _result_stream()
        _outlive_readers()
        if self.rank:  # only rank 0 speaks; the others log into the run folder
            nowhere = open(os.devnull, "w")  # noqa: SIM115  lives as long as the process
            _divert(log_file)
            self.console = Console(mode, log_file=log_file, quiet=True, stdout=nowhere, stderr=nowhere)
        else:
            self.console = Console(
                mode, events=events, log_file=log_file, verbose=verbose, quiet=quiet, stdout=self.result
            )
        if ranks.NODE in os.environ and "RANK" not in os.environ:
            hosts.follow_stdin()
        if ranks.AGENT in os.environ:
            threading.Thread(target=self._follow, args=[parent()], daemon=True, name="parent").start()
        return self.console

    def join(self, silence: float = SILENCE) -> Crew:
        """Meet the other ranks of this job, if a launcher started several. From here on none outlives another.

        silence: seconds without a sign of life or of progress that end the job, 0 for any number.
        """
        self.crew = ranks.join(str(self.console.log_file or ""), self._force, self.console, silence)
        return self.crew

    def _follow(self, parent: int) -> None:
        """This rank must not outlive the process that started it: when that dies, stop as on SIGTERM."""
        while os.getppid() == parent:
            time.sleep(0.5)
        self.crew.orphaned()
        os.kill(os.getpid(), signal.SIGTERM)
        done = -1
        while done != pulse.count:
            done = pulse.count
            time.sleep(ORPHAN_SECONDS)
        os._exit(TerminatedRun.exit_code)

    def listen(self) -> None:
        """From here on, SIGTERM and Ctrl-C raise where the main thread stands, and `fail` says so."""
        signal.signal(signal.SIGTERM, self._on_signal)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a background job of a shell
            signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, _frame: object) -> None:
        if not self._failing.locked():  # else this process is ending
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    def _force(self, error: DcgenError) -> None:
        """End the process from another thread: the main one waits for a rank that is gone, or hangs."""
        frames = sys._current_frames()  # noqa: SLF001  Python's documented way to see other threads
        stacks = {
            thread.name: traceback.format_stack(frames[thread.ident])
            for thread in threading.enumerate()
            if thread.ident in frames
        }
        self.console.traceback(
            "\n".join(f"thread {name} stands at\n{''.join(stack)}" for name, stack in stacks.items())
        )
        code = self.fail(error)
        self.leave(code)
        os._exit(code)

    def leave(self, code: int) -> None:
        """End the job with ``code`` on every rank; returns only where the interpreter may end the process itself."""
        self.crew.close(code)
        if self.crew is SOLO:
            return
        if code:  # a broken process group may wait in its destructor
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        from dcgen_convert.train import distributed

        distributed.leave()

    def fail(self, exc: BaseException) -> int:
        """Say what went wrong, once, in the right place; return the exit code."""
        exc = unwrapped(exc)
        if isinstance(exc, Terminated) and ranks.is_launched() and self.crew is SOLO:
            os._exit(TerminatedRun.exit_code)  # before the ranks have met; the command that started them says why
        error = self.crew.settle(explain(exc), pulse.broke_collective(exc))
        if not self._failing.acquire(blocking=False):
            if self._telling == threading.get_ident():
                return error.exit_code  # saying it has failed itself
            threading.Event().wait()  # the other thread is saying it, and ends the process
        self._telling = threading.get_ident()
        if isinstance(error, InterruptedRun):
            error.hint = self._again()
        self._keep_traceback(exc, error)
        if isinstance(error, RankLost | InternalError) and ranks.starts_again():
            self.console.warn(error.message)
            return ranks.AGAIN
        if isinstance(error, RankLost) and not error.hint:
            error.hint = self._again()
        self.console.error(error.message, "" if isinstance(error, InterruptedRun) else error.hint)
        if isinstance(error, InterruptedRun):
            self.console.last_line(error.hint)
        if self.json:
            with suppress(OSError, ValueError):  # stdout is what failed
                self.console.result(error.document(), "")
        return error.exit_code

    def _again(self) -> str:
        """The command that continues: resume when there is a run folder, else the same command."""
        if self.run_dir is not None and self.run_dir.is_dir():
            return shlex.join(["dcgen-convert", "resume", str(self.run_dir)])
        return shlex.join(["dcgen-convert", *self.argv])

    def _keep_traceback(self, exc: BaseException, error: DcgenError) -> None:
        if isinstance(error, InternalError) and self.console.log_file is None:
            with suppress(OSError):  # a name that nobody can foresee, and only this user may read it
                descriptor, name = tempfile.mkstemp(prefix="dcgen-convert-", suffix=".log")
                os.close(descriptor)
                self.console.log_file = Path(name)
        self.console.traceback("".join(traceback.format_exception(exc)))
        log = self.console.log_file
        if isinstance(error, InternalError) and log is not None and log not in self.console.unwritten:
            error.hint = f"the traceback is in {log}; -v shows it here"


def unwrapped(exc: BaseException) -> BaseException:
    """The exception that ended the work, behind what was raised because of it.

    That is the interrupt, when click wrapped it, or when it hit code that could not be stopped in order. An error that
    we can explain stays: a checkpoint that did not fit on the disk is told, though the user interrupted.
    """
    if not isinstance(exc, click.Abort | BrokenPipeError) and not isinstance(explain(exc), InternalError):
        return exc
    behind: BaseException | None = exc
    while behind is not None and not isinstance(behind, KeyboardInterrupt):
        behind = behind.__cause__ or behind.__context__
    return exc if behind is None else behind


def _hush() -> None:
    """Keep libraries' own bars, deprecations and hints off stderr, for this process and its children; -v shows them.

    The hub's download bars are not affected: HF_HUB_DISABLE_PROGRESS_BARS rules them.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)


def _result_stream() -> IO[str]:
    """A copy of stdout for the result; file descriptor 1 itself now leads to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(kept, "w", encoding="utf-8", errors="surrogateescape")  # any path comes out as its own bytes


def _outlive_readers() -> None:
    """`tool 2>&1 | tee log`, and tee is gone: nothing that writes to these streams shall end the job."""
    sys.stdout, sys.stderr = (
        stream if isinstance(stream, Lasting) else cast("TextIO", Lasting(stream))
        for stream in (sys.stdout, sys.stderr)
    )


def ignore_signals() -> None:
    """The work is over and its code is known: what is left of this process ends by itself, and with that code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    exec("")  # CPython ends with a SIGINT of its own when the last code that came as a text was interrupted


def drain() -> None:
    """Flush the streams; what cannot be written is dropped, or Python would change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            leave_reader(stream)


def _divert(log_file: str | None) -> None:
    """Let everything that libraries print, and the stack of a crash, end in this rank's log."""
    path = log_file or os.devnull
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    faulthandler.enable()
