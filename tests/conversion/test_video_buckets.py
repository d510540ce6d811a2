"""Videos of two shapes in one data set, through the real command: killed twice and resumed, the bundle has the same
bytes. What the latents hold is compared with both autoencoders on crops made here. To a DC-AE-V, and to an autoencoder
of LTX-2's class.
"""

import hashlib
import json
import signal

import numpy as np
import pytest
import torch
from at_stage import run_disturbed
from families.tiny_videos import VIDEOS, ltx_vae
from PIL import Image, ImageOps

from dcgen_convert.core.files import read_json
from dcgen_convert.data import images, videos
from dcgen_convert.evaluation import grids
from dcgen_convert.networks import autoencoders

from . import small_videos
from .small_videos import SIDE, C

F = 16
# Frames of a training video, which are two latent frames; those that the base sees, and its latent frames.
FRAMES = {"dc-ae-v": (8, 5, 2), "ltx": (9, 9, 3)}
SHAPES = {(60, 100): 4, (100, 60): 3}  # height, width of the files in px: videos
ASSIGNED = {(60, 100): (48, 80), (100, 60): (80, 48)}  # of the buckets at 64 px, in steps of 16
SETTINGS = {
    "data.buckets": "on", "data.min_side": 1, "data.count": 7, "latents.scale_tolerance": 1000, "latents.batch": 2,
    "align_head.steps": 0, "adapt.phases.0.steps": 6, "watch.evaluate_every": 3, "watch.grid_every": 3,
}  # fmt: skip
TIMED = {"dcgen_manifest.json", "README.md"}  # these say how long the stages took


def convert(root, command, *more, what=None):
    """The command in ``root`` to its end; what: (stage, signal) that ends it before."""
    if what is None:
        small_videos.convert(root, *command, *more)
    else:
        stage, number = what
        assert run_disturbed(stage, number, *command, *more, cwd=root).returncode == -number
        assert not (root / "run" / stage / "stage.json").exists()


@pytest.fixture(scope="module", params=FRAMES)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def root(kind, tmp_path_factory):
    """source, ae, videos, and the run and the bundle of a conversion that nothing disturbed."""
    root = tmp_path_factory.mktemp("shapes")
    VIDEOS["wan"].build(root / "source")
    deep = ltx_vae(C, factor=F) if kind == "ltx" else small_videos.dc_ae_v(F)
    deep.save_pretrained(root / "ae")
    (root / "videos").mkdir()
    shapes = [shape for shape, count in SHAPES.items() for _ in range(count)]
    for place in torch.randperm(len(shapes), generator=torch.Generator().manual_seed(0)).tolist():
        noise = torch.rand(3, FRAMES[kind][0] + 1, *shapes[place], generator=torch.Generator().manual_seed(place))
        videos.write(noise * 2 - 1, root / "videos" / f"{place}.mkv", 16)
        (root / "videos" / f"{place}.txt").write_text(f"clip {place}")
    convert(root, command(root, kind))
    return root


def command(root, kind):
    return small_videos.command("wan", root, **SETTINGS, **{"data.frames": FRAMES[kind][0]})


def test_a_run_that_was_killed_twice_ends_with_the_same_bytes(root, kind, tmp_path):
    convert(tmp_path, command(root, kind), what=("latents", signal.SIGKILL))
    convert(tmp_path, ["resume", "run"], what=("adapt-1", signal.SIGKILL))
    convert(tmp_path, ["resume", "run"])
    known, found = (
        {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (folder / "bundle").rglob("*")
            if path.is_file() and path.name not in TIMED
        }
        for folder in (root, tmp_path)
    )
    assert found == known and any(name.endswith("model.safetensors") for name in known)


def test_every_latent_is_of_the_crop_of_its_own_video(root, kind):
    """Crops by Pillow, frame by frame, through both autoencoders, one video at a time; atol 2e-4."""
    with small_videos.job_of(root) as job:
        rows = images.read_index(root / "run" / "latents" / images.ROWS, root / "videos")
        cached = job.rows(SIDE)
        base, target = autoencoders.load(job.source.vae), autoencoders.load(job.target)
    assert job.size == (48, 80)  # the bucket nearest to 9:16 is what the bundle is made for
    seen, (count, shown, times) = dict.fromkeys(SHAPES, 0), FRAMES[kind]
    for place, row in enumerate(rows):
        frames = list(videos.pictures(row.file))[:count]
        width, height = frames[0].size
        size = ASSIGNED[height, width]
        crops = [ImageOps.fit(frame, size[::-1], Image.Resampling.LANCZOS) for frame in frames]
        pixels = torch.stack([torch.from_numpy(np.array(crop)) for crop in crops]).permute(3, 0, 1, 2) / 127.5 - 1
        old, new = (found["z"][0] for found in cached.pairs([place]))
        assert new.shape == (C, 2, size[0] // F, size[1] // F) and old.shape[1] == times
        torch.testing.assert_close(new, target.encode(pixels[None])[0], atol=2e-4, rtol=0)
        torch.testing.assert_close(old, base.encode(pixels[None, :, :shown])[0], atol=2e-4, rtol=0)
        seen[height, width] += 1
    assert seen == SHAPES


def test_the_training_saw_both_shapes_and_the_bundle_states_its_own(root, kind):
    run = root / "run"
    metrics = read_json(run / "latents" / "stage.json")["metrics"]
    assert metrics[f"buckets_{SIDE}"] == "80x48 3, 48x80 4"
    lines = [json.loads(line) for line in (run / "adapt-1" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    defaults = read_json(root / "bundle" / "dcgen_manifest.json")["defaults"]
    assert (defaults["height"], defaults["width"], defaults["frames"]) == (48, 80, FRAMES[kind][1])
    assert len(list((run / "adapt-1" / "samples").glob("*.mp4"))) == 2


def test_the_grid_shows_videos_as_rows_of_frames(root, kind):
    """For each prompt the source, the bundle and the round trip, five frames of each, and the card says so."""
    shown = read_json(root / "bundle" / "dcgen_manifest.json")["pictures"]
    rows = 3 * len(shown["prompts"])
    assert rows == 3 * 2  # evaluate.prompts
    with Image.open(root / "bundle" / "pictures.png") as sheet:
        assert sheet.size == (
            grids.GAP + grids.FRAMES * (grids.SIDE + grids.GAP),
            grids.TITLE + rows * (grids.CAPTION + grids.SIDE + grids.GAP),
        )
        cells = [
            np.asarray(sheet)[top : top + grids.SIDE, left : left + grids.SIDE]
            for top in (
                grids.TITLE + grids.CAPTION + row * (grids.CAPTION + grids.SIDE + grids.GAP) for row in range(rows)
            )
            for left in (grids.GAP, grids.GAP + (grids.FRAMES - 1) * (grids.SIDE + grids.GAP))
        ]
    assert all((first != last).any() for first, last in zip(cells[::2], cells[1::2], strict=True))
    assert "from above: the base model, this model in 16 bits, " in (root / "bundle" / "README.md").read_text()
