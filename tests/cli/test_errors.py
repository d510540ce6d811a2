"""Every foreign exception has a sentence and the right exit code. The exceptions are their libraries' own."""

import errno
import json
import pickle

import httpx2 as httpx
import pytest
import yaml

from dcgen_convert.core import errors


def raised(function, *args):
    try:
        function(*args)
    except BaseException as exc:  # noqa: BLE001  the test compares what was raised
        return exc
    raise AssertionError("nothing was raised")


def truncated_safetensors(tmp_path):
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-50])
    return raised(lambda: safe_open(path, "pt"))


def gated(tmp_path):
    from huggingface_hub.errors import GatedRepoError

    request = httpx.Request("GET", "https://huggingface.co/x/y")
    return GatedRepoError("Cannot access gated repo", response=httpx.Response(403, request=request))


def not_cached(tmp_path):
    from huggingface_hub import hf_hub_download

    return raised(lambda: hf_hub_download("x/y", "config.json", cache_dir=tmp_path, local_files_only=True))


def out_of_memory(tmp_path):
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


CASES = {
    "ctrl-c": (lambda p: KeyboardInterrupt(), 130, "interrupted"),
    "sigterm": (lambda p: errors.Terminated(), 143, "terminated"),
    "gated": (gated, 3, "access"),
    "not cached": (not_cached, 3, "access"),
    "cuda memory": (out_of_memory, 4, "resources"),
    "host memory": (lambda p: MemoryError("10 GB"), 4, "resources"),
    "disk full": (lambda p: OSError(errno.ENOSPC, "No space left on device", str(p)), 4, "resources"),
    "quota": (lambda p: OSError(errno.EDQUOT, "Disk quota exceeded"), 4, "resources"),
    "truncated": (truncated_safetensors, 2, "input"),
    "bad json": (lambda p: raised(json.loads, "{"), 2, "input"),
    "bad yaml": (lambda p: raised(yaml.safe_load, "a: ["), 2, "recipe"),
    "pickle": (lambda p: raised(pickle.loads, b"no"), 2, "input"),
    "missing file": (lambda p: raised(open, p / "none"), 2, "input"),
    "folder instead of file": (lambda p: PermissionError(errno.EACCES, "denied", str(p)), 2, "input"),
    "a fault of ours": (lambda p: raised(lambda: 1 / 0), 70, "internal"),
    "a broken disk": (lambda p: OSError(errno.EIO, "I/O error"), 4, "resources"),
    "no locks": (lambda p: OSError(errno.ENOLCK, "No locks available"), 4, "resources"),
    "a folder for a file": (lambda p: raised(open, p), 2, "input"),
    "a long name": (lambda p: raised(open, p / ("x" * 300)), 2, "input"),
    "a library's OSError": (lambda p: OSError("Can't load the tokenizer"), 2, "input"),
    "a pipe without reader": (lambda p: BrokenPipeError(errno.EPIPE, "Broken pipe"), 4, "resources"),
}


@pytest.mark.parametrize("name", CASES)
def test_explained(name, tmp_path):
    make, code, word = CASES[name]
    error = errors.explain(make(tmp_path))
    assert (error.exit_code, error.code) == (code, word)
    assert error.message
    assert "\n" not in error.message


@pytest.mark.parametrize("path", ["x/y/resolve/main/config.json", "api/models/x/y/revision/main"])
def test_a_gated_repository_names_the_page_to_accept(path):
    from huggingface_hub.errors import GatedRepoError

    request = httpx.Request("GET", f"https://huggingface.co/{path}")
    error = errors.explain(GatedRepoError("Cannot access gated repo", response=httpx.Response(403, request=request)))
    assert error.message == "x/y is gated and this account has no access to it"
    assert error.hint == "accept its licence at https://huggingface.co/x/y, then set HF_TOKEN"


def test_own_errors_pass_through_unchanged():
    own = errors.CheckFailed("two tensors differ", "convert again")
    assert errors.explain(own) is own
    assert own.document() == {"error": {"code": "check", "message": "two tensors differ", "hint": "convert again"}}


def test_the_public_surface_is_frozen():
    table = {cls.__name__: (cls.exit_code, cls.code) for cls in errors.DcgenError.__subclasses__()}
    assert table == {
        "InputError": (2, "input"),
        "AccessError": (3, "access"),
        "ResourceError": (4, "resources"),
        "CheckFailed": (1, "check"),
        "InternalError": (70, "internal"),
        "InterruptedRun": (130, "interrupted"),
    }
    assert (errors.RecipeError.exit_code, errors.RecipeError.code) == (2, "recipe")
