"""How the shipped checkpoints were made. Each part is one command; intermediate weights (float32) go to WORK.

    python -m dcgen_convert.tiny.training WORK evaluator
    python -m dcgen_convert.tiny.training WORK kl-f8c16 | kl-f8c4 | dc-f32c32 | dc-f64c128 | dc-f128c512
    python -m dcgen_convert.tiny.training WORK flux-teacher | flux | sana | dit | unet | sana-sprint
    python -m dcgen_convert.tiny.training WORK assemble WEIGHTS     (the diffusers folders, bfloat16)
    python -m dcgen_convert.tiny.training WORK gates                (the figures that the README states)

A part needs those before it: kl-f8c4 kl-f8c16, transformers their autoencoder, flux its teacher. dc-f128c512, unet and
sana-sprint do not ship: tests/benchmarks/compression_sweep.py, unet.py and few_steps.py train them, from the shipped tiny-dc-ae-f64 and
f8c4 where WORK has none, and from the shipped tiny-sana.

The shipped weights had these steps in several runs: tiny-flux was distilled once before its teacher's last two phases,
tiny-dit began on pictures of every texture and place. A run of this script is equal in kind, not bit by bit.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderDC, AutoencoderKL, FluxPipeline, FluxTransformer2DModel, SanaPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from dcgen_convert import catalog, families
from dcgen_convert.tiny import world
from dcgen_convert.tiny.evaluator import Evaluator
from dcgen_convert.tiny.training import assemble, autoencoders, evaluator, few_steps, text
from dcgen_convert.tiny.training import transformers as base

SEED = 7
AUTOENCODERS = {  # steps, batch, learning rate
    "kl-f8c16": (7000, 4, 2e-3),
    "kl-f8c4": (2500, 4, 1.5e-3),
    "dc-f32c32": (3600, 12, 2e-3),
    "dc-f64c128": (3600, 10, 6e-4),
    "dc-f128c512": (1500, 8, 6e-4),
}
PICTURES = {"flux": 24_000, "sana": 10_000, "dit": 10_000, "unet": 12_000}  # flux learns 10,000 by heart, and shapes last
# (steps, learning rate, shift of the noise level), one after the other. Heavy noise teaches the text: in light noise
# the picture itself shows what the caption says.
PHASES = {
    "flux-teacher": [(2400, 1.5e-3, 1.65), (1900, 1.3e-3, 1.65), (2000, 1.2e-3, 4.0), (1600, 1e-3, 4.0)],
    "flux": [(900, 6e-4, 2.0)],
    "sana": [(6000, 1.5e-3, 3.0)],
    "dit": [(8000, 1.5e-3), (3200, 1.5e-3)],  # uniform over its DDPM steps
    "unet": [(4000, 2e-3)],
    "sana-sprint": [(3000, 1e-3, 3.0)],
}
BATCH = {"flux-teacher": 32, "flux": 32, "sana": 64, "dit": 32, "unet": 16, "sana-sprint": 64}


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    work, part, *rest = Path(arguments[0]), *arguments[1:]
    work.mkdir(parents=True, exist_ok=True)
    if part == "evaluator":
        model = evaluator.train(900, 48, 5, log)
        save_file(
            {key: value.contiguous() for key, value in model.state_dict().items()}, work / "evaluator.safetensors"
        )
    elif part in AUTOENCODERS:
        autoencoders.train(part, *AUTOENCODERS[part], SEED, log, trained_before(work, part)).save_pretrained(work / part)
    elif part in PHASES:
        train_transformer(work, part).save_pretrained(work / part)
    elif part == "assemble":
        assemble.write(work, Path(rest[0]))
    elif part == "gates":
        assemble.gates(work, log)
    else:
        raise SystemExit(__doc__)


def log(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def trained_before(work: Path, part: str):
    """The autoencoder that ``part`` starts from, since it differs at the bottleneck only; None: from random weights."""
    if part == "kl-f8c4":
        return AutoencoderKL.from_pretrained(work / "kl-f8c16")
    if part == "dc-f128c512":
        own = work / "dc-f64c128"
        return AutoencoderDC.from_pretrained(own if own.exists() else catalog.AUTOENCODERS["tiny-dc-ae-f64"].folder)
    return None


def train_transformer(work: Path, part: str):
    """One base transformer, from latents of freshly drawn pictures."""
    if part == "sana-sprint":
        sana = SanaPipeline.from_pretrained(assemble.SHIPPED / "tiny-sana", dtype=torch.float32)
        steps, rate, shift = PHASES[part][0]
        pairs = caption_pairs(sana, "sana", sana.vae)
        return few_steps.train(sana.transformer, pairs, steps, BATCH[part], rate, shift, SEED, log)
    name = part.removesuffix("-teacher")
    family, model = base.new_model(name, SEED)
    train = {"flux": base.distill_guidance, "dit": base.train_dit, "unet": base.train_unet}.get(part, base.train_flow)
    pairs = {"flux": flux_pairs, "sana": sana_pairs, "dit": dit_pairs, "unet": unet_pairs}[name](work)
    if part == "flux":
        model = FluxTransformer2DModel.from_pretrained(work / "flux-teacher")
    for number, (steps, rate, *shift) in enumerate(PHASES[part]):
        model = train(family, model, pairs, steps, BATCH[part], rate, *shift, SEED + number, log)
    return model


def sana_pairs(work: Path) -> base.Pairs:
    model, tokenizer = text.gemma(work)
    pipeline = SanaPipeline(tokenizer=tokenizer, text_encoder=model, vae=None, transformer=None, scheduler=None)
    return caption_pairs(pipeline, "sana", AutoencoderDC.from_pretrained(work / "dc-f32c32"))


def dit_pairs(work: Path) -> base.Pairs:
    labels = world.sample_labels(PICTURES["dit"], SEED, by_class=True)
    z = base.encode_pictures(AutoencoderKL.from_pretrained(work / "kl-f8c4").eval(), labels, SEED)
    return base.class_pairs(z, labels)


def flux_pairs(work: Path) -> base.Pairs:
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
    return caption_pairs(pipeline, "flux", AutoencoderKL.from_pretrained(work / "kl-f8c16"))


def unet_pairs(work: Path) -> base.Pairs:
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
    return caption_pairs(pipeline, "unet", AutoencoderKL.from_pretrained(assemble.shallow(work), dtype=torch.float32))


@torch.no_grad()
def caption_pairs(pipeline, name: str, vae) -> base.Pairs:
    family, labels = families.get(name), world.sample_labels(PICTURES[name], SEED)
    z = base.encode_pictures(vae.eval(), labels, SEED)
    table, null = base.caption_table(lambda captions: family.encode_text(pipeline, captions, text.LENGTH))
    log(
        f"{len(z)} latents {tuple(z.shape[1:])}, mean {z.mean():.3f}, std {z.std():.3f}; {len(table[family.text_keys[0]])} captions"
    )
    return base.Pairs(z, base.caption_row(labels), table, null)


def load_evaluator(work: Path) -> Evaluator:
    model = Evaluator()
    model.load_state_dict(load_file(work / "evaluator.safetensors"))
    return model.eval()


if __name__ == "__main__":
    main(sys.argv[1:])
