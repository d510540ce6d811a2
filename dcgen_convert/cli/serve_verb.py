"""The verb `serve`: a bundle on a page of this machine."""

from __future__ import annotations

from typing import Any

import click

from dcgen_convert.cli import completion
from dcgen_convert.cli.options import (
    CONTEXT,
    FOLDER,
    OUTPUT,
    PLACE,
    TRUST,
    Whole,
    argument,
    option,
    output_options,
    stack,
)
from dcgen_convert.cli.session import Session


@click.command(context_settings=CONTEXT, short_help="Show a page that draws with a bundle and its base.")
@argument("bundle", type=FOLDER)
@option(
    "--against",
    metavar="SOURCE",
    type=PLACE,
    shell_complete=completion.sources,
    help="Model on this machine that draws beside BUNDLE. Default: the base that the manifest names, if it is here.",
)
@option(
    "--port",
    metavar="N",
    type=Whole(0, 65_535),
    default=7860,
    show_default=True,
    help="Port on 127.0.0.1; 0 takes a free one.",
)
@TRUST
@stack(OUTPUT)
@click.pass_obj
def serve(session: Session, bundle: str, **values: Any) -> int:
    """Show a page on this machine that draws with BUNDLE and its base side by side, until Ctrl-C. No other machine can
    reach it."""
    console = session.begin(**output_options(values))
    from dcgen_convert.api.serving import serve as served

    page = served(bundle, **values, console=console)
    console.result(page.document(), page.address)
    console.say("Ctrl-C ends the page")
    try:
        page.wait()
    except KeyboardInterrupt:  # its usual end, and that of a service which is stopped
        page.close()
    return 0
