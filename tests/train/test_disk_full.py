"""A disk that fills up in the middle of a save, on a real small file system: one sentence, exit 4, nothing lost."""

import json
import subprocess

import pytest
import warm

from dcgen_convert.core.files import TEMPORARY
from dcgen_convert.train import checkpoints

from .train_worker import adapt, losses, run_ranks, start_ranks


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a tmpfs of so many bytes, or resizes the one that is there; its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def resize(size: int):
        nonlocal mounted
        options = (
            ["-o", f"remount,size={size}", str(folder)] if mounted else ["-o", f"size={size}", "tmpfs", str(folder)]
        )
        done = subprocess.run(["mount", "-t", "tmpfs", *options], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no permission to mount a file system: {done.stderr.strip()}")
        mounted = True
        return folder

    yield resize
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    adapt(folder)
    return folder


@pytest.mark.parametrize("world", [1, 2])
def test_full_disk_in_a_save(tmp_path, small_disk, whole, world):
    size = sum(path.stat().st_size for path in checkpoints.whole(whole / "checkpoints")[0].iterdir())
    disk = small_disk(5 * size // 2)  # two checkpoints, and half of the third
    log, job = tmp_path / "ranks.log", {"folder": str(disk / "run"), "saving": [4, 0.0]}
    ranks = start_ranks(world, [job], log)
    out = [process.communicate(timeout=300)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [4] * world, log.read_text()[-2000:]
    error = json.loads(out[0])["error"]
    assert error["code"] == "resources" and "the checkpoint of step 12 could not be written" in error["message"]
    assert (
        "No space left on device" in error["message"]
        and error["hint"] == "free disk space, then resume: the previous checkpoint is whole"
    )
    assert "Traceback" not in log.read_text() and out[1:] == [""] * (world - 1)
    folder = disk / "run" / "checkpoints"
    assert [path.name for path in checkpoints.whole(folder)] == ["step-000004", "step-000008"]
    assert not list(folder.glob(f"{TEMPORARY}*"))
    small_disk(20 * size)
    run_ranks(world, [job], log)
    if world == 1:
        assert losses(disk / "run") == losses(whole)
    else:
        assert max(abs(a - b) for a, b in zip(losses(disk / "run"), losses(whole), strict=True)) < 1e-6


def test_a_training_in_this_process_lets_later_runs_be_forks(whole):
    """Else each start of the command in all later test files would import the large packages again."""
    assert warm.serves(warm.environment())
