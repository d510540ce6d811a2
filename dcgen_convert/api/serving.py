"""`serve`: a bundle on a page of this machine."""

from __future__ import annotations

from pathlib import Path

from dcgen_convert.api import calls
from dcgen_convert.api.evaluating import output_of
from dcgen_convert.api.order import require_folders
from dcgen_convert.api.results import Served
from dcgen_convert.core.console import Console
from dcgen_convert.core.limits import require as require_range


@calls.explained()
def serve(
    bundle: str | Path,
    *,
    against: str | Path | None = None,
    port: int = 7860,
    trust_remote_code: bool = False,
    quiet: bool = False,
    console: Console | None = None,
) -> Served:
    """Start a page on this machine that draws with a bundle and its base side by side; returns when it answers.

    No other machine can reach it: it listens on 127.0.0.1, and asks nothing of others. `Served.wait` waits for
    Ctrl-C.

    Args:
        against: model that draws beside the bundle: catalogue name, folder, file or hub id; it must be on this machine.
            None: the base that the manifest names, if it is here.
        port: 0 takes a free one.
        trust_remote_code: run the Python files that come with the bundle.
        quiet: only warnings on stderr.
        console: where to speak instead.

    Raises:
        InputError: the extra `serve` is not installed, not a bundle.
        CheckFailed: the bundle is unfinished.
        AccessError: ``against`` is not on this machine.
        ResourceError: the port is taken, or memory is short.
    """
    from dcgen_convert.judging import serving

    require_folders(bundle=bundle)
    require_range(port=port)
    folder, console = Path(bundle).expanduser(), console or calls.console_of(quiet)
    running = serving.serve(
        folder,
        None if against is None else str(against),
        output_of(folder, None) / "import",
        port,
        console,
        trust_remote_code=trust_remote_code,
    )
    return Served(folder, running.address, running.base, running.without, running.page, status="running")
