"""The verb `benchmark`: how fast a base and its conversion are on this machine."""

from __future__ import annotations

import os
from typing import Any

import click

from dcgen_convert.cli import completion
from dcgen_convert.cli.options import (
    AE,
    CONTEXT,
    OFFLINE,
    OUTPUT,
    PLACE,
    REVISION,
    SOURCE,
    Number,
    Whole,
    option,
    output_options,
    stack,
)
from dcgen_convert.cli.session import Session


@click.command(context_settings=CONTEXT, short_help="Time a base against its conversion.")
@SOURCE
@stack(AE)
@option(
    "--resolution",
    metavar="PX",
    type=Whole(min=1),
    multiple=True,
    help="Picture side in px; repeatable. Videos have the area of such squares. Default: that of the bundle, or of the "
    "recipe.",
)
@option(
    "--against",
    metavar="SOURCE",
    type=PLACE,
    help="Base of a bundle: folder, catalogue name or hub id. Default: the one that its manifest names.",
)
@option(
    "--random",
    is_flag=True,
    help="Random weights of the right sizes for SOURCE, a catalogue name: nothing is downloaded. Default: off.",
)
@option(
    "--dtype",
    type=click.Choice(["fp32", "bf16"]),
    help="Number type of the weights. Default: bf16 on a GPU and for models above 8 GiB, else fp32.",
)
@option(
    "--seconds",
    metavar="S",
    type=Number(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds that one comparison may take; there are three or four for each size. A slow machine gets fewer "
    "rounds, at least one.",
)
@option(
    "--recipe",
    metavar="FILE",
    shell_complete=completion.recipes,
    help="Recipe whose steps, guidance and size count, for a SOURCE that is no bundle. Default: the one of its family.",
)
@stack([REVISION, OFFLINE, *OUTPUT])
@click.pass_obj
def benchmark(session: Session, source: str, **values: Any) -> int:
    """Time a base against its conversion: text, one step, decoder, whole picture; and memory. SOURCE is a bundle, or
    what is to be converted: then --ae and --recipe count. The figures of a bundle are added to its card."""
    console = session.begin(**output_options(values))
    if values["offline"]:
        os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it when it is imported
    from dcgen_convert.api.benchmarking import benchmark as timed

    found = timed(source, **values, console=console)
    console.result(found.document(), found.text())
    return 0
