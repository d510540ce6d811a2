"""What needs no torch must not import it, and must answer at once."""

import resource

import pytest

LIGHT = [
    ["--help"],
    ["--version"],
    ["convert", "--help"],
    ["plan", "flux-krea", "--json", "--disk", "2000"],
    ["plan", "sana-1.6b"],
    ["recipes", "list"],
    ["recipes", "show", "flux-krea"],
    ["completion", "bash"],
    ["qantize"],
]
PROBE = """
import sys
from dcgen_convert.cli.app import main
try:
    main(sys.argv[1:])
finally:
    heavy = {"torch", "diffusers", "transformers", "peft", "deepspeed", "numpy"} & set(sys.modules)
    print("heavy:", sorted(heavy), file=sys.__stderr__)
"""


@pytest.mark.parametrize("args", LIGHT, ids=" ".join)
def test_no_heavy_import(python, args):
    done = python(PROBE, *args)
    assert done.stderr.endswith("heavy: []\n"), done.stderr


@pytest.mark.parametrize(
    "args, limit",
    [(["--help"], 0.5), (["recipes", "list"], 1.0), (["plan", "flux-krea", "--json", "--disk", "2000"], 1.0)],
)
def test_answers_at_once(cli, args, limit):
    """Seconds of processor time: what the answer costs, whatever else the machine is doing."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert cli(*args).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < limit
