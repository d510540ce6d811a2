"""Put trained parts together as diffusers folders, and measure the quality of the autoencoders.

Transformers and autoencoders are written in bfloat16, the small text encoders in float32. So a pipeline that is loaded
without a dtype computes in float32 everywhere: diffusers converts to float32, transformers keeps the dtype of the file.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from dcgen_convert.core.files import read_json, sha256, write_json
from dcgen_convert.families.base import FPS_KEY
from dcgen_convert.networks import autoencoders
from dcgen_convert.networks.folder import load_folder
from dcgen_convert.tiny import videos, world
from dcgen_convert.tiny.evaluator import Evaluator
from tools.tiny import evaluator, text, video_gates, wan
from tools.tiny.autoencoders import CONFIGS, SIDES

SHIPPED = Path(world.__file__).parent / "weights"
# FLUX's dynamic shift, with anchors that fit this world: mu is 0.5 at 64 tokens (128 px at f8 p2) and 1.15 at 1024.
FLUX_SCHEDULER = dict(
    use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=64, max_image_seq_len=1024, shift=3.0
)
LABELS = {str(label): f"{color} {shape}" for label, (shape, color) in enumerate(world.CLASSES)}
INDEX = {  # what stands in model_index.json beside that which the pipeline writes
    "dit": {"id2label": LABELS},  # DiTPipeline reads it, but does not write it
    "wan": {FPS_KEY: videos.FPS},
}
CARD = """---
license: apache-2.0
---
# {name}

