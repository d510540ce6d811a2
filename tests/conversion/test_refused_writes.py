"""A disk that is full, or that fails, in the middle of a large write: one sentence with the path, exit 4, and no file
or folder under the final name that is not whole. The same write succeeds afterwards, byte for byte.
"""

import errno
import os
import random
import resource
from contextlib import contextmanager

import pytest
import torch
from PIL import Image

from dcgen_convert.bundle import layout
from dcgen_convert.bundle.sample import write_png
from dcgen_convert.checkpoint import stream
from dcgen_convert.core import files
from dcgen_convert.core.errors import explain
from dcgen_convert.data import cache
from dcgen_convert.svdquant import trees

SIZE = 200_000  # bytes of each write
ROWS = {"z": torch.arange(SIZE // 4, dtype=torch.float32)[None]}
NOISE = Image.frombytes("L", (400, 600), random.Random(0).randbytes(400 * 600))


def tree(folder):
    with files.replacing(folder / "tree.safetensors") as temporary:
        trees.save({"a": ROWS["z"]}, temporary)


def copy(folder):
    origin = folder.parent / "origin"
    if not origin.exists():
        origin.write_bytes(bytes(range(250)) * (SIZE // 250))
    files.copy_file(origin, folder / "copy")


class Floats(stream.Item):
    def chunks(self):
        yield from (ROWS["z"].numpy().tobytes()[at : at + 4096] for at in range(0, SIZE, 4096))


def weights(folder):
    stream.write(folder / "w.safetensors", {"w": Floats("F32", (SIZE // 4,))})


WRITES = {
    "safetensors": lambda folder: files.atomic_save(ROWS, folder / "x.safetensors"),
    "latents": lambda folder: cache.write_shard(folder, "target-32", 0, ROWS),
    "captions": lambda folder: cache.write_captions(folder, ["a fox in the snow"] * (SIZE // 15)),
    "calls and spool": tree,
    "streamed weights": weights,
    "copied component": copy,
    "JSON": lambda folder: files.write_json(folder / "x.json", list(range(SIZE // 4))),
    "picture": lambda folder: write_png(NOISE, folder / "x.png"),
}


@contextmanager
def small_files(limit: int):
    """No file may grow beyond ``limit`` bytes: the kernel stops the write in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refuse(*_args, **_kwargs):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_refused_write_leaves_nothing(tmp_path, monkeypatch, write, failing):
    folder = tmp_path / "out"
    folder.mkdir()
    if write is copy:
        write(folder)
        (folder / "copy").unlink()
    with monkeypatch.context() as change, small_files(SIZE // 2 if failing == "write" else resource.RLIM_INFINITY):
        if failing != "write":
            change.setattr(os, failing, refuse)
        with pytest.raises(Exception) as caught:
            write(folder)
    error = explain(caught.value)
    assert error.exit_code == 4 and str(folder) in error.message and files.TEMPORARY not in error.message
    assert list(folder.iterdir()) == []
    write(folder)
    (whole,) = folder.iterdir()
    (other := tmp_path / "other").mkdir()
    write(other)
    assert whole.stat().st_size > SIZE // 2 and files.sha256(whole) == files.sha256(other / whole.name)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_in_the_words_of_safetensors(number):
    from safetensors import SafetensorError

    said = SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")
    assert (explain(said).exit_code, explain(said).message) == (4, "the disk is full")
    assert explain(SafetensorError("invalid header")).exit_code == 2


def test_the_bundle_that_was_there_comes_back_when_the_new_one_cannot_be_named(tmp_path, monkeypatch):
    staging, output = tmp_path / "staging", tmp_path / "bundle"
    for folder in (staging, output):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    rename = type(output).rename

    def once(self, target):
        return refuse() if self == staging else rename(self, target)

    with monkeypatch.context() as change:
        change.setattr(type(output), "rename", once)
        with pytest.raises(OSError, match="Input/output"):
            layout._swap(staging, output)
    assert (output / "name").read_text() == "bundle"
    layout._swap(staging, output)
    assert (output / "name").read_text() == "staging" and len(list(tmp_path.iterdir())) == 1
