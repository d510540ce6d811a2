"""The real command on several ranks: same work as on one, stops, deaths, other numbers of ranks. Nothing is left
behind.

The runs start from a copy of the one short conversion that all tests share: only the LoRA phase has to be done again.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import SHORT, WEIGHTS, copy_stages, run_cli, short_settings, start_cli
from safetensors.torch import load_file

from dcgen_convert.data.images import read_pixels

FLUX = ["tiny-flux", "--ae", "tiny-dc-ae-f32", "-y", "-o", "bundle", "--run-dir", "run"]
STEPS = 60
TRAIN = ["--until", "adapt-1", *short_settings(**{"adapt.phases.0.steps": STEPS, "adapt.phases.0.batch": 6})]
SECONDS = 120  # for an end that takes three on an idle machine


@pytest.fixture
def prepared(converted, tmp_path):
    """A folder with a run whose stages hold up to align-head."""
    copy_stages(converted, tmp_path, "align-head")
    return tmp_path


@pytest.fixture(scope="module")
def reference(converted, tmp_path_factory):
    """Losses and LoRA of the phase in one process."""
    folder = tmp_path_factory.mktemp("reference")
    shutil.copytree(converted / "run", folder / "run", ignore=shutil.ignore_patterns(".tmp-*"))
    done = run_cli(*FLUX, *TRAIN, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return losses(folder), load_file(folder / "run" / "adapt-1" / "export" / "modules.safetensors")


def losses(folder) -> list[float]:
    lines = (folder / "run" / "adapt-1" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(STEPS))
    return [json.loads(line)["loss"] for line in lines]


def assert_like(folder, reference) -> None:
    """Loss and weights as in one process, up to the order of float32 sums."""
    curve, weights = reference
    assert max(abs(a - b) for a, b in zip(losses(folder), curve, strict=True)) < 1e-4
    ours = load_file(folder / "run" / "adapt-1" / "export" / "modules.safetensors")
    assert max((ours[name] - weights[name]).abs().max() for name in weights) < 1e-4


def wait_for(path, process, seconds=300) -> None:
    """Until there is something in the file."""
    deadline = time.monotonic() + seconds
    while not path.exists() or not path.stat().st_size:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.02)


def wait_for_training(folder, process) -> None:
    """Until all ranks have trained for 20 of the steps: only then are the first figures written."""
    wait_for(folder / "run" / "adapt-1" / "metrics.jsonl", process)


def ranks_of(folder) -> dict[int, psutil.Process]:
    """Ranks that work in ``folder``, by number."""
    found = {}
    for process in psutil.process_iter():
        try:
            if (
                process.cwd() == str(folder)
                and "dcgen_convert.cli" in process.cmdline()
                and "RANK" in process.environ()
            ):
                found[int(process.environ()["RANK"])] = process
        except psutil.Error:
            continue
    return found


def assert_nothing_left(folder, seconds=SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while left := ranks_of(folder):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)


def test_two_ranks_share_the_stages_and_go_on_after_a_death(converted, tmp_path):
    command = [*FLUX, "--gpus", "2", "--until", "align-head", *short_settings(**{"data.batch": 8})]
    process = start_cli(*command, cwd=tmp_path)
    pictures = tmp_path / "run" / "data" / "pictures"
    wait_for(pictures / "0000001.png", process)
    ranks_of(tmp_path)[1].kill()
    assert process.communicate(timeout=SECONDS)[0] == "" and process.returncode == 4
    drawn = {path: path.stat().st_mtime_ns for path in pictures.glob("0*.png")}
    assert 0 < len(drawn) < SHORT["data.count"]
    done = run_cli(*command, cwd=tmp_path, timeout=900)
    assert all(path.stat().st_mtime_ns == time for path, time in drawn.items())  # not drawn again
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == f"{tmp_path / 'run'}\n"
    assert "ranks: 2" in done.stderr and done.stderr.count("align head: after") == 1  # one rank speaks
    log = (tmp_path / "run" / "log-rank-1.txt").read_text()
    assert all(f"task {task}" in log for task in ("pictures", "latents", "captions", "fit-head", "train-head"))
    for path in sorted((converted / "run" / "data" / "pictures").iterdir()):
        ours, theirs = (read_pixels(file, 128) for file in (pictures / path.name, path))
        assert (ours - theirs).abs().max() <= 1.01 * 2 / 255  # one level: batches of another size round differently
    files = sorted((converted / "run" / "latents").glob("*.safetensors"))
    for path in [*files, converted / "run" / "align-head" / "modules.safetensors"]:
        ours, theirs = load_file(tmp_path / path.relative_to(converted)), load_file(path)
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[name], theirs[name], atol=5e-3) for name in theirs), path.name
    assert_nothing_left(tmp_path)


def test_two_ranks_draw_the_calibration_and_the_bundle_is_the_same_to_the_byte(converted, tmp_path):
    assert os.environ["OMP_NUM_THREADS"] == "1"  # the order of float32 sums depends on the threads
    copy_stages(converted, tmp_path, "merge-1")
    quantize = ["--quantize", "nvfp4", "--until", "quantize", "--gpus", "2", *short_settings()]
    done = run_cli(*FLUX, *quantize, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    made = []
    for folder in (converted, tmp_path):
        files = [path for path in (folder / "run" / "quantize").rglob("*") if path.suffix in (".safetensors", ".json")]
        made.append({str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != "stage.json"})
    log = (tmp_path / "run" / "log-rank-1.txt").read_text()
    assert "task calibration" in log and "task blocks" in log
    assert sum("/call-" in name for name in made[0]) == 4  # two prompts, two steps
    assert made[0].keys() == made[1].keys() and [name for name in made[0] if made[0][name] != made[1][name]] == []


def test_sigterm_writes_a_checkpoint_and_another_number_of_ranks_goes_on(prepared, reference):
    process = start_cli(*FLUX, *TRAIN, "--gpus", "2", cwd=prepared)
    wait_for_training(prepared, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 143, err[-2000:]
    assert out == "" and "a checkpoint is written" in err and "Traceback" not in err
    assert err.splitlines()[-1] == f"dcgen-convert resume {prepared / 'run'}"
    assert_nothing_left(prepared)
    refused = run_cli("resume", "run", "--gpus", "4", cwd=prepared)
    assert refused.returncode == 2
    assert "4 ranks cannot share these batches evenly: adapt.phases.0.batch = 6" in refused.stderr
    assert "ranks: 4" not in refused.stderr  # none is started
    (prepared / "hosts").write_text("localhost slots=3\n")
    done = run_cli(*FLUX, *TRAIN, "--hostfile", "hosts", cwd=prepared)
    assert done.returncode == 0 and done.stdout == f"{prepared / 'run'}\n", done.stderr[-2000:]
    assert "continuing from the checkpoint of step" in done.stderr
    assert_like(prepared, reference)


def test_kill_9_of_a_rank_ends_the_job_and_it_can_go_on(prepared, reference):
    """Rank 0, which cannot say it itself; of rank 1 the restarts and the two hosts tell."""
    process = start_cli(*FLUX, *TRAIN, "--gpus", "2", "--json", cwd=prepared)
    wait_for_training(prepared, process)
    ranks_of(prepared)[0].kill()
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 4, err[-2000:]
    error = json.loads(out)["error"]
    assert error["code"] == "rank-lost"
    assert "rank 0 was" in error["message"] and str(prepared / "run" / "log.txt") in error["message"]
    assert error["hint"] == f"dcgen-convert resume {prepared / 'run'}"
    assert_nothing_left(prepared)
    done = run_cli(*FLUX, *TRAIN, cwd=prepared)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_like(prepared, reference)


TWO_HOSTS = "localhost slots=1\n127.0.0.1 slots=1\n"


@pytest.mark.parametrize("hosts", [None, TWO_HOSTS])
def test_ranks_do_not_outlive_the_command_that_started_them(prepared, hosts):
    (prepared / "hosts").write_text(hosts or "")
    process = start_cli(*FLUX, *TRAIN, *(["--hostfile", "hosts"] if hosts else ["--gpus", "2"]), cwd=prepared)
    wait_for_training(prepared, process)
    assert len(ranks_of(prepared)) == 2
    process.kill()
    process.communicate()
    assert_nothing_left(prepared)
    if hosts != TWO_HOSTS:
        assert list((prepared / "run" / "adapt-1" / "checkpoints").glob("step-*"))  # they stopped as on SIGTERM


SSH = """#!/bin/sh
# stands in for ssh: runs the command on this host, in a shell, as sshd does
printf '%s\\n' "$*" >> "$SSH_LOG"
while [ "$1" = -o ]; do shift 2; done
shift
exec env -i HOME="$HOME" PYTHONPATH="$PYTHONPATH" sh -c "$*"
"""


def test_another_host_gets_everything_over_ssh(tmp_path, monkeypatch):
    """Its agent starts in an empty environment; what it needs, secrets too, comes on its stdin."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(SSH)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    (tmp_path / "hosts").write_text(f"{socket.gethostname()} slots=1\nfar-away slots=1\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SSH_LOG", str(tmp_path / "ssh.log"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    done = run_cli(*FLUX, "--hostfile", "hosts", "--until", "surgery", *short_settings(), cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == f"{tmp_path / 'run'}\n", done.stderr[-2000:]
    assert "rank 1 of 2" in (tmp_path / "run" / "log-rank-1.txt").read_text()
    called = (tmp_path / "ssh.log").read_text().splitlines()
    assert called[0].endswith("far-away true") and called[1].endswith("-m dcgen_convert.ranks.hosts")
    assert "hf_secret" not in "".join(called)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("number", [0, 1])
