"""The command dcgen-convert, also as `python -m dcgen_convert.cli`.

Importing the verbs takes a moment, in which nobody could tell an interrupt in a sentence: it ends the process silently.
"""

import os
import signal


def _leave(number: int, _frame: object) -> None:
    os._exit(128 + number)


def main() -> None:
    """Run the verb of the command line, and leave with its exit code."""
    signal.signal(signal.SIGTERM, _leave)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a background job of a shell
        signal.signal(signal.SIGINT, _leave)
    from dcgen_convert.cli import app

    app.main()


if __name__ == "__main__":
    main()
