"""The software that made a bundle, in the form of CycloneDX 1.6 (https://cyclonedx.org/docs/1.6/json/).

It lists every package of the running Python with its licence and with the packages that it needs. It holds no time, no
random number and no path: the same environment gives the same bytes.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import Distribution, PackageMetadata, distributions
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from dcgen_convert.core.version import __version__

FILE = "sbom.cdx.json"
OWN = "dcgen-convert"
LICENCE = "License :: OSI Approved :: "  # how a classifier that names a licence begins


def describe() -> dict[str, Any]:
    """The software of this environment as a CycloneDX document."""
    packages = _packages()
    needs = {name: _needs(package, packages) for name, package in packages.items()}
    parts = {name: _component(name, package.version, package.metadata) for name, package in packages.items()}
    own = {**parts.pop(OWN, {}), **_component(OWN, __version__, None)}  # a checkout may run before the installed one
    python = {"type": "platform", "bom-ref": "python", "name": "python", "version": platform.python_version()}
    references = {name: part["bom-ref"] for name, part in {**parts, OWN: own}.items()}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {**own, "type": "application"}},
        "components": [python, *parts.values()],
        "dependencies": [
            {"ref": references[name], "dependsOn": [references[other] for other in sorted(needs.get(name, ()))]}
            for name in sorted(references)
        ],
    }


def _packages() -> dict[str, Distribution]:
    """Name -> what is imported under it, sorted: of two with one name, the first that Python finds."""
    found: dict[str, Distribution] = {}
    for package in distributions(path=_places()):
        if package.metadata["Name"]:  # else a folder that an uninstallation has left
            found.setdefault(canonicalize_name(package.metadata["Name"]), package)
    return dict(sorted(found.items()))


def _places() -> list[str]:
    """Where a new Python of this environment looks for packages. What was imported may have added to our own sys.path:
    setuptools does, for the packages inside it.
    """
    tell = "import os, sys; sys.stdout.buffer.write(os.fsencode('\\0'.join(sys.path)))"
    told = subprocess.run([sys.executable, "-P", "-c", tell], stdin=subprocess.DEVNULL, capture_output=True, check=True)
    return os.fsdecode(told.stdout).split("\0")


def _needs(package: Distribution, known: dict[str, Distribution]) -> set[str]:
    """The packages here that this one requires, without its extras."""
    found: set[str] = set()
    for line in package.requires or ():
        try:
            required = Requirement(line)
        except InvalidRequirement:  # an old package; pip reads more than the standard allows
            continue
        if required.marker is None or required.marker.evaluate({"extra": ""}):
            found.add(canonicalize_name(required.name))
    return found & known.keys()


def _component(name: str, version: str, about: PackageMetadata | None) -> dict[str, Any]:
    address = f"pkg:pypi/{name}@{version.replace('+', '%2B')}"
    found: dict[str, Any] = {"type": "library", "bom-ref": address, "name": name, "version": version, "purl": address}
    if about is not None and (licences := _licences(about)):
        found["licenses"] = licences
    return found


def _licences(about: PackageMetadata) -> list[dict[str, Any]]:
    """What the package says: an SPDX expression, else the names in its classifiers, else a line of words."""
    for expression in about.get_all("License-Expression") or ():
        return [{"expression": expression}]
    named = [line.removeprefix(LICENCE) for line in about.get_all("Classifier") or () if line.startswith(LICENCE)]
    named = named or [line for line in about.get_all("License") or () if line.strip() and "\n" not in line]
    return [{"license": {"name": name}} for name in sorted(set(named))]
