"""A job of several ranks, started from Python: the command does it, in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from dcgen_convert.core.errors import InternalError, error_of

OPTIONS = {"loras": "lora", "sets": "set", "start": "from"}  # keyword arguments that are no names of options
NEGATED = ("merge_lora", "jpeg", "check")  # flags that have a form for False


def run(verb: str, argument: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The document that `dcgen-convert VERB ARGUMENT` with these options prints. Its progress goes to stderr.

    Ctrl-C is passed on, and the command may end in order.

    Raises:
        DcgenError: what the command said.
    """
    command = [sys.executable, "-m", "dcgen_convert.cli", verb, argument, *options(values), "--json"]
    # A session of its own: Ctrl-C on a terminal reaches the command once, through this process.
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        try:
            printed, _ = process.communicate()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
    try:
        document: dict[str, Any] = json.loads(printed)
    except ValueError:
        raise InternalError(f"the command ended with code {process.returncode} and without a result") from None
    if "error" in document:
        raise error_of(document)
    return document


def options(values: Mapping[str, Any]) -> list[str]:
    """Keyword arguments as options of the command line; None, and False but for NEGATED, leave an option out."""
    found: list[str] = []
    for key, value in values.items():
        name = "--" + OPTIONS.get(key, key).replace("_", "-")
        if key in NEGATED and value is False:
            found.append(f"--no-{name.removeprefix('--')}")
        elif value is True:
            found.append(name)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            found += [part for item in value for part in (name, str(item))]
        elif value is not None and value is not False:
            found += [name, str(value)]
    return found
