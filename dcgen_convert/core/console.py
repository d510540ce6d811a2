"""The one output object. Library code takes a `Console` and never prints.

stdout carries the result only (`Console.result`); everything else goes to stderr, to the log file and, as NDJSON, to
the events file. Two decisions are kept apart: *colour* (NO_COLOR, FORCE_COLOR, TERM=dumb, terminal) and *liveness*
(a real terminal outside CI): FORCE_COLOR must never make a pipe receive a redrawn bar.

Texts may hold what a stranger has written: names, captions, licences, metadata of files. `plain` makes them harmless,
here and for everything that is shown. And a job must not end because nobody reads its lines: a stream, a log or an
events file that cannot be written to is given up with a warning at most.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dcgen_convert.core.progress import LineProgress, LiveProgress, SilentProgress
from dcgen_convert.core.spelling import plain

if TYPE_CHECKING:
    from PIL.Image import Image

    from dcgen_convert.core.track import Tracker

MODES = ("human", "json", "quiet")


def wants_colour(stream: IO[str], env: Mapping[str, str]) -> bool:
    """NO_COLOR (any value) wins, then FORCE_COLOR, then TERM=dumb, then whether the stream is a terminal."""
    if env.get("NO_COLOR"):
        return False
    if env.get("FORCE_COLOR"):
        return env["FORCE_COLOR"] != "0"
    return env.get("TERM") != "dumb" and _is_terminal(stream)


def wants_live(stream: IO[str], env: Mapping[str, str]) -> bool:
    """Redrawn bars only on a real terminal, outside CI, where the terminal can move its cursor."""
    in_ci = env.get("CI", "").lower() not in ("", "0", "false")
    return _is_terminal(stream) and not in_ci and env.get("TERM") != "dumb"


def _is_terminal(stream: IO[str]) -> bool:
    isatty = getattr(stream, "isatty", None)
    return bool(isatty and isatty())


class Console:
    """Speaks for one process.

    Args:
        mode: "human" (result as text), "json" (result as one JSON document), "quiet" (result only; warnings still
            appear).
        events: file to append NDJSON events to, one object per line; None disables.
        log_file: file to append every line to, with times and tracebacks; None disables.
        verbose: also show `detail` lines on stderr.
        quiet: as mode "quiet", for combination with mode "json".
        stdout, stderr: streams; the defaults are the process's own at the time of the call.
    """

    def __init__(
        self,
        mode: str = "human",
        events: str | Path | None = None,
        log_file: str | Path | None = None,
        *,
        verbose: bool = False,
        quiet: bool = False,
        stdout: IO[str] | None = None,
        stderr: IO[str] | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, not {mode!r}")
        self.mode = mode
        self.verbose = verbose
        self.quiet = quiet or mode == "quiet"
        self.events = Path(events) if events else None
        self.log_file = Path(log_file) if log_file else None
        self._stdout = stdout
        self._stderr = stderr
        self.tracker: Tracker | None = None
        self.unwritten: set[Path] = set()  # logs and events files that could not be written

    @property
    def stderr(self) -> IO[str]:
        return self._stderr or sys.stderr

    def result_to(self, stream: IO[str]) -> None:
        """Send the result there from now on."""
        self._stdout = stream

    def say(self, text: str) -> None:
        """One line about what is decided or done."""
        self._log("info", text)
        if not self.quiet:
            self._line("", text)

    def warn(self, text: str) -> None:
        """One line that the user should not miss; shown in every mode, recorded as an event."""
        self._log("warning", text)
        self._line(f"{self._paint('warning:', 33)} ", text)
        self.event("warning", text=text)

    def error(self, text: str, hint: str = "") -> None:
        """The sentence that explains why the command failed, and the next command."""
        self._log("error", f"{text} | hint: {hint}" if hint else text)
        self._line(f"{self._paint('error:', 31)} ", text)
        if hint:
            self._line(f"{self._paint('hint:', 36)} ", hint)
        self.event("error", text=text, hint=hint)

    def last_line(self, text: str) -> None:
        """A command to copy, alone on its line and without colour; shown in every mode."""
        self._log("info", text)
        self._line("", text)

    def detail(self, text: str) -> None:
        """A line for -v and the log file."""
        self._log("detail", text)
        if self.verbose and not self.quiet:
            self._line("", text)

    def traceback(self, text: str) -> None:
        """A traceback: to the log file, and to stderr only with -v."""
        self._log("traceback", text)
        if self.verbose:
            self._write(plain(text.rstrip()))

    @contextmanager
    def progress(self, label: str, total: int | None, unit: str = "") -> Iterator[LineProgress]:
        """`with console.progress("align head", 200, "step") as bar: bar.advance(1, loss=0.3)`.

        A redrawn bar on a live terminal; elsewhere a line per 10 % or 60 s with the time left; nothing when quiet.
        """
        if self.quiet:
            bar: LineProgress = SilentProgress(self, label, total, unit)
        elif wants_live(self.stderr, os.environ):
            bar = LiveProgress(self, label, total, unit)
        else:
            bar = LineProgress(self, label, total, unit)
        with bar:
            yield bar

    def event(self, kind: str, **data: object) -> None:
        """Append one NDJSON object to the events file; values that JSON does not know become strings."""
        if self.events is not None:
            line = {"schema": "dcgen.event/1", "time": round(time.time(), 3), "kind": kind, **data}
            self._append(self.events, json.dumps(line, default=str))

    def scalars(self, label: str, step: int, values: Mapping[str, float]) -> None:
        """Figures of one step, to the tracker that was asked for."""
        if self.tracker is not None:
            self.tracker.scalars(label, step, values)

    def picture(self, label: str, step: int, image: Image) -> None:
        """A picture of one step, to the tracker that was asked for."""
        if self.tracker is not None:
            self.tracker.picture(label, step, image)

    def result(self, doc: dict[str, Any], text: str) -> None:
        """The result, once, on stdout: `doc` as JSON in mode "json", else `text` (usually a path).

        Raises:
            OSError: it cannot be written (a full disk). A reader that has gone away has read enough.
        """
        shown = json.dumps(doc, indent=2, default=str) if self.mode == "json" else plain(text, bytes_kept=True)
        write_lasting(self._stdout or sys.stdout, shown.rstrip("\n") + "\n")

    def colour(self) -> bool:
        return wants_colour(self.stderr, os.environ)

    def _paint(self, text: str, code: int) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour() else text

    def _line(self, mark: str, text: str) -> None:
        """One line, after a mark of our own; a second line of a text is indented, so that it passes for no other."""
        self._write(mark + plain(text).replace("\n", "\n  "))

    def _write(self, text: str) -> None:
        try:
            write_lasting(self.stderr, text + "\n")
        except ValueError:
            self._stderr = _Nowhere()  # the stream is closed
        except OSError:  # a full disk, a terminal that is gone
            return

    def _log(self, level: str, text: str) -> None:
        if self.log_file is not None:
            shown = plain(text).replace("\n", "\n  ")
            self._append(self.log_file, f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {level:<9} {shown}")

    def _append(self, path: Path, line: str) -> None:
        """Add a line to a file of lines; a file that cannot be written is told once, and tried again next time."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            if path not in self.unwritten:
                self.unwritten.add(path)
                self._line(f"{self._paint('warning:', 33)} ", f"{path} cannot be written: {error.strerror}")


def write_lasting(stream: IO[str], text: str) -> None:
    """Write to a stream that others may have closed: what nobody reads any more goes nowhere, from now on.

    Raises:
        OSError: for another reason than a reader that went away, such as a full disk. ValueError: the stream is closed.
    """
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:  # an ASCII locale
            encoding = getattr(stream, "encoding", None) or "ascii"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except BrokenPipeError:
        leave_reader(stream)


class Lasting:
    """A stream of the process, for everything that writes to it: it outlives its reader, as `write_lasting` does."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            leave_reader(self.stream)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except BrokenPipeError:
            leave_reader(self.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def leave_reader(stream: IO[str]) -> None:
    """Lead the file of ``stream``, which cannot be written any more, to nowhere: also what it has in its buffer."""
    with suppress(OSError, ValueError):  # a stream without a file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class _Nowhere(io.StringIO):
    """A stream that takes everything and shows nothing."""

    def write(self, text: str, /) -> int:
        return len(text)


NULL = Console("quiet", stdout=_Nowhere(), stderr=_Nowhere())
"""A silent console for tests and for library use."""
