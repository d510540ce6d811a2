"""Load a bundle in a fresh process, draw one picture, and print one JSON line about it: `python -m
dcgen_convert.bundle.probe BUNDLE [--trust-remote-code]`.

`verify` runs this as a child: what it loads cannot lean on anything that the converting process had imported or kept
in memory.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from dcgen_convert.core.errors import CheckFailed, InterruptedRun

PROMPTS = {"class_labels": "0"}
TOKENS_PER_SIDE = 4  # of a square: with more, a large model would take minutes on a CPU
STEPS = 2
FRAMES = 9  # of a video at most: three latent frames


def size_of(defaults: dict[str, Any], token: int) -> tuple[int, int]:
    """(height, width) in px of the picture that is drawn: the size whose shape is nearest to the bundle's own, of those
    with no more tokens than the square has.

    Args:
        defaults: of the manifest. token: px of its side.
    """
    from dcgen_convert.data import buckets

    square, own = TOKENS_PER_SIDE * token, (defaults["height"], defaults["width"])
    small = [own] if math.prod(own) <= square**2 else []
    return buckets.nearest([*buckets.sizes(square, token), *small], own[1], own[0])


def probe(bundle: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """{"runtime", "height", "width", "mean", "std"} of a small picture, of a video "frames" too; and "untold": the side
    in px of a picture whose size is not given, with "untold_width" where that is no square. Exceptions of loading and
    drawing pass through. trust_remote_code: as `loading.load` takes it.

    Raises:
        CheckFailed: a video has another number of frames than was asked for.
    """
    import torch

    from dcgen_convert.bundle.loading import family_of, load, transformer_config
    from dcgen_convert.bundle.manifest import read
    from dcgen_convert.bundle.sample import draw_pixels, only_side, token_side, untold_side
    from dcgen_convert.core.files import read_json

    family, defaults = family_of(bundle), read(bundle)["defaults"]
    pipeline, runtime = load(bundle, trust_remote_code=trust_remote_code)
    kind = family, transformer_config(bundle), read_json(bundle / "vae" / "config.json")
    only = only_side(*kind)
    height, width = (only, only) if only else size_of(defaults, token_side(*kind))
    frames = min(FRAMES, defaults.get("frames", FRAMES))
    prompt = PROMPTS.get(family.text_keys[0], "a red fox in the snow")
    settings = dict(height=height, width=width, steps=STEPS, guidance=defaults["guidance"])
    references = [torch.linspace(-1, 1, width).expand(3, height, width)] * family.fewest_references
    settings |= {"length": defaults["text_length"], "references": references, "frames": frames}
    drawn = draw_pixels(pipeline, family, [prompt], [0], **settings)[0].double().cpu()
    picture = (drawn.clamp(0, 1) * 255).round() / 255
    if family.axes == 3 and len(drawn) != frames:
        raise CheckFailed(f"the pipeline draws {len(drawn)} frames where {frames} are asked for")
    return {
        "runtime": runtime,
        "height": height,
        "width": width,
        **({"frames": frames} if family.axes == 3 else {}),
        "mean": picture.mean().item(),
        "std": picture.std(correction=0).item(),
        "untold": only or untold_side(pipeline, family, defaults["height"]),
        **({"untold_width": family.default_width} if family.default_width else {}),
    }


def main() -> None:
    """Print the document as the last line of the real stdout; whatever libraries print goes to stderr."""
    result_stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        document = probe(Path(sys.argv[1]), "--trust-remote-code" in sys.argv[2:])
    except KeyboardInterrupt:  # Ctrl-C reaches both: the parent says it
        sys.exit(InterruptedRun.exit_code)
    except Exception as error:  # noqa: BLE001  the parent reports it: a child has no other reader
        document = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(document), file=result_stream, flush=True)


if __name__ == "__main__":
    main()
