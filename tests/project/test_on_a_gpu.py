"""The script for a machine with a GPU, at tiny sizes on the CPU: its parts run, its rates have the names of `plan`."""

import json
import subprocess
import sys
from pathlib import Path

from dcgen_convert.planning import rates

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "on_a_gpu.py"
PARTS = ("host", "autoencoder", "solvers", "sana-1.6b", "flux-dev")  # conversions have tests enough


def test_the_script_for_a_gpu_measures_every_kind_of_work(tmp_path):
    command = [sys.executable, str(SCRIPT), "out.json", "--small", "--only", *PARTS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found["parts"]) == set(PARTS) and not found["failed"]
    assert set(found["rates"]) == set(rates.H100.rates) - {"network"}
    assert all(rate > 0 for rate in found["rates"].values())
    assert all(found["parts"][name]["seconds_per_sample"] > 0 for name in PARTS[3:])


def test_a_part_that_fails_is_told_and_ends_with_1(tmp_path):
    """What fails leaves the other parts alone."""
    code = f"""
import sys; sys.argv = ["on_a_gpu.py", "out.json", "--small", "--only", "host", "solvers"]
sys.path.insert(0, {str(SCRIPT.parent)!r})
import on_a_gpu
on_a_gpu.PARTS = [("host", lambda check: 1 / 0, 1), ("solvers", on_a_gpu.solvers, 1)]
sys.exit(on_a_gpu.main())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    found = json.loads((tmp_path / "out.json").read_text())
    assert (done.returncode, found["failed"]) == (1, ["host"])
    assert "ZeroDivisionError" in found["parts"]["host"]["error"] and found["rates"]["columns"] > 0