def test_a_dead_host_ends_the_job_on_the_other(prepared, number):
    """Two hosts on loopback: one agent and its rank each. Everything of one of them is killed at once."""
    (prepared / "hosts").write_text(TWO_HOSTS)
    process = start_cli(*FLUX, *TRAIN, "--hostfile", "hosts", cwd=prepared)
    wait_for_training(prepared, process)
    rank = ranks_of(prepared)[number]
    agent = rank.parent()
    assert agent.pid != process.pid
    agent.kill()
    rank.kill()
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 4 and out == "", err[-2000:]
    said = f"rank {number} was lost" if number else "localhost, the host of rank 0, was lost"
    assert said in err and f"dcgen-convert resume {prepared / 'run'}" in err and err.count("error:") == 1, err
    assert_nothing_left(prepared)


def test_a_crash_starts_the_ranks_again_and_the_job_ends_by_itself(prepared, reference):
    """Rank 0 is killed, then rank 1; --json sees one document."""
    process = start_cli(*FLUX, *TRAIN, "--gpus", "2", "--restarts", "2", "--json", cwd=prepared)
    known: set[int] = set()
    for number in (0, 1):
        await_training(prepared, process, known)
        known |= {rank.pid for rank in ranks_of(prepared).values()}
        ranks_of(prepared)[number].kill()
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-2000:]
    assert json.loads(out)["status"] == "stopped" and "error:" not in err
    for number in (0, 1):
        log = prepared / "run" / ("log-rank-1.txt" if number else "log.txt")
        assert f"warning: rank {number} was lost: it was killed or it crashed; its log is {log}" in err, err
    assert err.count("the ranks start again") == 2
    assert_like(prepared, reference)
    assert_nothing_left(prepared)


