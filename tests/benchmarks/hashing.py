"""How long hashing the files of a stage takes: `files.hashes` against one file after the other, in one run.

    python tests/benchmarks/hashing.py [MB per file, 256]

Eight files that are in memory already, so the disk has no part in it. Prints the best of five of both, and their ratio.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dcgen_convert.core.files import hashes, sha256


def best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of five."""
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def main(size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(number) for number in range(8)]
        for path in files:
            path.write_bytes(os.urandom(1 << 20) * size)
        assert hashes(files) == [sha256(path) for path in files]
        one, many = best(lambda: [sha256(path) for path in files]), best(lambda: hashes(files))
    total = 8 * size / 1e3
    print(f"{os.cpu_count()} cores: one after the other {total / one:.2f} GB/s, together {total / many:.2f} GB/s, "
          f"{one / many:.2f} x")  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 256)
