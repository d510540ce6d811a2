"""Signatures of bundles: who vouches for a bundle, and that no bit of it has changed since.

The signature is a file in the format of OpenSSF Model Signing (https://github.com/ossf/model-signing-spec, v1.0). It
lies in the bundle and names the SHA-256 of every other file there. All cryptography is that of the package
`model-signing`, the extra `sign`; so its own command reads these signatures too.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from dcgen_convert.bundle import checks
from dcgen_convert.bundle import manifest as manifests
from dcgen_convert.bundle.layout import read_index
from dcgen_convert.core import names
from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import AccessError, CheckFailed, InputError
from dcgen_convert.core.files import hashes, read_object, replacing, understood

FILE = names.SIGNATURE
PASSWORD = "SIGNING_KEY_PASSWORD"  # environment variable: of an encrypted private key
CURVES = "an elliptic curve: P-256, P-384 or P-521"
# What the identity of a CI job begins with -> who vouches for that identity.
ISSUERS = {
    "https://github.com/": "https://token.actions.githubusercontent.com",
    "https://gitlab.com/": "https://gitlab.com",
}
DAMAGE = (ValueError, LookupError, TypeError, AttributeError)  # of the library, for keys and signatures that are none
BY_FILE = {"method": "files", "hash_type": "sha256"}  # how `sign` hashes, and the library unless told otherwise


def signer(key: Path | None) -> Any:
    """What signs: with a private key, or without one in the name of whoever runs this (keyless, through sigstore).

    Args:
        key: PEM file of a private key; None: the identity of the CI job, or of whoever logs in on the terminal.

    Raises:
        InputError: the extra `sign` is not installed, or no key that fits.
        AccessError: no identity, or sigstore cannot be reached.
    """
    config = _library().signing.Config()
    if key is None:
        _require_identity()
        return _reached(lambda: config.use_sigstore_signer(use_ambient_credentials=True))
    password = os.environ.get(PASSWORD)
    options = {"private_key": _key_file(key), "password": password.encode() if password else None}
    return _fitting(lambda: config.use_elliptic_key_signer(**options), f"{key} is no private key of {CURVES}", PASSWORD)


def sign(bundle: Path, using: Any, console: Console) -> dict[str, Any]:
    """Sign a bundle whose files are those of its manifest, and write the signature into it.

    Args:
        using: from `signer`.

    Returns:
        "bundle", "signature" (the file), and how many "files" it covers.

    Raises:
        InputError: not a bundle. CheckFailed: an unfinished or damaged one.
        AccessError: a keyless signature was refused.
    """
    read_index(bundle)
    if found := checks.check_files(bundle, manifests.read(bundle), console):
        raise CheckFailed(
            f"{bundle} is damaged, so it was not signed: {checks.listed(found)}",
            "dcgen-convert verify names every difference",
        )
    using.set_hashing_config(_hashing(bundle))
    with replacing(bundle / FILE) as temporary:
        _reached(lambda: using.sign(bundle, temporary))
    return {"bundle": bundle, "signature": bundle / FILE, "files": len(signed_files(bundle) or ())}


def check(bundle: Path, signed_by: str, issuer: str | None) -> None:
    """CheckFailed unless every file of the bundle is as ``signed_by`` has signed it, and no other file is there.

    Args:
        signed_by: PEM file of a public key, or the identity of a keyless signature: an e-mail address, or the address
            of a CI workflow.
        issuer: who vouches for the identity; None: that of the forge.

    Raises:
        InputError: the extra `sign` is not installed, no public key, or an identity without a known issuer.
        AccessError: sigstore cannot be reached.
    """
    config = _verifier(signed_by, issuer)
    if not (bundle / FILE).is_file():
        raise CheckFailed(f"{bundle} is not signed: it has no {FILE}", "ask its maker for it, or for a signed bundle")
    signed = signed_files(bundle) or {}
    hint = "fetch the bundle again, and do not use it before its signature is right"
    try:
        config.set_hashing_config(_hashing(bundle).set_allow_symlinks(True)).verify(bundle, bundle / FILE)
    except _refusals() as error:
        if str(error).startswith("Signature mismatch: "):  # the signature is right, so its list of files is too
            changed = checks.listed(_differences(bundle, signed))
            raise CheckFailed(f"{bundle} is not what {signed_by} has signed: {changed}", hint) from error
        raise CheckFailed(f"the signature of {bundle} is not one of {signed_by}", hint) from error
    if left_out := sorted({*manifests.read(bundle)["files"], manifests.FILE} - signed.keys()):
        raise CheckFailed(f"the signature of {bundle} leaves files out: {checks.listed(left_out)}", hint)


def signed_files(bundle: Path) -> dict[str, str] | None:
    """Relative path -> SHA-256 of what the signature in the bundle lists. Only `check` says who has signed it.

    None: there is no signature. CheckFailed: it cannot be read.
    """
    path, hint = bundle / FILE, "sign the bundle again, or fetch it again"
    if not path.is_file():
        return None
    try:
        with understood(path, hint):
            payload = json.loads(base64.b64decode(read_object(path)["dsseEnvelope"]["payload"]))
            how, listed = payload["predicate"]["serialization"], payload["predicate"]["resources"]
            files = {str(record["name"]): str(record["digest"]) for record in listed}
            readable = {key: how[key] for key in BY_FILE} == BY_FILE
    except InputError as error:
        raise CheckFailed(error.message, hint) from error
    if not readable:
        raise CheckFailed(f"{path} does not hold the SHA-256 of whole files, as this program compares them", hint)
    return files


def require_current(bundle: Path, record: Mapping[str, Any]) -> bool:
    """Whether the bundle is signed. CheckFailed when its files, all as in the manifest ``record``, are not those that
    were signed.
    """
    if (signed := signed_files(bundle)) is None:
        return False
    now = {name: entry["sha256"] for name, entry in record["files"].items()}
    now[manifests.FILE] = hashes([bundle / manifests.FILE])[0]
    if now != signed:
        changed = sorted(name for name in now.keys() | signed.keys() if now.get(name) != signed.get(name))
        raise CheckFailed(
            f"{bundle} has changed since it was signed: {checks.listed(changed)}", f"dcgen-convert sign {bundle}"
        )
    return True


def _differences(bundle: Path, signed: Mapping[str, str]) -> list[str]:
    """What became of the files since they were signed."""
    present = sorted(name for name in checks.present_files(bundle) if name != FILE)
    now = dict(zip(present, hashes(bundle / name for name in present), strict=True))
    found = [f"{name} is missing" for name in sorted(signed.keys() - now.keys())]
    found += [f"{name} was added" for name in sorted(now.keys() - signed.keys())]
    return found + [f"{name} has changed" for name in present if signed.get(name, now[name]) != now[name]]


def _hashing(bundle: Path) -> Any:
    """The SHA-256 of every file but the signature, and what systems and editors leave in a folder."""
    strays = [path for path in bundle.rglob("*") if checks.is_stray(path.relative_to(bundle).as_posix())]
    ignored = [FILE, *(path.relative_to(bundle) for path in strays)]
    return _library().hashing.Config().set_ignored_paths(paths=ignored)


def _verifier(signed_by: str, issuer: str | None) -> Any:
    config = _library().verifying.Config()
    if "@" in signed_by or "://" in signed_by:
        known = next((ISSUERS[start] for start in ISSUERS if signed_by.startswith(start)), None)
        if (issuer or known) is None:
            raise InputError(
                f"nobody is known to vouch for {signed_by}",
                "add --issuer URL, e.g. https://accounts.google.com or https://github.com/login/oauth",
            )
        identity = {"identity": signed_by, "oidc_issuer": issuer or known}
        return _reached(lambda: config.use_sigstore_verifier(**identity))
    key = _key_file(Path(signed_by))
    return _fitting(lambda: config.use_elliptic_key_verifier(public_key=key), f"{key} is no public key of {CURVES}")


def _library() -> ModuleType:
    try:
        import model_signing
    except ImportError as error:
        raise InputError(
            f"signatures need the package {error.name}, which is not installed", "pip install 'dcgen-convert[sign]'"
        ) from error
    return model_signing


def _key_file(path: Path) -> Path:
    path = path.expanduser()
    if not path.is_file():
        raise InputError(f"there is no key file {path}", "give the PEM file of the key")
    return path


def _fitting(make: Callable[[], Any], complaint: str, variable: str | None = None) -> Any:
    """What ``make`` returns; InputError with the ``complaint`` when the library cannot use the key."""
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return make()
    except (*DAMAGE, UnsupportedAlgorithm) as error:
        hint = f"if it is encrypted, put its password into the variable {variable}" if variable else "give the PEM file"
        raise InputError(complaint, hint) from error


def _refusals() -> tuple[type[Exception], ...]:
    """How the libraries say that a signature is not right."""
    from cryptography.exceptions import InvalidSignature
    from sigstore.errors import VerificationError

    return (*DAMAGE, InvalidSignature, VerificationError)


def _reached(call: Callable[[], Any]) -> Any:
    """What ``call`` returns; AccessError when sigstore's services refuse or cannot be reached."""
    from sigstore.errors import Error

    try:
        return call()
    except Error as error:
        raise AccessError(
            f"sigstore, which keyless signatures need, did not answer as it should: {error}",
            "connect and try again, or sign with a key: --key FILE",
        ) from error


def _require_identity() -> None:
    """AccessError when neither a CI job nor a person at a terminal can say who signs."""
    from sigstore.oidc import detect_credential

    if _reached(detect_credential) is None and not sys.stdin.isatty():
        raise AccessError(
            "nobody is known here in whose name to sign",
            "give a private key with --key FILE; or give the CI job an identity (GitHub: permissions, id-token: write)",
        )
