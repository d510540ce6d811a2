"""The parts of the tiny world's checkpoints: how long and with what each one is trained."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaPipeline,
    StableDiffusionPipeline,
)

from dcgen_convert import families
from dcgen_convert.families import catalog
from dcgen_convert.families.base import Network, Pipeline
from dcgen_convert.tiny import world
from tools.tiny import assemble, autoencoders, editing, evaluator, few_steps, text, video_autoencoders, wan
from tools.tiny import transformers as base
from tools.tiny.loop import Log, Training

SEED = 7
AUTOENCODERS = {  # steps, batch, learning rate
    "kl-f8c16": (7000, 4, 2e-3),
    "kl-f8c4": (2500, 4, 1.5e-3),
    "dc-f32c32": (3600, 12, 2e-3),
    "dc-f64c128": (3600, 10, 6e-4),
    "dc-f128c512": (700, 8, 6e-4),
    "dc-f64c128-256px": (300, 4, 6e-4),
    "dc-f128c512-256px": (300, 4, 6e-4),
    "dc-f256c2048": (250, 4, 6e-4),
}
# With 10,000 pictures flux learns them by heart, and learns shapes last.
PICTURES = {"flux": 24_000, "sana": 10_000, "dit": 10_000, "unet": 12_000, "kontext": 16_000}
# (steps, learning rate, shift of the noise level) of each phase. Heavy noise teaches the text: in light noise the
# picture itself shows what the caption says.
PHASES: dict[str, list[tuple[int, float] | tuple[int, float, float]]] = {
    "flux-teacher": [(2400, 1.5e-3, 1.65), (1900, 1.3e-3, 1.65), (2000, 1.2e-3, 4.0), (1600, 1e-3, 4.0)],
    "flux": [(900, 6e-4, 2.0)],
    "sana": [(6000, 1.5e-3, 3.0)],
    "dit": [(8000, 1.5e-3), (3200, 1.5e-3)],  # uniform over its DDPM steps
    "unet": [(4000, 2e-3)],
    "sana-sprint": [(3000, 1e-3, 3.0)],
    "kontext-teacher": [
        (900, 1e-3, 2.5),
        (900, 1e-3, 2.5),
        (650, 8e-4, 2.5),
        (1000, 1.2e-3, 4.0),
        (1600, 1.2e-3, 2.5),
        (700, 9e-4, 2.5),
        (800, 9e-4, 2.5),
    ],
    "kontext": [(600, 6e-4, 2.0)],
}
BATCH = {"flux-teacher": 32, "flux": 32, "sana": 64, "dit": 32, "unet": 16, "sana-sprint": 64, "kontext": 32}
BATCH["kontext-teacher"] = 32
HALF = ("unet", "kontext-teacher", "kontext")
ORTHOGONAL = {"kontext-teacher": 4, "kontext": 0}  # the first phase in which matrices take orthogonal steps
NAMES = ("evaluator", "motion", *AUTOENCODERS, *PHASES, *video_autoencoders.NAMES, "wan")


def make(work: Path, part: str, log: Log) -> None:
    """Train ``part`` (one of `NAMES`) and write it to ``work``."""
    work.mkdir(parents=True, exist_ok=True)
    if part == "evaluator":
        evaluator.save(evaluator.train(900, 48, 5, log), work / evaluator.FILE)
    elif part == "motion":
        evaluator.save(evaluator.train_motion(400, 48, 5, log), work / evaluator.MOTION)
    elif part in AUTOENCODERS:
        autoencoders.train(part, *AUTOENCODERS[part], SEED, log, trained_before(work, part)).save_pretrained(
            work / part
        )
    elif part in video_autoencoders.NAMES:
        video_autoencoders.train(part, SEED, work, log).save_pretrained(work / part)
    elif part == "wan":
        wan.train(work, log).save_pretrained(work / part)
    else:
        train_transformer(work, part, log).save_pretrained(work / part)


def trained_before(work: Path, part: str) -> Network | None:
    """The autoencoder that ``part`` starts from, because they differ at the bottleneck only; None: random weights."""
    if part == "kl-f8c4":
        return AutoencoderKL.from_pretrained(work / "kl-f8c16")
    if part in ("dc-f128c512", "dc-f64c128-256px"):
        own = work / "dc-f64c128"
        return AutoencoderDC.from_pretrained(own if own.exists() else catalog.AUTOENCODERS["tiny-dc-ae-f64"].folder)
    lower = {"dc-f128c512-256px": "dc-f64c128-256px", "dc-f256c2048": "dc-f128c512-256px"}.get(part)
    return AutoencoderDC.from_pretrained(work / lower) if lower else None


def train_transformer(work: Path, part: str, log: Log) -> Network:
    """Train one base transformer with latents of newly drawn pictures."""
    if part == "sana-sprint":
        sana = SanaPipeline.from_pretrained(assemble.SHIPPED / "tiny-sana", dtype=torch.float32)
        pairs = caption_pairs(sana, "sana", sana.vae, log)
        return few_steps.train(sana.transformer, pairs, training(part, 0), log)
    if part in ("kontext-teacher", "kontext"):
        return train_kontext(work, part, log)
    name = part.removesuffix("-teacher")
    family, model = base.new_model(name, SEED)
    train = {"flux": base.distill_guidance, "dit": base.train_dit, "unet": base.train_unet}.get(part, base.train_flow)
    pairs = {"flux": flux_pairs, "sana": sana_pairs, "dit": dit_pairs, "unet": unet_pairs}[name](work, log)
    if part == "flux":
        model = FluxTransformer2DModel.from_pretrained(work / "flux-teacher")
    for number in range(len(PHASES[part])):
        model = train(family, model, pairs, training(part, number), log)
    return model


def train_kontext(work: Path, part: str, log: Log) -> Network:
    """The teacher goes on from the shipped tiny-flux at guidance 1, the student from the teacher."""
    flux = FluxPipeline.from_pretrained(assemble.SHIPPED / "tiny-flux", dtype=torch.float32)
    pairs = editing.pairs(flux, PICTURES["kontext"], SEED, text.LENGTH, log)
    model, train = flux.transformer, base.train_flow
    if part == "kontext":
        model, train = FluxTransformer2DModel.from_pretrained(work / "kontext-teacher"), base.distill_guidance
    for number in range(len(PHASES[part])):
        model = train(families.get("flux-kontext"), model, pairs, training(part, number), log)
    return model


def training(part: str, number: int) -> Training:
    """Phase ``number`` of a transformer, counted from 0."""
    steps, rate, *shift = PHASES[part][number]
    orthogonal = number >= ORTHOGONAL.get(part, len(PHASES[part]))
    return Training(steps, BATCH[part], rate, SEED + number, *shift, half=part in HALF, orthogonal=orthogonal)


def sana_pairs(work: Path, log: Log) -> base.Pairs:
    model, tokenizer = text.gemma(work)
    pipeline = SanaPipeline(tokenizer=tokenizer, text_encoder=model, vae=None, transformer=None, scheduler=None)
    return caption_pairs(pipeline, "sana", AutoencoderDC.from_pretrained(work / "dc-f32c32"), log)


def dit_pairs(work: Path, log: Log) -> base.Pairs:
    labels = world.sample_labels(PICTURES["dit"], SEED, by_class=True)
    z = base.encode_pictures(AutoencoderKL.from_pretrained(work / "kl-f8c4").eval(), labels, SEED)
    log(f"{len(z)} latents {tuple(z.shape[1:])}")
    return base.class_pairs(z, labels)


def flux_pairs(work: Path, log: Log) -> base.Pairs:
    (clip, clip_tokenizer), (t5, t5_tokenizer) = text.clip(work), text.t5()
    pipeline = FluxPipeline(
        scheduler=None,
        vae=None,
        transformer=None,
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
    )
    return caption_pairs(pipeline, "flux", AutoencoderKL.from_pretrained(work / "kl-f8c16"), log)


def unet_pairs(work: Path, log: Log) -> base.Pairs:
    clip, tokenizer = text.clip(work, text.LENGTH, pooled=False)
    pipeline = StableDiffusionPipeline(
        vae=None,
        text_encoder=clip,
        tokenizer=tokenizer,
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return caption_pairs(
        pipeline, "unet", AutoencoderKL.from_pretrained(assemble.shallow(work), dtype=torch.float32), log
    )


@torch.no_grad()
def caption_pairs(pipeline: Pipeline, name: str, vae: Network, log: Log) -> base.Pairs:
    """Latents of drawn pictures, with the conditions of their captions."""
    family, labels = families.get(name), world.sample_labels(PICTURES[name], SEED)
    z = base.encode_pictures(vae.eval(), labels, SEED)
    table, null = base.caption_table(lambda captions: family.encode_text(pipeline, captions, text.LENGTH))
    log(
        f"{len(z)} latents {tuple(z.shape[1:])}, mean {z.mean():.3f}, std {z.std():.3f}; "
        f"{len(table[family.text_keys[0]])} captions"
    )
    return base.Pairs(z, base.caption_row(labels), table, null)
