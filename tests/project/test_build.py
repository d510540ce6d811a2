"""What is published: the sdist holds all that git holds, the wheel all that a user needs, and neither holds more."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORGE = ".github/"  # concerns the public repository only


def build(folder: Path, target: str, out: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
    (built,) = out.iterdir()
    return built


def tracked(*options: str) -> set[str]:
    """The files that git holds and that are there."""
    listed = subprocess.run(["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The sdist, unpacked."""
    files = build(ROOT, "sdist", tmp_path_factory.mktemp("sdist"))
    with tarfile.open(files) as archive:
        archive.extractall(folder := tmp_path_factory.mktemp("unpacked"), filter="data")
    (root,) = folder.iterdir()
    return root


def test_sdist_holds_what_git_holds(sdist):
    held = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    wanted = {name for name in tracked() if not name.startswith(FORGE)}
    assert wanted - held == set()
    assert held - wanted - tracked("--others", "--exclude-standard") == {"PKG-INFO"}


def test_wheel_of_the_sdist_holds_package_recipes_and_type_marker(sdist, tmp_path):
    with zipfile.ZipFile(build(sdist, "wheel", tmp_path)) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
        links = {name for name in held if (ROOT / name).is_symlink()}
        assert links and all(wheel.read(name) == (ROOT / name).read_bytes() for name in links)  # a wheel has none
    files = tracked("--cached", "--others", "--exclude-standard")
    package = {name for name in files if name.startswith("dcgen_convert/")}
    recipes = {f"dcgen_convert/{name}" for name in files if name.startswith("recipes/")}
    assert "dcgen_convert/py.typed" in package and len(recipes) > 10
    assert held == package | recipes
