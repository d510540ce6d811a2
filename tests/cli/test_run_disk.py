"""`doctor --run-dir` tries what a run needs of its file system, and leaves nothing behind."""

import errno
import os
import resource

import pytest

from dcgen_convert.cli import run_disk

NAMES = ["run folder", *run_disk.CHECKS]


@pytest.mark.parametrize("name", ["there", "new/and/deeper"])
def test_a_disk_that_can_hold_a_run(tmp_path, name):
    (tmp_path / "there").mkdir()
    found = run_disk.examine(tmp_path / name)
    assert [*found] == NAMES and {row["state"] for row in found.values()} <= {"ok", "limited"}, found
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def refused(number):
    def refuse(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize(
    ("function", "check"),
    [
        ("fcntl.flock", "run locks"),
        ("os.replace", "run rename"),
        ("os.fsync", "run fsync"),
        ("os.symlink", "run links"),
    ],
)
def test_what_the_system_refuses_is_told_with_what_needs_it(tmp_path, monkeypatch, function, check):
    monkeypatch.setattr(function, refused(errno.EOPNOTSUPP))
    found = run_disk.examine(tmp_path)
    assert found[check]["state"] == "missing"
    assert found[check]["text"] == f"refused ({os.strerror(errno.EOPNOTSUPP)}): {run_disk.CHECKS[check][1]}"
    assert found["run space"]["state"] != "missing" and not [*tmp_path.iterdir()]


def test_without_hard_links_a_run_takes_more_space(tmp_path, monkeypatch):
    monkeypatch.setattr("os.link", refused(errno.EPERM))
    row = run_disk.examine(tmp_path)["run links"]
    assert row["state"] == "limited" and "are copied" in row["text"]


def test_a_file_system_for_small_files(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**32 - 1, hard))
    try:
        found = run_disk.examine(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [name for name, row in found.items() if row["state"] == "missing"] == ["run file size"]
    assert not [*tmp_path.iterdir()]


def test_a_lock_that_others_do_not_see(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    assert run_disk.examine(tmp_path)["run locks"]["state"] == "missing"


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    for name in ("file", "file/runs"):
        found = run_disk.examine(tmp_path / name)
        text = f"{tmp_path / 'file'} is not a folder: choose another --run-dir"
        assert found == {"run folder": {"state": "missing", "text": text}}
    found = run_disk.examine(run_disk.Path("/proc/run"))  # where nobody can make a folder
    assert [*found] == ["run folder"] and found["run folder"]["text"].startswith("nothing can be written in /proc")
