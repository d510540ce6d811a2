"""What the figures of the stages mean, in words. The report and the model card take their words from here.

Manifest and `--json` hold the same figures under their names.
"""

from __future__ import annotations

import re

PICTURES_OF = {
    "source": "base model",
    "converted": "this model",
    "round_trip": "autoencoder alone",
    "nvfp4": "NVFP4",
    "int4": "INT4",
}

CHECKS = {
    "signature": "every file is as the one who is named has signed it",
    "files": "every file has the size and the hash that the manifest names",
    "code": "no Python file comes from others",
    "structure": "the folder is what stock diffusers loads",
    "tensors": "every number is finite, and shapes fit the configs",
    "table": "the formats of all tensors are those of the manifest",
    "latents": "the config says of the latents of videos what its scaling factor gives",
    "parts": "text encoders load whole, and tokenizers know words",
    "against": "untouched tensors are equal to the source, byte for byte",
    "picture": "a fresh process has drawn a picture",
}  # the steps of `verify`, in order

ROUND_TRIP = "The autoencoder alone: pictures encoded and decoded again (PSNR in dB; higher is better)"
BFLOAT16 = "The autoencoder in bfloat16 against itself in float32 (PSNR in dB; from 40 on nobody sees a difference)"
BFLOAT16_BASE = "The base's autoencoder in bfloat16 against itself in float32 (PSNR in dB)"
QUANTISED = "4-bit pictures against 16-bit ones from the same noise (PSNR in dB; higher is better)"
ACCURACY = "Asked-for attributes that the pictures show"
FRECHET = "Frechet distance to reference pictures (lower is better)"
MOTION = "Asked-for motions that the videos show"
EDITED = "Edits that show what was asked for"
KEPT = "Other attributes that stayed after an edit"
GAP = "Distance of the tokens from the base model's, after each block (0 is equal)"

# Name of a figure (a pattern) -> words. \1 stands for what the group holds.
FIGURES = {
    r"pictures": "pictures",
    r"captions": "different captions",
    r"roundtrip_psnr_db": ROUND_TRIP,
    r"precision_(base|target)": r"precision in which the autoencoder worked: \1",
    r"latent_rms_(\d+)": r"size (RMS) of a scaled latent at \1 px; near 1 is right",
    r"buckets_(\d+)": r"pictures of each shape at \1 px",
    r"replaced": "tensors that are new",
    r"untouched": "tensors that are those of the source",
    r"merged": "LoRA updates added to the weights",
    r"max_delta": "largest change of a weight",
    r"method": "method",
    r"target": "which tokens of the base the first layer was fitted to",
    r"base_side": "side in px of the pictures that the base saw for it",
    r"mse_before": "error of the first layer's tokens before (mean square)",
    r"mse_after": "error of the first layer's tokens afterwards (mean square)",
    r"mse_optimum": "the smallest such error that a linear layer can have",
    r"mse_seen": "the same error on pictures that were used",
    r"mse_heldout": "the same error on pictures that were kept apart",
    r"loss_start": "loss on pictures that were kept apart, with the first values of the last layer",
    r"loss_trained": "loss on pictures that were kept apart, after the training with frozen blocks",
    r"rows": "rows of the least squares for the last layer",
    r"rows_most": "rows that it could have taken at most",
    r"rows_reason": "why it took no more",
    r"loss_by_rows(?:\..+)?": "loss on pictures that were kept apart, as rows were added",
    r"loss_first": "training loss at the start",
    r"loss_last": "training loss at the end",
    r"evaluation\.(before|after)\.mean": r"loss on pictures that were kept apart, \1 the training",
    r"evaluation\.(before|after)\.t([\d.]+)": r"the same loss at noise level \2, \1 the training",
    r"evaluation\.before\.nothing": "the same loss of a model that always answers zero",
    r"verdicts": "what was seen while it trained",
    r"steps": "steps",
    r"ended\.step": "its part of the budget was spent: ended early, after step",
    r"ended\.of": "steps that it was to have",
    r"ended\.learning_rate": "learning rate where it ended",
    r"resumed_from": "went on from step",
    r"(?:start_|solve_|train_)?seconds": "seconds of it",
    r"samples_per_second": "pictures per second",
    r"data_wait_seconds": "seconds that the training waited for data",
    r"trained_parameters": "numbers that were trained",
    r"adapted_linears": "linear layers with LoRA",
    r"gap": GAP,
    r"gap_side": "side in px of the pictures of that comparison",
    r"gap_base_side": "side in px at which the base saw them",
    r"gap\.(\w+)": rf"{GAP}, \1",
    r"psnr_quantised_db": QUANTISED,
    r"psnr_bf16_base_db": BFLOAT16_BASE,
    r"psnr_bf16_target_db": BFLOAT16,
    r"accuracy_(\w+)": rf"{ACCURACY}: \1",
    r"frechet_(\w+)": rf"{FRECHET}: \1",
    r"motion_(\w+)": rf"{MOTION}: \1",
    r"edit_accuracy_(\w+)": rf"{EDITED}: \1",
    r"preservation_(\w+)": rf"{KEPT}: \1",
    r"crops_frechet_(\w+)": r"The same for parts of 128 px, which the judge sees pixel by pixel: \1",
    r"runtime": "how the 4-bit layers were computed",
    r"checks": "checks that it passed",
    r"format": "4-bit format",
    r"rank": "rank of the 16-bit branch",
    r"svdq": "linear layers in 4 bits with 4-bit activations (SVDQuant)",
    r"awq": "linear layers in 4 bits with 16-bit activations (AWQ)",
    r"skipped\.(.+)": r"linear layers that stay in 16 bits: \1",
    r"min_side": "shorter side in px below which pictures were left out",
    r"layout": "names of the tensors in the source",
    r"tensors": "tensors",
    r"losses": "what the source's format has lost already",
    r"base": "pipeline that completes the source",
    r"history": "changes while it went on",
    r"merged\.(.+)": r"LoRA updates fused of \1",
    r"lr": "learning rate",
    r"loss": "training loss",
    r"grad_norm": "size of the gradient before it is clipped",
}  # fmt: skip


def of(name: str) -> str:
    """A figure's name in words; the name itself where there are none."""
    for pattern, words in FIGURES.items():
        if found := re.fullmatch(pattern, name):
            text = re.sub(r"\\(\d)", lambda group: PICTURES_OF.get(part := found[int(group[1])], part), words)
            return text[0].upper() + text[1:]
    return name
