"""`doctor`: what this machine can do. Each check answers with a state ("ok", "missing", "limited") and one line."""

from __future__ import annotations

import http.client
import importlib.util
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dcgen_convert.cli import run_disk
from dcgen_convert.core.disk import existing
from dcgen_convert.planning.costs import hub_cache
from dcgen_convert.planning.text import size

PACKAGES = ("diffusers", "transformers", "peft", "safetensors", "huggingface_hub", "accelerate")
IMPORT_SECONDS = 120
ANSWER_SECONDS = 5.0


def examine(run_dir: Path | None = None) -> dict[str, dict[str, Any]]:
    """Every check by name: {"state": "ok" | "limited" | "missing", "text": one line, ...facts}.

    Args:
        run_dir: also try whether this folder, which need not exist yet, can hold a run.
    """
    checks: dict[str, Callable[[], dict[str, Any]]] = {
        "python": _python,
        "torch": _torch,
        "gpus": _gpus,
        "training": _training,
        "4-bit kernels": _kernels,
        "deepspeed": _deepspeed,
        "packages": _packages,
        "memory": _memory,
        "disk": _disk,
        "hub": _hub,
    }
    found = {name: check() for name, check in checks.items()}
    return found if run_dir is None else {**found, **run_disk.examine(run_dir)}


def render(found: dict[str, dict[str, Any]]) -> str:
    """One line per check."""
    width = max(map(len, found))
    return "\n".join(f"{name:<{width}}  {check['state']:<8}  {check['text']}" for name, check in found.items())


def _answer(state: str, text: str, **facts: object) -> dict[str, Any]:
    return {"state": state, "text": text, **facts}


def _python() -> dict[str, Any]:
    text = f"{sys.version.split()[0]} on {sys.platform}"
    return _answer("ok" if sys.version_info >= (3, 11) else "missing", text)


def _torch() -> dict[str, Any]:
    if importlib.util.find_spec("torch") is None:
        return _answer("missing", "not installed: pip install torch")
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return _answer("ok", f"{torch.__version__} ({build}, {torch.get_num_threads()} threads)", version=torch.__version__)


def _gpus() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return _answer("limited", "none: tiny recipes and `plan` run, large conversions do not", gpus=[])
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    gpus = [{"name": card.name, "bytes": card.total_memory, "capability": [card.major, card.minor]} for card in cards]
    text = "; ".join(
        f"{card.name} {card.total_memory / 2**30:.0f} GiB (capability {card.major}.{card.minor})" for card in cards
    )
    return _answer("ok", text, gpus=gpus)


def _training() -> dict[str, Any]:
    """bf16 on the device that training would use."""
    import torch

    if torch.cuda.is_available():
        return _answer("ok", "bf16 on the GPU" if torch.cuda.is_bf16_supported() else "no bf16 here: use --dtype fp32")
    return _answer("limited", f"CPU only, {os.cpu_count()} cores: fp32, tiny recipes")


def _kernels() -> dict[str, Any]:
    """NVFP4 kernels need the package `kernels`, its opt-in, and a GPU of capability 12.x; INT4 7.5, 8.x or 12.x."""
    import torch

    reference = "4-bit bundles are drawn through the dequantised reference"
    if not torch.cuda.is_available():
        return _answer("limited", f"no GPU: {reference}")
    capability = torch.cuda.get_device_capability()
    formats = [
        name
        for name, fits in (("nvfp4", capability >= (12, 0)), ("int4", capability[0] in (8, 12) or capability == (7, 5)))
        if fits
    ]
    if not formats:
        return _answer("limited", f"none compiled for capability {capability[0]}.{capability[1]}: {reference}")
    if importlib.util.find_spec("kernels") is None:
        return _answer("missing", f"this GPU runs {', '.join(formats)}: pip install kernels")
    if os.environ.get("DIFFUSERS_TRUST_REMOTE_KERNELS", "").lower() not in ("1", "true", "yes"):
        return _answer("limited", f"this GPU runs {', '.join(formats)}: set DIFFUSERS_TRUST_REMOTE_KERNELS=true")
    return _answer("ok", f"this GPU runs {', '.join(formats)}", formats=formats)


_DEEPSPEED_PROBE = """
import contextlib, os, sys
import torch
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
with contextlib.redirect_stdout(sys.stderr):
    import deepspeed
    from deepspeed.ops.op_builder.all_ops import ALL_OPS
    able = sorted(name for name, op in ALL_OPS.items() if op.is_compatible(verbose=False))
print(deepspeed.__version__ + ";" + ",".join(able))
"""


def _deepspeed() -> dict[str, Any]:
    """Import in a fresh process, because a broken install can take the whole process down; ops that could be
    compiled."""
    if importlib.util.find_spec("deepspeed") is None:
        return _answer("missing", "not installed (Linux only): pip install 'deepspeed>=0.19.3,<0.20'")
    try:
        done = subprocess.run(
            [sys.executable, "-c", _DEEPSPEED_PROBE],
            capture_output=True,
            text=True,
            timeout=IMPORT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _answer("missing", f"import did not end within {IMPORT_SECONDS} s")
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return _answer("missing", f"import fails: {lines[-1] if lines else 'no message'}")
    name, _, ops = done.stdout.strip().splitlines()[-1].partition(";")
    able = ops.split(",") if ops else []
    tools = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    note = f"; optimizer offload cannot be compiled without {' and '.join(tools)}" if tools else ""
    return _answer(
        "limited" if tools else "ok", f"{name}; ops that fit: {', '.join(able) or 'none'}{note}", version=name, ops=able
    )


def _packages() -> dict[str, Any]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    missing = [name for name, number in found.items() if number is None]
    text = (
        f"missing: {', '.join(missing)}" if missing else ", ".join(f"{name} {number}" for name, number in found.items())
    )
    return _answer("missing" if missing else "ok", text, versions=found)


def _memory() -> dict[str, Any]:
    import psutil

    memory = psutil.virtual_memory()
    return _answer(
        "ok", f"{size(memory.available)} free of {size(memory.total)}", free=memory.available, total=memory.total
    )


def _disk() -> dict[str, Any]:
    here, cache = shutil.disk_usage(Path.cwd()), existing(hub_cache())
    there = shutil.disk_usage(cache)
    text = f"{size(here.free)} free here, {size(there.free)} free for the hub cache ({hub_cache()})"
    return _answer("ok" if here.free > 2e9 else "limited", text, free=here.free, cache_free=there.free)


def _hub() -> dict[str, Any]:
    """Whether the hub answers (asked once, not under HF_HUB_OFFLINE), token, cache; no token is shown."""
    from huggingface_hub import constants, get_token

    token, cache, offline = bool(get_token()), hub_cache(), bool(constants.HF_HUB_OFFLINE)
    repos = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    fault = None if offline else _unreachable(constants.ENDPOINT)
    mode = "offline (HF_HUB_OFFLINE)" if offline else f"not reachable ({fault})" if fault else "online"
    text = f"{mode}; token {'present' if token else 'absent: gated models need HF_TOKEN'}; {repos} models in the cache"
    state = "ok" if token and not fault else "limited"
    return _answer(state, text, token=token, offline=offline, reachable=not (offline or fault), cached_models=repos)


def _unreachable(address: str) -> str | None:
    """Why a server does not answer within `ANSWER_SECONDS`; None when it does, whatever it says."""
    request = urllib.request.Request(address, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS):
            return None
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(getattr(error, "reason", None) or error)