A miniature of {what}, trained on drawn {shown} of the tiny world (128 px) by `tools/tiny` of dcgen-convert. \
For tests and demonstrations.
"""


def write(work: Path, weights: Path) -> None:
    """Write every folder whose parts exist in ``work``. A folder that exists already is replaced.

    Weight files that are equal are held once: the later one in the alphabet is a link to the earlier one.
    """
    weights.mkdir(parents=True, exist_ok=True)
    if (work / evaluator.FILE).exists():
        evaluator.save(evaluator.load(work), weights / evaluator.FILE)
    if (work / evaluator.MOTION).exists():
        evaluator.save(evaluator.load_motion(work), weights / evaluator.MOTION)
    for name, part in (("tiny-dc-ae-f32", "dc-f32c32"), ("tiny-dc-ae-f64", "dc-f64c128")):
        if (work / part).exists():
            _save(AutoencoderDC.from_pretrained(work / part, dtype=torch.bfloat16), weights / name)
            _card(weights / name, name, f"the {part[3:6]} deep-compression autoencoder DC-AE")
    if (work / "dc-ae-v-f32t4c32").exists():
        folder = weights / "tiny-dc-ae-v"
        _save(load_folder(work / "dc-ae-v-f32t4c32", "autoencoder", torch.bfloat16), folder)
        for code in folder.glob("*.py"):  # the package has it
            code.unlink()
        _card(folder, "tiny-dc-ae-v", "the f32t4 deep-compression autoencoder for videos DC-AE-V", "videos")
    parts = (
        ("flux", flux, "FLUX.1-dev"),
        ("kontext", kontext, "FLUX.1 Kontext"),
        ("sana", sana, "SANA"),
        ("sana-sprint", sana_sprint, "SANA-Sprint"),
        ("wan", wan.pipeline, "Wan 2.1"),
        ("dit", dit, "DiT"),
        ("unet", unet, "Stable Diffusion 1.5"),
    )
    for name, build, what in parts:
        if (work / name).exists():
            _save(build(work), weights / f"tiny-{name}")
            if name in INDEX:
                index = weights / f"tiny-{name}" / "model_index.json"
                write_json(index, read_json(index) | INDEX[name])
            shown = "videos" if name == "wan" else "pictures"
            _card(weights / f"tiny-{name}", f"tiny-{name}", what, shown)
    link_equal(weights)


def link_equal(weights: Path) -> None:
    """Put a relative symbolic link in the place of each weight file that is equal to an earlier one."""
    known: dict[str, Path] = {}
    for file in sorted(weights.rglob("*.safetensors")):
        first = known.setdefault(sha256(file), file)
        if first != file and not file.is_symlink():
            file.unlink()
            file.symlink_to(os.path.relpath(first, file.parent))


def flux(work: Path) -> FluxPipeline:
    (clip, clip_tokenizer), (t5, t5_tokenizer) = text.clip(work), text.t5()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULER),
        vae=AutoencoderKL.from_pretrained(work / "kl-f8c16", dtype=torch.bfloat16),
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=FluxTransformer2DModel.from_pretrained(work / "flux", dtype=torch.bfloat16),
    )


def kontext(work: Path) -> FluxKontextPipeline:
    """All parts but the transformer are those of tiny-flux."""
    parts = FluxPipeline.from_pretrained(SHIPPED / "tiny-flux", vae=None, transformer=None).components
    parts["vae"] = AutoencoderKL.from_pretrained(SHIPPED / "tiny-flux" / "vae", dtype=torch.bfloat16)
    parts["transformer"] = FluxTransformer2DModel.from_pretrained(work / "kontext", dtype=torch.bfloat16)
    return FluxKontextPipeline(**parts)


def sana(work: Path) -> SanaPipeline:
    gemma, tokenizer = text.gemma(work)
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=gemma,
        vae=AutoencoderDC.from_pretrained(work / "dc-f32c32", dtype=torch.bfloat16),
        transformer=SanaTransformer2DModel.from_pretrained(work / "sana", dtype=torch.bfloat16),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def sana_sprint(work: Path) -> SanaSprintPipeline:
    parts = SanaPipeline.from_pretrained(SHIPPED / "tiny-sana", vae=None, transformer=None).components
    parts["vae"] = AutoencoderDC.from_pretrained(SHIPPED / "tiny-sana" / "vae", dtype=torch.bfloat16)
    parts["transformer"] = SanaTransformer2DModel.from_pretrained(work / "sana-sprint", dtype=torch.bfloat16)
    return SanaSprintPipeline(**{**parts, "scheduler": SCMScheduler()})


def dit(work: Path) -> DiTPipeline:
    return DiTPipeline(
        transformer=DiTTransformer2DModel.from_pretrained(work / "dit", dtype=torch.bfloat16),
        vae=AutoencoderKL.from_pretrained(work / "kl-f8c4", dtype=torch.bfloat16),
        scheduler=DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False),
    )


def unet(work: Path) -> StableDiffusionPipeline:
    clip, tokenizer = text.clip(work, text.LENGTH, pooled=False)
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(shallow(work), dtype=torch.bfloat16),
        text_encoder=clip,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_pretrained(work / "unet", dtype=torch.bfloat16),
        scheduler=PNDMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            skip_prk_steps=True,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def shallow(work: Path) -> Path:
    """Folder of the AutoencoderKL f8c4: in ``work`` if it is there, otherwise the shipped one."""
    return work / "kl-f8c4" if (work / "kl-f8c4").exists() else SHIPPED / "tiny-dit" / "vae"


def _save(model: Any, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, safe_serialization=True)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)
    for path in folder.rglob("config.json"):
        config = read_json(path)
        config.pop("_name_or_path", None)  # a path on the machine that trained the weights
        write_json(path, config)


def _card(folder: Path, name: str, what: str, shown: str = "pictures") -> None:
    (folder / "README.md").write_text(CARD.format(name=name, what=what, shown=shown))


def gates(work: Path, log: Callable[[str], None]) -> None:
    """Round trips: attribute accuracy and PSNR on 1,000 pictures that no model saw, and the figures of videos."""
    video_gates.gates(work, log)
    if not (work / evaluator.FILE).exists():
        return
    judge = evaluator.load(work)
    labels, pictures = unseen()
    log(f"pictures themselves: accuracy {(judge.read(pictures) == labels).float().mean():.4f}")
    for name in CONFIGS:
        if (work / name).exists():
            accuracy, psnr = round_trip(autoencoders.load(work / name), judge, SIDES.get(name, world.SIDE))
            log(
                f"{name}: accuracy {accuracy.mean():.4f} ({', '.join(f'{a:.3f}' for a in accuracy)}), PSNR "
                f"{psnr:.2f} dB"
            )


def unseen(side: int = world.SIDE) -> tuple[torch.Tensor, torch.Tensor]:
    """(labels (1000, 6), pictures (1000, 3, side, side) in [-1, 1]) that no model was trained on."""
    labels = world.sample_labels(1000, 424_242)
    return labels, torch.cat([world.draw(rows, 424_242 + i, side) for i, rows in enumerate(labels.split(100))])


@torch.no_grad()
def round_trip(codec: autoencoders.Codec, judge: Evaluator, side: int = world.SIDE) -> tuple[torch.Tensor, float]:
    """Accuracy of each attribute, (6,), and PSNR in dB, of the pictures of `unseen` after encoding and decoding."""
    labels, pictures = unseen(side)
    again = torch.cat([codec.decode(codec.encode(part)) for part in pictures.split(50)])
    accuracy = (torch.cat([judge.read(part) for part in again.split(50)]) == labels).float().mean(0)
    return accuracy, -10 * math.log10((again - pictures).square().mean().item() / 4)