def await_training(folder, process, known) -> None:
    """Until ranks that are not ``known`` have trained for a second."""
    deadline = time.monotonic() + 900
    metrics = folder / "run" / "adapt-1" / "metrics.jsonl"
    while not metrics.exists() or len({rank.pid for rank in ranks_of(folder).values()} - known) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no training"
        time.sleep(0.05)
    before = metrics.stat().st_mtime_ns
    while metrics.stat().st_mtime_ns == before and process.poll() is None:
        time.sleep(0.02)


def test_torchrun_ranks_join(prepared, reference):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    env = {**os.environ, "CI": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WEIGHTS.parents[2])}
    done = subprocess.run(
        [*command, "dcgen_convert.cli", *FLUX, *TRAIN],
        cwd=prepared,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == f"{prepared / 'run'}\n"
    assert_like(prepared, reference)


def test_what_the_ranks_cannot_share_is_refused_before_anything_starts(tmp_path):
    """Nor does such an error start the ranks again."""
    done = run_cli(*FLUX, "--gpus", "3", "--restarts", "3", *short_settings(), cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and "start again" not in done.stderr
    assert "3 ranks cannot share these batches evenly: align_head.batch = 8, adapt.phases.0.batch = 8" in done.stderr
    assert "hint: --set align_head.batch=9 --set adapt.phases.0.batch=9" in done.stderr
    assert done.stderr.count("error:") == 1 and "ranks: 3" not in done.stderr
    assert_nothing_left(tmp_path)


def test_a_launcher_and_another_number_of_gpus_contradict(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    done = run_cli(*FLUX, "--gpus", "3", cwd=tmp_path)
    assert done.returncode == 2 and "a launcher has started 2 ranks, --gpus asks for 3" in done.stderr
