"""sbom.cdx.json: valid by the schema of CycloneDX, complete by the word of pip, and the same bytes in each process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.utils import canonicalize_name
from warm import environment

from dcgen_convert.bundle import sbom
from dcgen_convert.bundle.manifest import FILE
from dcgen_convert.core.version import __version__

PRINT = "import json; from dcgen_convert.bundle import sbom; print(json.dumps(sbom.describe()))"


def test_it_is_valid_by_the_schema_and_names_every_package_that_pip_lists(bundles):
    text = (bundles("dit") / sbom.FILE).read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    document = json.loads(text)
    parts = {part["name"]: part.get("version") for part in document["components"]}
    command = [sys.executable, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]
    listed = json.loads(subprocess.run(command, capture_output=True, check=True, env=environment()).stdout)
    known = {canonicalize_name(one["name"]): one["version"] for one in listed}
    assert {**parts, sbom.OWN: ""} == {**known, "python": sys.version.split()[0], sbom.OWN: ""}
    assert document["metadata"]["component"]["version"] == __version__ and parts["torch"] == torch.__version__
    needs = {one["ref"]: one["dependsOn"] for one in document["dependencies"]}
    assert any(ref.startswith("pkg:pypi/numpy@") for ref in needs[f"pkg:pypi/diffusers@{parts['diffusers']}"])
    assert {ref for refs in needs.values() for ref in refs} <= needs.keys()


def test_it_is_the_same_in_another_process_and_tells_no_path(tmp_path):
    env = {**environment(), "PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", PRINT], cwd=tmp_path, env=env, capture_output=True, check=True)
    text = json.dumps(sbom.describe())
    assert json.loads(other.stdout) == json.loads(text) and other.stdout.decode().strip() == text
    assert not any(place in text for place in (sys.prefix, str(Path.home()), str(tmp_path)))


def test_it_is_a_file_of_the_bundle_like_the_others(bundles):
    assert sbom.FILE in json.loads((bundles("dit") / FILE).read_text())["files"]


def test_of_two_packages_with_one_name_the_imported_one_is_told(tmp_path, monkeypatch):
    for number, folder in enumerate(("first", "second"), 1):
        place = tmp_path / folder / f"Twin_Pack-{number}.dist-info"
        place.mkdir(parents=True)
        (place / "METADATA").write_text(
            f"Metadata-Version: 2.4\nName: Twin.Pack\nVersion: {number}+x\nRequires-Dist: torch\n"
            "Requires-Dist: pillow; extra == 'pictures'\nRequires-Dist: absent\nLicense: MIT\n"
        )
    (tmp_path / "first" / "left-0.dist-info").mkdir()
    places = [str(tmp_path / folder) for folder in ("first", "second")]
    before = sbom.describe()
    monkeypatch.setattr(sys, "path", [*places, *sys.path])  # as setuptools adds the packages inside it
    assert sbom.describe() == before
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")]))
    document = sbom.describe()
    (twin,) = [part for part in document["components"] if part["name"] == "twin-pack"]
    assert twin["purl"] == "pkg:pypi/twin-pack@1%2Bx" and twin["licenses"] == [{"license": {"name": "MIT"}}]
    (needs,) = [one["dependsOn"] for one in document["dependencies"] if one["ref"] == twin["bom-ref"]]
    assert [ref.partition("@")[0] for ref in needs] == ["pkg:pypi/torch"]
