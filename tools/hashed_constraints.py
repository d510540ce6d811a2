"""Renew constraints-hashed.txt: the versions of constraints.txt, with the SHA-256 of every file published of them.

    pip install uv && python tools/hashed_constraints.py

uv asks the index that it is configured with. Neither the index nor a path of this machine stands in the file.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS, HASHED = ROOT / "constraints.txt", ROOT / "constraints-hashed.txt"
APART = ("torch",)
HEADER = """\
# The versions of constraints.txt with the SHA-256 of every published file. Made by tools/hashed_constraints.py.
# pip install torch=={torch}, then: pip install --no-deps --require-hashes -r constraints-hashed.txt
# Left out are torch and the CUDA packages that it brings: one version has other files for the CPU and for each CUDA,
# and they come from other indexes.
"""


def pins(text: str) -> dict[str, str]:
    """Package -> version, of the lines NAME==VERSION."""
    lines = (line.partition(" ")[0] for line in text.splitlines() if "==" in line and not line.startswith("#"))
    return dict(line.split("==") for line in lines)


def hashed(versions: dict[str, str]) -> str:
    """The lines of ``versions`` with hashes, as pip reads them."""
    command = ["uv", "pip", "compile", "--no-deps", "--generate-hashes", "--no-header", "--no-annotate", "--quiet", "-"]
    wanted = "".join(f"{name}=={version}\n" for name, version in versions.items())
    return subprocess.run(command, input=wanted, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def main() -> int:
    versions = pins(VERSIONS.read_text(encoding="utf-8"))
    lines = hashed({name: version for name, version in versions.items() if name not in APART})
    HASHED.write_text(HEADER.format(torch=versions["torch"]) + lines, encoding="utf-8")
    print(f"{HASHED.name}: {lines.count('==')} packages, {lines.count('--hash=')} hashes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
