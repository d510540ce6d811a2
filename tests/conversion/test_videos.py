"""Videos through the stage `data`: a tiny random Wan draws them, or the user gives them.

References: the stock WanPipeline called by hand, the hashes of the files, the drawn tiny world.
"""

import hashlib
import json
import shutil
from dataclasses import replace

import av
import diffusers
import pytest
import torch
from families.tiny_videos import VIDEOS
from PIL import Image

from dcgen_convert import conversion
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import InputError, ResourceError
from dcgen_convert.core.files import read_json, write_json
from dcgen_convert.core.journal import Run
from dcgen_convert.data import images, videos
from dcgen_convert.evaluation import grids, tiny_videos
from dcgen_convert.evaluation.plain import Sharpness
from dcgen_convert.families.base import FPS_KEY
from dcgen_convert.judging.evaluating import evaluate
from dcgen_convert.judging.order import Asked
from dcgen_convert.networks import autoencoder_dc_video as video
from dcgen_convert.networks import autoencoders
from dcgen_convert.recipe.loading import load
from dcgen_convert.stages import depends, pictures
from dcgen_convert.stages.job import Job, prepare

FRAMES, SIDE, COUNT, STEPS = 8, 32, 4, 2
FPS = 5  # frames a second that the source states
PHASES = "[{mode: lora, resolution: 32, steps: 2, rank: 2, batch: 2, warmup: 0}]"
SETTINGS = {
    "dtype": "fp32",
    "data.frames": FRAMES,
    "data.steps": STEPS,
    "data.count": COUNT,
    "data.guidance": 1,
    "data.batch": 2,
    "latents.text_length": 32,
    "latents.scale_tolerance": 1000,
    "watch.grid_every": 0,
    "evaluate.prompts": 2,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny Wan and a small DC-AE-V."""
    root = tmp_path_factory.mktemp("wan")
    VIDEOS["wan"].build(root / "source")
    index = root / "source" / "model_index.json"
    write_json(index, read_json(index) | {FPS_KEY: FPS})
    torch.manual_seed(5)
    video.AutoencoderDCVideo(
        latent_channels=8,
        block_out_channels=(8, 16, 16, 16, 32),
        layers_per_block=(1,) * 5,
        chunk_frames=8,
        scaling_factor=0.9,
    ).save_pretrained(root / "autoencoder")
    return root


def resolved(models, side=SIDE, **changes):
    sets = [f"{key}={value}" for key, value in {**SETTINGS, **changes}.items()]
    return load(
        "image",
        sets=sets,
        flags={"source": str(models / "source"), "ae": str(models / "autoencoder"), "resolution": side},
    )


def rate(file):
    with av.open(str(file)) as opened:
        return opened.streams.video[0].average_rate


def job_in(folder, models, **changes) -> Job:
    return prepare(resolved(models, **changes), Run(folder / "run", NULL), NULL)


def until_data(folder, models, **changes) -> Job:
    conversion.convert(resolved(models, **changes), folder / "run", folder / "out", NULL, until="data")
    return job_in(folder, models, **changes)


def test_the_base_draws_one_frame_more_and_every_video_is_stored_whole(models, tmp_path):
    job = until_data(tmp_path, models)
    found = pictures.listed(job)
    assert [one.file.name for one in found] == [f"{i:07d}.mkv" for i in range(COUNT)]
    assert all(one.sha256 == hashlib.sha256(one.file.read_bytes()).hexdigest() for one in found)
    stock = diffusers.WanPipeline.from_pretrained(models / "source")
    stock.set_progress_bar_config(disable=True)
    drawn = stock(
        [one.caption for one in found[:2]],
        height=SIDE,
        width=SIDE,
        num_frames=FRAMES + 1,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        max_sequence_length=32,
        generator=[torch.Generator().manual_seed(one.seed) for one in found[:2]],
        output_type="pt",
    ).frames  # (B, F, 3, H, W) in [0, 1]
    for one, wanted in zip(found[:2], drawn, strict=True):
        assert videos.shape(one.file) == (SIDE, SIDE, FRAMES) and rate(one.file) == FPS
        kept = videos.read(one.file, FRAMES, SIDE, SIDE)
        torch.testing.assert_close((kept + 1) / 2, wanted.movedim(0, 1)[:, :FRAMES], atol=0.51 / 255, rtol=0)

    before = [one.file.read_bytes() for one in found]  # cut off: one video damaged, one missing
    found[1].file.write_bytes(before[1][: len(before[1]) // 2])
    found[2].file.unlink()
    times = [found[i].file.stat().st_mtime_ns for i in (0, 3)]
    again = pictures.synthesise(job)
    assert [one.file.read_bytes() for one in again] == before
    assert [found[i].file.stat().st_mtime_ns for i in (0, 3)] == times


def test_with_buckets_the_base_draws_the_shape_of_wide_videos(models, tmp_path):
    """48 x 80 px, the bucket of 64 px that is nearest to 9:16, as the stock pipeline draws it; and the stage knows."""
    changes = {"data.frames": 4, "data.count": 2, "data.buckets": "true", "data.steps": 1}
    conversion.convert(resolved(models, 64, **changes), tmp_path / "run", tmp_path / "out", NULL, until="data")
    job = prepare(resolved(models, 64, **changes), Run(tmp_path / "run", NULL), NULL)
    assert job.drawn_size == job.size == (48, 80)
    assert depends.inputs(job, "data")[depends.SHAPE] == [48, 80]
    squares = prepare(resolved(models, 64, **changes | {"data.buckets": "false"}), Run(tmp_path / "run", NULL), NULL)
    assert squares.drawn_size == (64, 64) and depends.SHAPE not in depends.inputs(squares, "data")
    found = pictures.listed(job)
    stock = diffusers.WanPipeline.from_pretrained(models / "source")
    stock.set_progress_bar_config(disable=True)
    call = dict(height=48, width=80, num_frames=5, num_inference_steps=1, guidance_scale=1.0, output_type="pt")
    generators = [torch.Generator().manual_seed(one.seed) for one in found]
    drawn = stock([one.caption for one in found], **call, max_sequence_length=32, generator=generators).frames
    for one, wanted in zip(found, drawn, strict=True):
        assert videos.shape(one.file) == (80, 48, 4)
        kept = videos.read(one.file, 4, 48, 80)
        torch.testing.assert_close((kept + 1) / 2, wanted.movedim(0, 1)[:, :4], atol=0.51 / 255, rtol=0)


def test_the_users_videos_are_hashed_and_those_that_are_too_short_left_out(models, tmp_path, capsys):
    clips = tmp_path / "clips"
    (clips / "frames").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for name, frames in (("a", 8), ("b", 9), ("c", 7)):
        videos.write(torch.rand(3, frames, 40, 48, generator=generator) * 2 - 1, clips / f"{name}.mkv", FPS)
    for number in range(8):
        images.write(torch.rand(3, 40, 48, generator=generator), clips / "frames" / f"frame-{number:03d}.png")
    for name in ("a", "b", "c", "frames"):
        (clips / f"{name}.txt").write_text(f"clip {name}")
    given = {"data.kind": "folder", "data.path": str(clips)}
    job = until_data(tmp_path, models, **given)
    found = {one.caption: one for one in pictures.listed(job)}
    assert sorted(found) == ["clip a", "clip b", "clip frames"]
    assert found["clip a"].sha256 == hashlib.sha256((clips / "a.mkv").read_bytes()).hexdigest()
    of_folder = found["clip frames"].sha256
    shutil.copy(clips / "frames" / "frame-000.png", clips / "frames" / "frame-003.png")
    assert {one.caption: one.sha256 for one in job_in(tmp_path, models, **given).given}["clip frames"] != of_folder
    with pytest.raises(InputError, match="4 videos in .* fewer than the 12 frames .* the longest has 9"):
        pictures.require(job_in(tmp_path, models, **{**given, "data.frames": 12, "data.count": 3}))


def test_a_broken_video_is_told_before_any_work(models, tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.mp4").write_bytes(b"no video")
        (tmp_path / f"{name}.txt").write_text(name)
    job = job_in(tmp_path / "run", models, **{"data.kind": "folder", "data.path": str(tmp_path)})
    with pytest.raises(InputError, match="3 of 3 videos cannot be read, 0 are tolerated; first: the video .*a.mp4"):
        pictures.require(job)


def test_what_reads_videos_is_asked_for_before_the_base_draws(models, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ResourceError, match="needs the package av"):
        pictures.require(job_in(tmp_path, models))


def test_the_sheet_of_a_training_shows_frames_and_a_film_lies_beside_it(models, tmp_path):
    """Its videos are measured as `evaluate` measures: here the round trips of the kept latents, in all their frames."""
    given = {"data.kind": "folder", "data.path": "tiny-videos:32", "watch.grid_every": 2, "watch.pictures": 2}
    training = {"adapt.phases": PHASES, "align_head.steps": 0, "bundle.steps": 2}
    measured = {"watch.metrics": "[motion-accuracy, temporal-difference]", "data.count": 40}
    changes = {**given, **training, **measured, "data.guidance": 1}
    conversion.convert(resolved(models, **changes), tmp_path / "run", tmp_path / "out", NULL, until="adapt-1")
    lines = [json.loads(line) for line in (tmp_path / "run" / "adapt-1" / "measures.jsonl").read_text().splitlines()]
    found = {line["measure"]: line for line in lines}
    assert list(found) == ["motion-accuracy", "temporal-difference", "sharpness", "colour"]
    job = job_in(tmp_path, models, **changes)
    held_out = job.rows(SIDE).split()[1]
    codec = autoencoders.load(job.target, scale=job.recipe.latents.scale_override)
    trips = codec.decode(held_out.batch([0, 1])[0])
    levels = (trips * 127.5 + 127.5).round().clamp(0, 255)
    moved = levels.diff(dim=2).abs().mean((1, 2, 3, 4)).mean().item()
    assert found["temporal-difference"]["round_trip"] == pytest.approx(moved, rel=0.01)
    right = tiny_videos.right(trips, held_out.captions([0, 1])).mean().item()
    assert found["motion-accuracy"]["round_trip"] == pytest.approx(right)
    sheet, *_ = sorted((tmp_path / "run").glob("adapt*/samples/*.png"))
    across, down = Image.open(sheet).size
    rows = 4  # of two drawn videos and their round trips
    assert (across, down) == (grids.GAP + 5 * (grids.SIDE + grids.GAP), 18 + rows * (14 + grids.SIDE + grids.GAP))
    frames = FRAMES - 3  # the autoencoder gives back 4 T - 3 frames
    width, _, count = videos.shape(sheet.with_suffix(".mp4"))
    assert (width, count) == (grids.GAP + 2 * (grids.SIDE + grids.GAP), frames)
    given = [*(tmp_path / "run" / "sources").rglob("*.mkv")]
    assert len(given) == 40 and {rate(file) for file in (sheet.with_suffix(".mp4"), *given)} == {FPS}


def test_a_whole_conversion_and_its_evaluation(models, tmp_path):
    """The measures of the kept files, computed here of every pair of neighbours and of five frames."""
    given = {"data.kind": "folder", "data.path": "tiny-videos:32", "bundle.steps": 2, "align_head.steps": 0}
    measures = {"evaluate.metrics": "[temporal-difference, sharpness]", "evaluate.prompts": 3}
    changes = {**given, "adapt.phases": PHASES, "bundle.guidance": 1, **measures}
    conversion.convert(resolved(models, **changes), tmp_path / "run", tmp_path / "bundle", NULL)
    found = read_json(tmp_path / "run" / "verify" / "stage.json")["metrics"]["evaluation"]["measures"]
    assert [row["measure"] for row in found] == ["temporal-difference", "sharpness"]
    assert all(row["converted"] > 0 and row["ceiling"] > 0 for row in found)
    asked = Asked(
        tmp_path / "bundle",
        tmp_path / "found",
        against=str(models / "source"),
        prompts="tiny-videos",
        count=3,
        metrics=("motion-accuracy", "temporal-difference", "sharpness", "colour"),
        steps=2,
    )
    document = evaluate(asked, NULL)
    values = {row["measure"]: row for row in document["measures"]}
    assert list(values) == ["motion-accuracy", "temporal-difference", "sharpness", "colour"]
    stated = read_json(tmp_path / "bundle" / "model_index.json")[FPS_KEY]
    assert stated == read_json(tmp_path / "bundle" / "dcgen_manifest.json")["defaults"]["fps"] == FPS
    assert {rate(file) for file in (tmp_path / "found" / "pictures").rglob("*.mkv")} == {FPS}
    folder = next((tmp_path / "found" / "pictures").glob("converted-*"))
    clips = torch.stack([videos.read(file, 5, SIDE, SIDE) for file in sorted(folder.glob("*.mkv"))])
    assert clips.shape == (3, 3, 5, SIDE, SIDE)  # the bundle states 5 frames: 8 - 3
    levels = (clips * 127.5 + 128).clamp(0, 255).to(torch.uint8).double()
    moved = (levels[:, :, 1:] - levels[:, :, :-1]).abs().mean((1, 2, 3, 4))
    assert values["temporal-difference"]["converted"] == pytest.approx(moved.mean().item(), rel=1e-6)
    sharp = torch.stack([Sharpness().scores(clip.movedim(1, 0), []) for clip in clips]).mean()
    assert values["sharpness"]["converted"] == pytest.approx(sharp.item(), rel=1e-6)
    assert evaluate(asked, NULL)["pictures"]["converted"]["drawn"] == 0
    with pytest.raises(InputError, match="the measure accuracy cannot be used"):
        evaluate(replace(asked, metrics=("accuracy",)), NULL)
