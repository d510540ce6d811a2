"""Whether a bundle is what its manifest says, and whether it runs: `dcgen-convert verify`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dcgen_convert import families
from dcgen_convert.bundle import checks, signature
from dcgen_convert.bundle import manifest as manifests
from dcgen_convert.bundle.layout import read_index
from dcgen_convert.bundle.loading import family_of
from dcgen_convert.checkpoint.source import resolve_folder
from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import CheckFailed, InputError
from dcgen_convert.core.spelling import count_of
from dcgen_convert.ranks.join import alone
from dcgen_convert.recipe.identity import Identity

PROBE_SECONDS = 3600


def verify(
    bundle: Path,
    console: Console,
    against: Path | str | None = None,
    *,
    signed_by: str | None = None,
    issuer: str | None = None,
    probe: bool = True,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Check a bundle; returns the result document when nothing differs.

    Args:
        bundle: bundle folder.
        against: the base model as a folder, catalogue name or hub id: every tensor that the manifest calls identical
            must be there, byte for byte.
        signed_by, issuer: whose signature the bundle must have, as in `signature.check`; looked at before all else.
        probe: draw a picture in a fresh process.
        trust_remote_code: run the Python files that come with the bundle; without it, code of others is a difference.

    Raises:
        CheckFailed: something differs; the message lists what and where.
        InputError: ``bundle`` is no bundle, or ``against`` no diffusers folder.
    """
    bundle = Path(bundle)
    _check_signature(bundle, signed_by, issuer, console)
    index, manifest = read_index(bundle), manifests.read(bundle)
    steps = {
        "files": lambda: checks.check_files(bundle, manifest, console),
        "code": lambda: checks.check_code(bundle, index),
        "structure": lambda: checks.check_structure(bundle, index),
        "tensors": lambda: checks.check_tensors(bundle, index, console),
        "table": lambda: checks.check_table(bundle, manifest),
        **({"latents": lambda: checks.check_latents(bundle)} if family_of(bundle).axes == 3 else {}),
        "parts": lambda: checks.check_parts(bundle, index),
    }
    if against is not None:
        source = source_folder(str(against), manifest["sources"]["base"]["revision"])
        steps["against"] = lambda: checks.check_against(manifest, source)
    if trust_remote_code:
        del steps["code"]
    found: list[str] = []
    for name, step in steps.items():
        differences = step()
        console.say(f"verify {name}: {count_of(len(differences), 'difference') if differences else 'ok'}")
        found += differences
    picture = None
    if probe and not found:  # a folder that is known to be damaged is not loaded
        picture = run_probe(bundle, trust_remote_code)
        if "error" in picture:
            found.append(f"a fresh process could not draw a picture: {picture['error']}")
        else:
            frames = f", {picture['frames']} frames" if "frames" in picture else ""
            size = f"{picture['height']} x {picture['width']} px{frames}"
            console.say(f"verify picture: ok ({size}, {picture['runtime']} runtime)")
            if manifest["layout"] != "source":  # else the pipeline is the source's own
                untold = picture["untold"], picture.get("untold_width", picture["untold"])
                _tell_untold(untold, (manifest["defaults"]["height"], manifest["defaults"]["width"]), console)
    if found:
        raise CheckFailed(f"{bundle} failed its checks: {checks.listed(found)}", "copy or convert the bundle again")
    identical = sum(record["origin"] == "identical" for record in manifest["tensors"].values())
    return {
        "ok": True,
        "bundle": str(bundle),
        "signed_by": signed_by,
        "checks": [*(["signature"] if signed_by else []), *steps, *(["picture"] if picture else [])],
        "files": len(manifest["files"]),
        "tensors": {"total": len(manifest["tensors"]), "identical": identical},
        "picture": picture,
    }


def _check_signature(bundle: Path, signed_by: str | None, issuer: str | None, console: Console) -> None:
    """`signature.check`, and a line on what was looked at."""
    if issuer is not None and signed_by is None:
        raise InputError("--issuer says who vouches for an identity, and none is named", "add --signed-by IDENTITY")
    if signed_by is not None:
        signature.check(bundle, signed_by, issuer)
        console.say(f"verify signature: ok (of {signed_by})")
    elif (bundle / signature.FILE).is_file():
        console.say("verify: whose signature it has was not looked at; --signed-by says whose it must be")


def _tell_untold(untold: tuple[int, int], made_for: tuple[int, int], console: Console) -> None:
    """Say what a call without a size draws, (height, width) in px, where the bundle is not made for that."""
    if untold != made_for:
        drawn, wanted = (f"{height} x {width} px" for height, width in (untold, made_for))
        console.say(
            f"verify: without height and width the pipeline draws {drawn}, and this bundle is made for {wanted}: give "
            "both in each call"
        )


def source_folder(name: str, revision: str | None) -> Path:
    """Folder of a base model that is given as a folder, a catalogue name or a hub id (at the bundle's own revision)."""
    patterns = [f"{name}/*.{suffix}" for name in families.EVERY_COMPONENT for suffix in ("json", "safetensors")]
    return resolve_folder(Identity(name).where, revision=revision, patterns=patterns)[0]


def run_probe(bundle: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """What `bundle.probe` printed, or {"error": why it printed nothing}."""
    flags = ["--trust-remote-code"] if trust_remote_code else []
    with tempfile.TemporaryDirectory() as modules:
        # The child gets its own cache of in-bundle code, so that it cannot load a file that another bundle left there.
        child = subprocess.run(
            [sys.executable, "-m", "dcgen_convert.bundle.probe", str(bundle.absolute()), *flags],
            stdin=subprocess.DEVNULL,  # no library may ask a question there
            env=alone()
            | {
                "HF_MODULES_CACHE": modules,
                "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            check=False,
        )
    lines = child.stdout.strip().splitlines()
    if child.returncode or not lines:
        reason = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return {"error": f"it ended with code {child.returncode}: {reason}"}
    return json.loads(lines[-1])
