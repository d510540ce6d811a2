"""How the shipped checkpoints were made. Each part is one command; intermediate weights (float32) go to WORK.

    python -m dcgen_convert.tiny.training WORK evaluator
    python -m dcgen_convert.tiny.training WORK kl-f8c16 | kl-f8c4 | dc-f32c32 | dc-f64c128
    python -m dcgen_convert.tiny.training WORK flux-teacher | flux | sana | dit
    python -m dcgen_convert.tiny.training WORK assemble WEIGHTS     (the diffusers folders, bfloat16)
    python -m dcgen_convert.tiny.training WORK gates                (the figures that the README states)

A part needs those before it: kl-f8c4 kl-f8c16, transformers their autoencoder, flux its teacher.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderDC, AutoencoderKL, FluxPipeline, FluxTransformer2DModel, SanaPipeline
from safetensors.torch import load_file, save_file

from dcgen_convert import families
from dcgen_convert.tiny import world
from dcgen_convert.tiny.evaluator import Evaluator
from dcgen_convert.tiny.training import assemble, autoencoders, evaluator, text
from dcgen_convert.tiny.training import transformers as base

SEED = 7
AUTOENCODERS = {  # steps, batch, learning rate
    "kl-f8c16": (7000, 4, 2e-3),
    "kl-f8c4": (2500, 4, 1.5e-3),
    "dc-f32c32": (3600, 12, 2e-3),
    "dc-f64c128": (3600, 10, 6e-4),
}
PICTURES = 10_000
SHIFT = {"flux": 1.6487, "sana": 3.0}  # exp(0.5) at 64 tokens, see assemble.FLUX_SCHEDULER


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
        # f8c4 differs from f8c16 at the bottleneck only: it starts from the trained one
        start = AutoencoderKL.from_pretrained(work / "kl-f8c16") if part == "kl-f8c4" else None
        autoencoders.train(part, *AUTOENCODERS[part], SEED, log, start).save_pretrained(work / part)
    elif part in ("flux-teacher", "flux", "sana", "dit"):
        train_transformer(work, part).save_pretrained(work / part)
    elif part == "assemble":
        assemble.write(work, Path(rest[0]))
    elif part == "gates":
        assemble.gates(work, log)
    else:
        raise SystemExit(__doc__)


def log(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def train_transformer(work: Path, part: str):
    """One base transformer, from latents of freshly drawn pictures."""
    if part in ("flux-teacher", "flux"):
        pairs = flux_pairs(work)
        family, model = base.new_model("flux", SEED)
        if part == "flux-teacher":
            return base.train_flow(family, model, pairs, 2400, 32, 1.5e-3, SHIFT["flux"], SEED, log)
        teacher = FluxTransformer2DModel.from_pretrained(work / "flux-teacher")
        return base.distill_guidance(family, teacher, pairs, 800, 32, 5e-4, SHIFT["flux"], SEED, log)
    if part == "sana":
        model, tokenizer = text.gemma()
        pipeline = SanaPipeline(tokenizer=tokenizer, text_encoder=model, vae=None, transformer=None, scheduler=None)
        pairs = caption_pairs(pipeline, families.get("sana"), AutoencoderDC.from_pretrained(work / "dc-f32c32"))
        return base.train_flow(*base.new_model("sana", SEED), pairs, 6000, 64, 1.5e-3, SHIFT["sana"], SEED, log)
    labels = world.sample_labels(PICTURES, SEED, by_class=True)
    z = base.encode_pictures(AutoencoderKL.from_pretrained(work / "kl-f8c4").eval(), labels, SEED)
    return base.train_dit(*base.new_model("dit", SEED), base.class_pairs(z, labels), 3000, 32, 1.5e-3, SEED, log)


def flux_pairs(work: Path) -> base.Pairs:
    (clip, clip_tokenizer), (t5, t5_tokenizer) = text.clip(), text.t5()
    pipeline = FluxPipeline(
        scheduler=None,
        vae=None,
        transformer=None,
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
    )
    return caption_pairs(pipeline, families.get("flux"), AutoencoderKL.from_pretrained(work / "kl-f8c16"))


@torch.no_grad()
def caption_pairs(pipeline, family, vae) -> base.Pairs:
    labels = world.sample_labels(PICTURES, SEED)
    z = base.encode_pictures(vae.eval(), labels, SEED)
    table, null = base.caption_table(lambda captions: family.encode_text(pipeline, captions, base.TEXT_LENGTH))
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
