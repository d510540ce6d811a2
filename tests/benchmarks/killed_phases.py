"""Three phases with pictures of their own: `kill -9` at random moments, then the bundle must be that of an undisturbed
run, byte by byte but for times and the steps that trainings went on from.

    python tests/benchmarks/killed_phases.py [kills, 10] [seed, 0]

Prints when and in which stage each kill came, and every file of the bundle that differs.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import three_phases
from conftest import start_cli

from dcgen_convert.core.names import MANIFEST

ARGUMENTS = ("three.yaml", "-y", "-o", "bundle", "--run-dir", "run")


def bundle(folder: Path) -> dict[str, bytes]:
    """Every file of the bundle, and what must be equal of its manifest."""
    files = [path for path in sorted((folder / "bundle").rglob("*")) if path.is_file()]
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    manifest = json.loads(found[f"bundle/{MANIFEST}"])
    found[f"bundle/{MANIFEST}"] = json.dumps({key: manifest[key] for key in ("recipe", "files", "sources")}).encode()
    return found


def stage_of(folder: Path) -> str:
    """The stage in work: the folder that was written last."""
    files = [path for path in (folder / "run").rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_mtime).relative_to(folder / "run").parts[0] if files else "none"


def main(kills: int, seed: int) -> int:
    root, chance = Path(tempfile.mkdtemp()), random.Random(seed)
    for name in ("whole", "killed"):
        (root / name).mkdir()
        three_phases.write(root / name)
    begun = time.monotonic()
    process = start_cli("convert", *ARGUMENTS, cwd=root / "whole")
    _, said = process.communicate()
    seconds = time.monotonic() - begun
    print(f"undisturbed: exit code {process.returncode}, {seconds:.0f} s, in {root}", flush=True)
    if process.returncode:
        print(said)
        return 1
    done, words = 0, ("convert", *ARGUMENTS)
    while done < kills:
        process = start_cli(*words, cwd=root / "killed")
        wait = chance.uniform(1.0, seconds / 2)
        try:
            process.communicate(timeout=wait)
            print(f"it was done before kill {done + 1}: {process.returncode}; again from the start of the trainings")
            words = ("resume", "run", "--from", "adapt-1")
            continue
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        done += 1
        print(f"kill {done} after {wait:.1f} s in {stage_of(root / 'killed')}", flush=True)
        words = ("resume", "run") if (root / "killed" / "run" / "recipe.json").exists() else words
    process = start_cli(*words, cwd=root / "killed")
    _, said = process.communicate()
    wanted, found = bundle(root / "whole"), bundle(root / "killed")
    differ = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
    print(f"at the end: exit code {process.returncode}; of {len(wanted)} files differ: {sorted(differ)}")
    return int(bool(process.returncode or differ))


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:]]
    sys.exit(main(*(given + [10, 0][len(given) :])))
