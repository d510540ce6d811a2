"""The verb `export`: a bundle as the files of another program."""

from __future__ import annotations

from typing import Any

import click

from dcgen_convert.cli.options import CONTEXT, FOLDER, OUTPUT, PLACE, argument, option, output_options, stack
from dcgen_convert.cli.session import Session


@click.command(context_settings=CONTEXT, short_help="Write a bundle as files for ComfyUI.")
@argument("bundle", type=FOLDER)
@option(
    "--to",
    type=click.Choice(["comfyui"]),
    default="comfyui",
    show_default=True,
    help="Program that will read the files.",
)
@option("-o", "--output", metavar="FOLDER", type=PLACE, required=True, help="Folder of the files.")
@option(
    "--weights",
    type=click.Choice(["bf16", "fp8", "nvfp4"]),
    default="bf16",
    show_default=True,
    help="Format of attention and MLP. nvfp4 is plain 4-bit, without the low-rank branch of SVDQuant.",
)
@stack(OUTPUT)
@click.pass_obj
def export(session: Session, bundle: str, **values: Any) -> int:
    """Write BUNDLE as files for ComfyUI: the transformer in its authors' tensor names, and the DC-AE beside it."""
    console = session.begin(**output_options(values))
    from dcgen_convert.api.exporting import export as written

    found = written(bundle, **values, console=console)
    console.result(found.document(), f"{found.transformer}\n{found.autoencoder}")
    return 0
