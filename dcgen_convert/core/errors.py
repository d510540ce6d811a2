"""One place for everything that can go wrong: error classes, exit codes, and the table that turns a foreign
exception into a sentence.

Exit codes: 0 done | 1 a check found a difference | 2 usage, recipe or input | 3 access | 4 resources | 70 internal |
130 / 143 interrupted.

Library code raises a `DcgenError` with one clear sentence (what, where) and a hint (the next command). The command
line calls `explain` on whatever reaches it; nothing else in the package maps exceptions to exit codes.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any


class DcgenError(Exception):
    """An error the user can act on: `message` says what and where, `hint` names the next command or setting."""

    exit_code = 70
    code = "internal"

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def document(self) -> dict[str, Any]:
        """The error as the one JSON document that `--json` prints."""
        return {"error": {"code": self.code, "message": self.message, "hint": self.hint}}


class InputError(DcgenError):
    """Usage, or an input that cannot work (exit 2)."""

    exit_code, code = 2, "input"


class RecipeError(InputError):
    """A recipe, a setting or a combination of settings that cannot work (exit 2)."""

    code = "recipe"


class AccessError(DcgenError):
    """A repository or file that exists but cannot be reached: gated, no token, offline and missing (exit 3)."""

    exit_code, code = 3, "access"


class ResourceError(DcgenError):
    """Too little disk, memory or GPUs (exit 4)."""

    exit_code, code = 4, "resources"


class RankLost(ResourceError):
    """A rank of a job died without a word (exit 4): killed, mostly for memory, or its host went away."""

    code = "rank-lost"


class CheckFailed(DcgenError):
    """A check ran and found a difference (exit 1)."""

    exit_code, code = 1, "check"


class InternalError(DcgenError):
    """A fault of this program (exit 70); the traceback is in the log file."""

    exit_code, code = 70, "internal"


class InterruptedRun(DcgenError):
    """Ctrl-C (exit 130): the work done so far is on disk and can be resumed."""

    exit_code, code = 130, "interrupted"


class TerminatedRun(InterruptedRun):
    """SIGTERM (exit 143), as sent by a scheduler that wants the machine back."""

    exit_code, code = 143, "terminated"


class Terminated(KeyboardInterrupt):
    """Raised by the SIGTERM handler. A KeyboardInterrupt, so that code which saves on Ctrl-C saves on pre-emption
    too."""


def error_of(document: Mapping[str, Any]) -> DcgenError:
    """The error that `DcgenError.document` has written, in its own class."""
    found = document["error"]
    kind = next((kind for kind in _kinds(DcgenError) if kind.code == found["code"]), InternalError)
    return kind(found["message"], found["hint"])


def _kinds(kind: type[DcgenError]) -> Iterator[type[DcgenError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _kinds(child)


def explain(exc: BaseException) -> DcgenError:
    """The one table: any exception -> the `DcgenError` whose sentence, hint and exit code the user meets.

    Foreign exceptions are recognised by class name along their inheritance, so that no library needs to be imported
    to explain it.
    """
    if isinstance(exc, DcgenError):
        return exc
    for cls in type(exc).__mro__:
        rule = _TABLE.get(cls.__name__)
        explained = rule(exc) if rule else None
        if explained is not None:
            return explained
    return InternalError(
        f"internal error: {type(exc).__name__}: {_first_line(exc)}", "run again with -v to see the traceback"
    )


def _first_line(exc: BaseException) -> str:
    text = str(exc).strip()
    return text.splitlines()[0][:300] if text else "(no message)"


def _middle_out(path: str) -> str:
    """A path that a line can hold."""
    return path if len(path) <= 300 else f"{path[:140]}...{path[-140:]}"


def _terminated(_: BaseException) -> DcgenError:
    return TerminatedRun("terminated; the work done so far is kept")


def _interrupted(_: BaseException) -> DcgenError:
    return InterruptedRun("interrupted; the work done so far is kept")


def _usage(exc: BaseException) -> DcgenError:
    """Click's complaints about the arguments; their context knows which verb's help to show."""
    context = getattr(exc, "ctx", None)
    tell: Callable[[], str] = getattr(exc, "format_message", exc.__str__)
    return InputError(tell(), f"{context.command_path} --help" if context else "dcgen-convert --help")


def _gated(exc: BaseException) -> DcgenError:
    address = str(getattr(getattr(exc, "response", None), "url", ""))  # https://huggingface.co/[api/models/]ORG/NAME
    found = re.search(r"https?://[^/]+/(?:api/models/)?([\w.-]+/[\w.-]+)", address)
    repo = found[1] if found else "the repository"
    page = f"https://huggingface.co/{repo}" if found else "its page on huggingface.co"
    return AccessError(
        f"{repo} is gated and this account has no access to it", f"accept its licence at {page}, then set HF_TOKEN"
    )


def _no_repo_name(exc: BaseException) -> DcgenError:
    return InputError(
        f"no folder or file here, and no name of a repository: {_first_line(exc)}", "check the path, or give ORG/NAME"
    )


def _missing_repo(exc: BaseException) -> DcgenError:
    return AccessError(
        f"repository not found, or private without a token: {_first_line(exc)}", "check the name, then set HF_TOKEN"
    )


def _offline(exc: BaseException) -> DcgenError:
    return AccessError(
        f"a file is neither in the local cache nor reachable: {_first_line(exc)}",
        "connect, unset HF_HUB_OFFLINE, or give the path of a local folder",
    )


def _network(exc: BaseException) -> DcgenError:
    return AccessError(f"the network failed: {_first_line(exc)}", "try again, or use --offline with a filled cache")


SHORT = re.compile(r"out of memory|(not enough|can'?t allocate|cannot allocate) memory|_ALLOC_FAILED", re.IGNORECASE)


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether memory of the machine or of a device was short. torch's CPU allocator raises a plain RuntimeError."""
    if isinstance(exc, MemoryError) or type(exc).__name__ == "OutOfMemoryError":
        return True
    if isinstance(exc, OSError):
        return exc.errno == errno.ENOMEM
    return isinstance(exc, RuntimeError) and SHORT.search(str(exc)) is not None


