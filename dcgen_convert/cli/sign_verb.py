"""The verb `sign`: who vouches for a bundle."""

from __future__ import annotations

from typing import Any

import click

from dcgen_convert.cli.options import CONTEXT, FOLDER, OUTPUT, PLACE, argument, option, output_options, stack
from dcgen_convert.cli.session import Session


@click.command(context_settings=CONTEXT, short_help="Sign a bundle.")
@argument("bundle", type=FOLDER)
@option(
    "--key",
    metavar="FILE",
    type=PLACE,
    help="Private key of an elliptic curve, a PEM file; the variable SIGNING_KEY_PASSWORD is its password. Default: "
    "keyless, in the name of the CI job or of whoever logs in.",
)
@option("--repo", metavar="REPO", help="Hub repository that the card shall name. Default: the card as it is.")
@stack(OUTPUT)
@click.pass_obj
def sign(session: Session, bundle: str, **values: Any) -> int:
    """Sign BUNDLE with OpenSSF Model Signing. The signature lies in it as model.sig, and `verify --signed-by` checks
    it."""
    console = session.begin(**output_options(values))
    from dcgen_convert.api.signing import sign as signed

    done = signed(bundle, **values, console=console)
    console.result(done.document(), str(done.signature))
    return 0
