"""`sign`: who vouches for a bundle."""

from __future__ import annotations

from pathlib import Path

from dcgen_convert.api import calls
from dcgen_convert.api.order import require_folders
from dcgen_convert.api.results import Signed
from dcgen_convert.core.console import Console


@calls.explained()
def sign(
    bundle: str | Path,
    *,
    key: str | Path | None = None,
    repo: str | None = None,
    quiet: bool = False,
    console: Console | None = None,
) -> Signed:
    """Sign a finished bundle with OpenSSF Model Signing; the signature is a file in the bundle, model.sig.

    Sign last: `evaluate` and `benchmark` write what they measured into the bundle.

    Args:
        key: PEM file of a private key of an elliptic curve; the variable SIGNING_KEY_PASSWORD is its password. None:
            keyless, with the identity of the CI job or of whoever logs in on the terminal; it needs a network.
        repo: hub repository that the bundle is for, ORG/NAME: its card will load it from there. None: as it is.
        quiet: only warnings on stderr.
        console: where to speak instead.

    Raises:
        InputError: not a bundle, no key that fits, or the extra `sign` is not installed.
        CheckFailed: the bundle is unfinished or damaged.
        AccessError: no identity for a keyless signature, or sigstore cannot be reached.
    """
    from dcgen_convert.bundle import layout, manifest, push, signature

    require_folders(bundle=bundle)
    folder, console = Path(bundle).expanduser(), console or calls.console_of(quiet)
    manifest.read(folder)  # before anybody is asked who he is
    signer = signature.signer(None if key is None else Path(key))
    if repo is not None:
        push.check_name(repo)
        layout.name_repository(folder, repo)
    return Signed(**signature.sign(folder, signer, console))
