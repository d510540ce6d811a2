"""Pictures or videos from a bundle, on any machine: `dcgen-convert sample`."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcgen_convert.bundle.loading import family_of, is_quantised, load, transformer_config
from dcgen_convert.bundle.manifest import fps_of
from dcgen_convert.bundle.manifest import read as read_manifest
from dcgen_convert.core.console import Console
from dcgen_convert.core.disk import require_writable
from dcgen_convert.core.errors import CheckFailed, InputError
from dcgen_convert.core.files import atomic_write, read_json
from dcgen_convert.core.spelling import count_of
from dcgen_convert.families import catalog
from dcgen_convert.families.base import Family
from dcgen_convert.families.grid import autoencoder_grid

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


def sample(  # noqa: PLR0913  every option of the verb by its name
    bundle: Path,
    prompts: Sequence[str],
    output: Path,
    console: Console,
    *,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    count: int = 1,
    dtype: torch.dtype | None = None,
    runtime: str = "auto",
    trust_remote_code: bool = False,
    images: Sequence[Path] = (),
) -> dict[str, Any]:
    """Draw ``count`` pictures of every prompt and write them as PNG files into the folder ``output``; videos as .mp4,
    with the frames that the bundle states.

    Picture i of the whole call has seed ``seed`` + i and its own CPU generator, so it does not depend on the others
    or on the device's random numbers.

    Args:
        bundle: bundle folder.
        prompts: texts; for class-conditional models labels or class numbers.
        output: folder, created when missing.
        height, width: px, multiples of the autoencoder's factor; None: the bundle's own.
        steps, guidance: None: the bundle's own.
        dtype, runtime, trust_remote_code: as in `loading.load`.
        images: the pictures that a model which edits is given with every prompt, in their order.

    Returns the result document: images (paths), prompts and seeds in the same order, runtime, the settings used,
    seconds.

    Raises:
        InputError: no prompt, a size that does not fit, foreign code, a runtime that does not apply, no picture to edit
            or one that the model cannot use.
        CheckFailed: the bundle is unfinished, or a picture is not finite.
        ResourceError: it draws videos, and PyAV is not installed.
    """
    from dcgen_convert.data import videos

    if not prompts or count < 1:
        raise InputError("there is nothing to draw", "give a prompt with -p and a count of at least 1")
    bundle, output = Path(bundle), Path(output)
    require_writable(output, "--output")
    family = family_of(bundle)
    require_images(family, images)
    if family.axes == 3:
        videos.require_reader()
    manifest = read_manifest(bundle)
    defaults = manifest["defaults"]
    height, width = height or defaults["height"], width or defaults["width"]
    config = transformer_config(bundle)
    check_size(family, config, read_json(bundle / "vae" / "config.json"), height, width)
    if doubt := beyond_training(manifest, family, config, height, width):
        console.warn(f"{bundle.name}: {doubt}")
    references = references_of(family, images, height, width, token_side_of(bundle))
    steps, guidance = steps or defaults["steps"], defaults["guidance"] if guidance is None else guidance
    pipeline, used = load(bundle, dtype, runtime, trust_remote_code=trust_remote_code)
    console.say(describe(bundle, used))
    jobs = [prompt for prompt in prompts for _ in range(count)]
    written, started = [], time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    with console.progress("draw", len(jobs), "image" if family.axes == 2 else "video") as bar:
        for i, prompt in enumerate(jobs):
            settings: dict[str, Any] = dict(
                height=height, width=width, steps=steps, guidance=guidance, length=defaults["text_length"]
            )
            settings |= {"references": references, "frames": defaults.get("frames", 1)}
            pixels = draw_pixels(pipeline, family, [prompt], [seed + i], **settings)[0]
            path = output / f"{i:04d}-seed-{seed + i}{'.png' if family.axes == 2 else '.mp4'}"
            if family.axes == 2:
                write_png(to_pil(pixels), path)
            else:
                videos.write_mp4(pixels.movedim(0, 1).float().cpu() * 2 - 1, path, fps_of(manifest, family))
            written.append(str(path))
            bar.advance()
    return {
        "images": written,
        "prompts": jobs,
        "seeds": [seed + i for i in range(len(jobs))],
        "runtime": used,
        "height": height,
        "width": width,
        "steps": steps,
        "guidance": guidance,
        "seconds": round(time.perf_counter() - started, 3),
    }


def draw(pipeline: Any, family: Family, prompts: list[str], seeds: list[int], **settings: Any) -> list[Image]:
    """One batch of pictures as PIL images; else as `draw_pixels`."""
    return [to_pil(picture) for picture in draw_pixels(pipeline, family, prompts, seeds, **settings)]


def draw_pixels(  # noqa: PLR0913  what a pipeline is called with
    pipeline: Any,
    family: Family,
    prompts: list[str],
    seeds: list[int],
    *,
    height: int,
    width: int,
    steps: int,
    guidance: float,
    length: int,
    references: Sequence[torch.Tensor] = (),
    frames: int = 1,
) -> torch.Tensor:
    """One batch from a loaded stock pipeline, one CPU generator per picture: (B, 3, H, W) in [0, 1], of a family of
    videos (B, frames, 3, H, W).

    ``references``: the pictures that a model which edits is given with each prompt, (3, H, W) in [-1, 1] each.
    CheckFailed when a decoded picture is not finite; stock pipelines would paint it black.
    """
    import torch

    from dcgen_convert.networks import tiles

    settings: dict[str, Any] = dict(height=height, width=width, steps=steps, guidance=guidance, length=length)
    if family.one_prompt and len(prompts) > 1:
        each = zip(prompts, seeds, strict=True)
        return torch.cat([draw_pixels(pipeline, family, [text], [seed], **settings) for text, seed in each])
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    call = family.pipeline_call(pipeline, prompts, **settings)
    call |= family.reference_call([one.expand(len(prompts), *one.shape) for one in references])
    call |= family.frames_call(frames)
    with tiles.by_size(pipeline.vae, len(prompts), height, width):
        drawn = pipeline(**call, generator=generators, output_type="pt")
    pixels: torch.Tensor = drawn.images if family.axes == 2 else drawn.frames
    if not torch.isfinite(pixels).all():
        raise CheckFailed(
            f"the picture of {prompts[0]!r} holds numbers that are not finite", "dcgen-convert verify names the tensor"
        )
    return pixels


def untold_side(pipeline: Any, family: Family, trained: int) -> int:
    """Side in px that a loaded stock pipeline draws when it is called without height and width."""
    if family.index_side:
        return int(getattr(pipeline.config, family.index_side))
    factor = getattr(pipeline, "vae_scale_factor", None)
    network = getattr(pipeline, family.component).config
    cells = getattr(pipeline, "default_sample_size", None) or getattr(network, "sample_size", None)
    return family.default_px or (int(cells * factor) if cells and factor else trained)


def to_pil(picture: torch.Tensor) -> Image:
    """(3, H, W) in [0, 1] -> PIL image, rounded to 8 bit."""
    from PIL import Image as images

    return images.fromarray((picture.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def check_size(family: Family, config: dict[str, Any], vae: dict[str, Any], height: int, width: int) -> None:
    """InputError for a size in px that a pipeline cannot draw: it must be a multiple of a token's side, and the one
    size of pipelines that have one.

    Args:
        config, vae: of the transformer and the autoencoder.
    """
    side, only = token_side(family, config, vae), only_side(family, config, vae)
    if height < side or width < side or height % side or width % side:
        raise InputError(
            f"the size {height} x {width} px is not a multiple of {side} px, the side of a token",
            f"try {_near(height, side)} x {_near(width, side)}",
        )
    if only and (height, width) != (only, only):
        raise InputError(f"this model draws {only} x {only} px only, not {height} x {width}", "leave the size out")


def beyond_training(
    manifest: Mapping[str, Any], family: Family, config: dict[str, Any], height: int, width: int
) -> str:
    """A sentence on a size in px that is larger than all that a bundle was trained on; empty: it is not.

    Args:
        manifest: of the bundle; config: of its transformer.
    """
    defaults, recipe = manifest["defaults"], manifest.get("conversion", manifest).get("recipe", {})
    most = defaults["height"] * defaults["width"]
    if phases := recipe.get("adapt", {}).get("phases"):
        most = max(most, *(phase["resolution"] ** 2 for phase in phases))
    elif "autoencoder" not in manifest["sources"] and "adopted" not in manifest:  # quantised: it draws as its source
        entry = catalog.find_source(str(recipe.get("source", "")))
        side = entry.trained_side if entry else None
        most = max(most, side**2 if side else family.most_pixels(config) or 0)
    if height * width <= most:
        return ""
    return (
        f"{height} x {width} px is more than the {math.isqrt(most)} px that it was trained for: shapes may repeat or "
        "break; look at the picture before you use it"
    )


def require_images(family: Family, images: Sequence[Path]) -> None:
    """InputError where a model that edits is given no picture or too many, or another one is given one."""
    if images and not family.references:
        raise InputError(
            f"a {family.name} model draws from text alone, it cannot edit {images[0]}", "leave out --image"
        )
    if len(images) < family.fewest_references:
        raise InputError(f"a {family.name} model edits a picture, and none was given", "--image FILE")
    if len(images) > family.references:
        raise InputError(
            f"a {family.name} model is given at most {count_of(family.references, 'picture')}, not {len(images)}",
            f"leave out {images[family.references]}",
        )


def references_of(family: Family, images: Sequence[Path], height: int, width: int, cell: int) -> list[torch.Tensor]:
    """The pictures in files as references of a picture of ``height`` x ``width`` px: see `reference_of`."""
    shown = family.reference_side
    return [reference_of(image, shown or height, shown or width, cell) for image in images]


def reference_of(image: Path, height: int, width: int, cell: int) -> torch.Tensor:
    """The picture in a file as a reference of ``height`` x ``width`` px, but in its own shape: (3, H, W) in [-1, 1].

    The area is that of ``height`` x ``width``; both sides are multiples of ``cell`` px.

    Raises:
        InputError: there is no such file, or it is no picture.
    """
    from dcgen_convert.data import images

    across, down = images.size_of(image)
    shape = math.sqrt(height * width / (across * down))
    return images.read_pixels(image, _near(down * shape, cell), _near(across * shape, cell))


def token_side_of(bundle: Path) -> int:
    """`token_side` of a bundle."""
    return token_side(family_of(bundle), transformer_config(bundle), read_json(bundle / "vae" / "config.json"))


def token_side(family: Family, config: dict[str, Any], vae: dict[str, Any]) -> int:
    """px per token side: f of the autoencoder times the patch, which is 1 after a conversion."""
    factor, channels = autoencoder_grid(vae)
    return factor * family.patch(config, channels)


def only_side(family: Family, config: dict[str, Any], vae: dict[str, Any]) -> int | None:
    """`Family.only_side` of a pipeline with these configs."""
    return family.only_side(config, autoencoder_grid(vae)[0] // vae.get("latent_pack", 1))


def describe(bundle: Path, runtime: str) -> str:
    """One line that says how the bundle is run."""
    if not is_quantised(bundle):
        return f"{bundle.name}: dense weights"
    return {
        "stock": f"{bundle.name}: 4-bit kernels",
        "dequantised": f"{bundle.name}: the 4-bit kernels cannot run here; "
        "drawing with dequantised weights and full-precision activations",
        "emulated": f"{bundle.name}: emulating the 4-bit kernels, activations included; slow",
    }[runtime]


def write_png(picture: Image, path: Path) -> None:
    """PIL image -> PNG file, whole or absent."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    atomic_write(path, buffer.getvalue())


def _near(pixels: float, factor: int) -> int:
    return max(factor, round(pixels / factor) * factor)
