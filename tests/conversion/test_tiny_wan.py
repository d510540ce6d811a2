"""The miniature of Wan by its recipe: what verify says of its videos, against stock pipelines called by hand."""

import torch
from diffusers import WanPipeline

from dcgen_convert import conversion
from dcgen_convert.core.console import NULL
from dcgen_convert.core.files import read_json
from dcgen_convert.data import prompts
from dcgen_convert.evaluation import tiny_videos, tiny_world, words
from dcgen_convert.recipe.loading import load
from dcgen_convert.stages import compare
from dcgen_convert.tiny import videos

COUNT, STEPS, FRAMES = 2, 2, 13
SHORT = {
    "data.count": 12,
    "data.steps": STEPS,
    "bundle.steps": STEPS,
    "align_head.draws": 1,
    "align_head.steps": 0,
    "adapt.phases": "[{mode: lora, resolution: 128, steps: 2, rank: 4, batch: 4, warmup: 0}]",
    "evaluate.prompts": COUNT,
}


def judged(folder, texts, seeds):
    """(accuracy, share of right motions, Frechet distance of the middle frames) of videos of a stock pipeline."""
    pipeline = WanPipeline.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    clips = pipeline(
        texts,
        height=128,
        width=128,
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        max_sequence_length=16,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
    ).frames.transpose(1, 2)
    clips = (clips * 255).round() / 127.5 - 1
    right = tiny_videos.found(clips, texts).double()
    pictures = [videos.caption(videos.parse(text)).rpartition(", ")[0] for text in texts]
    return right.mean().item(), right[:, 6].mean().item(), tiny_world.distance(clips[:, :, 8], pictures)


def test_verify_tells_which_attributes_and_motions_are_right(weights, tmp_path):
    resolved = load("tiny-wan", sets=[f"{key}={value}" for key, value in SHORT.items()])
    conversion.convert(resolved, tmp_path / "run", tmp_path / "bundle", NULL)
    found = read_json(tmp_path / "run" / "verify" / "stage.json")["metrics"]
    texts, seeds = prompts.generated("tiny-videos", COUNT, compare.SEED), range(compare.SEED, compare.SEED + COUNT)
    for name, folder in (("source", weights / "tiny-wan"), ("converted", tmp_path / "bundle")):
        accuracy, motion, apart = judged(folder, texts, seeds)
        assert abs(found[f"accuracy_{name}"] - accuracy) < 1e-4 and abs(found[f"motion_{name}"] - motion) < 1e-4, name
        assert abs(found[f"frechet_{name}"] / apart - 1) < 0.01
    assert found["accuracy_round_trip"] > 0
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert words.MOTION in card and words.ACCURACY in card
