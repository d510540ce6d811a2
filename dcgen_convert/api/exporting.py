"""`export`: a bundle as the files of another program."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from dcgen_convert.api import calls
from dcgen_convert.api.order import require_folders
from dcgen_convert.api.results import Exported
from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import InputError

TARGETS = ("comfyui",)


@calls.explained()
def export(
    bundle: str | Path,
    *,
    to: Literal["comfyui"] = "comfyui",
    output: str | Path,
    weights: Literal["bf16", "fp8", "nvfp4"] = "bf16",
    quiet: bool = False,
    console: Console | None = None,
) -> Exported:
    """Write a bundle as files that another program reads: the transformer in its authors' tensor names, and the DC-AE.

    Args:
        bundle: bundle that `convert` wrote, not quantised.
        to: the program.
        output: folder of the files, created when missing.
        weights: format of attention and MLP: bfloat16, scaled float8 e4m3, or plain NVFP4 without a low-rank branch.
        quiet: only warnings on stderr.
        console: where to speak instead.

    Raises:
        InputError: a family that the program cannot draw with, a quantised bundle, or files that are there already.
        CheckFailed: the bundle is unfinished.
        ResourceError: too little disk.
    """
    if to not in TARGETS:
        raise InputError(f"a bundle cannot be exported to {to!r}", f"choose one of {', '.join(TARGETS)}")
    from dcgen_convert.bundle import comfyui

    require_folders(bundle=bundle, output=output)
    place = Path(output).expanduser().absolute()
    written = comfyui.export(Path(bundle).expanduser(), place, weights, console or calls.console_of(quiet))
    return Exported(to=to, weights=weights, **written)