def _no_memory(exc: BaseException) -> DcgenError | None:
    if not is_out_of_memory(exc):
        return None
    return ResourceError(
        f"out of memory: {_first_line(exc)}",
        "free memory, or use a larger machine; `dcgen-convert plan` shows what fits",
    )


def _os_error(exc: BaseException) -> DcgenError | None:
    """What the operating system refused. Without a number it comes from a library that could not use a file."""
    if not isinstance(exc, OSError):
        return None
    where = f" ({_middle_out(str(exc.filename))})" if exc.filename else ""
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"the disk is full{where}", "free space, then resume the run")
    if exc.errno == errno.ENOMEM:
        return _no_memory(exc)
    if exc.errno == errno.EROFS:
        return InputError(f"the file system is read-only{where}", "choose another folder with --output and --run-dir")
    if exc.errno in _WRONG_PATH:
        return InputError(f"{os.strerror(exc.errno)}{where}", "check the path, or choose another folder")
    if exc.errno is None:
        return InputError(f"a file cannot be used: {_first_line(exc)}", "check that it is whole, or fetch it again")
    return ResourceError(
        f"the system refused a file or a device: {os.strerror(exc.errno)}{where}",
        "check the disk and its file system, then resume the run",
    )


_WRONG_PATH = (
    errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR,
    errno.ENOTEMPTY, errno.ENXIO, errno.EPERM,
)  # fmt: skip


def _broken_pipe(exc: BaseException) -> DcgenError:
    return ResourceError(f"a process that this one talks to is gone: {_first_line(exc)}", "run the command again")


def _permission(exc: BaseException) -> DcgenError:
    where = _middle_out(str(getattr(exc, "filename", None) or "a file"))
    return InputError(f"no permission to use {where}", "choose another folder, or change its permissions")


def _not_found(exc: BaseException) -> DcgenError | None:
    where = _middle_out(str(getattr(exc, "filename", None) or ""))
    return InputError(f"file not found: {where}", "check the path") if where else None


def system_error(exc: BaseException) -> OSError | None:
    """The system's error behind one of safetensors, which tells it in words: "... (os error 28)"."""
    found = re.search(r"\(os error (\d+)\)", str(exc))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def _safetensors(exc: BaseException) -> DcgenError:
    if refused := system_error(exc):
        return explain(refused)
    return InputError(
        f"a safetensors file is truncated or damaged: {_first_line(exc)}",
        "fetch the file again; `dcgen-convert inspect PATH` names it",
    )


def _json(exc: BaseException) -> DcgenError:
    return InputError(f"a JSON file is damaged: {_first_line(exc)}", "fetch the file again")


def _yaml(exc: BaseException) -> DcgenError:
    return RecipeError(
        f"the recipe is not valid YAML: {' '.join(str(exc).split())}", "dcgen-convert recipes validate FILE"
    )


def _pickle(exc: BaseException) -> DcgenError:
    return InputError(f"pickle checkpoints are refused: {_first_line(exc)}", "convert the file to safetensors first")


_TABLE: dict[str, Callable[[BaseException], DcgenError | None]] = {
    "Terminated": _terminated,
    "KeyboardInterrupt": _interrupted,
    "ClickException": _usage,
    "Abort": _interrupted,
    "GatedRepoError": _gated,
    "RepositoryNotFoundError": _missing_repo,
    "RevisionNotFoundError": _missing_repo,
    "EntryNotFoundError": _missing_repo,
    "LocalEntryNotFoundError": _offline,
    "OfflineModeIsEnabled": _offline,
    "HFValidationError": _no_repo_name,
    "HfHubHTTPError": _network,
    "BrokenPipeError": _broken_pipe,
    "ConnectionError": _network,
    "TransportError": _network,
    "OutOfMemoryError": _no_memory,
    "MemoryError": _no_memory,
    "RuntimeError": _no_memory,
    "SafetensorError": _safetensors,
    "JSONDecodeError": _json,
    "YAMLError": _yaml,
    "UnpicklingError": _pickle,
    "PermissionError": _permission,
    "FileNotFoundError": _not_found,
    "OSError": _os_error,
}
