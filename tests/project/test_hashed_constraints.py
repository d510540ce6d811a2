"""constraints-hashed.txt: the versions of constraints.txt but torch, each with hashes, and no place in it."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import hashed_constraints  # noqa: E402

TEXT = hashed_constraints.HASHED.read_text()
ENTRY = re.compile(r"([\w.-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n")


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_it_has_the_versions_of_the_plain_file_with_hashes_and_nothing_else():
    """So it names no index and no path either. pip reads it: `pip download --require-hashes`, by hand."""
    comment, entries = re.fullmatch(r"((?:#.*\n)+)((?:.*\n)+)", TEXT).groups()
    assert ENTRY.sub("", entries) == "" and not re.search(r"://|(?<!#) /\w", TEXT)
    versions = hashed_constraints.pins(hashed_constraints.VERSIONS.read_text())
    assert {plain(name): version for name, version, _ in ENTRY.findall(entries)} == {
        plain(name): version for name, version in versions.items() if name not in hashed_constraints.APART
    }
    assert f"pip install torch=={versions['torch']}," in comment
