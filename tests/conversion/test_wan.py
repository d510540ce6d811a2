"""A whole conversion of tiny Wan pipelines from a folder of videos, with a random DC-AE-V, through the real command."""

import os
import shutil
import signal
import subprocess
import sys

import av
import numpy as np
import pytest
import torch
from at_stage import run_disturbed
from conftest import run_cli
from PIL import Image
from safetensors.torch import load_file

from dcgen_convert import families
from dcgen_convert.bundle.verify import verify
from dcgen_convert.checkpoint.headers import read_weights
from dcgen_convert.core import names
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import CheckFailed
from dcgen_convert.core.files import read_json, sha256
from dcgen_convert.core.pixels import to_image
from dcgen_convert.data import buckets, images, videos
from dcgen_convert.evaluation import grids
from dcgen_convert.families.base import FPS_KEY, REFERENCE
from dcgen_convert.networks import autoencoders
from dcgen_convert.planning import needs
from dcgen_convert.stages import align_head, head_fit
from dcgen_convert.stages.head_fit import HeadFit
from dcgen_convert.train import objective, phases

from . import small_videos
from .small_videos import COUNT, SIDE, C

FRAMES, SCALE = 8, 1.5
LATENTS = {"wan": ((16, 8), 16), "wan-image": ((16, 8), 16), "wan-2.2": ((48, 4), 32)}
LATENTS |= dict.fromkeys(("wan-a14b", "wan-image-a14b"), LATENTS["wan"])
LATENTS["sana-video"] = LATENTS["wan"]  # (c, cells) of the base, and f of the new autoencoder
GIVEN = {"wan-2.2": (2 * FRAMES + 1, 48)}  # frames, and those a second: twice as many as this model draws
CHANGES = {"data.frames": FRAMES, "latents.scale_override": SCALE}
# Runs where this program is not.
PROGRAM = """
import sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
assert "dcgen_convert" not in sys.modules
assert not pipe.config.get("expand_timesteps")  # a timestep for every 2 x 2 cells: there is a token for each
given = {"image": torch.zeros(1, 3, 32, 64)} if sys.argv[2].startswith("wan-image") else {}
networks, calls = [pipe.transformer, getattr(pipe, "transformer_2", None)], []
for number, network in enumerate(network for network in networks if network is not None):
    network.register_forward_hook(lambda *_, number=number: calls.append(number))
options = dict(height=32, width=64, num_inference_steps=2, output_type="pt", max_sequence_length=512)
options |= dict(frames=5, use_resolution_binning=False) if sys.argv[2] == "sana-video" else dict(num_frames=5)
frames = pipe(prompt="a red fox", **given, **options).frames
assert frames.shape == (1, 5, 3, 32, 64) and torch.isfinite(frames).all(), frames.shape
once = [0, 0] if sys.argv[2] == "sana-video" else [0] * 4  # two steps; SANA's pipeline takes guidance in one call
assert calls == ([0, 0, 1, 1] if sys.argv[2].endswith("a14b") else once), calls
print(type(pipe).__name__, type(pipe.vae).__name__, round(1 / pipe.vae.config.latents_std[0], 6))
"""


def rate(file):
    with av.open(str(file)) as opened:
        return opened.streams.video[0].average_rate


def command(name, **changes):
    return small_videos.command(name, **CHANGES, **changes)


@pytest.fixture(scope="module", params=LATENTS)
def whole(request, tmp_path_factory):
    """(name, folder with source, ae, videos, run and bundle), of a conversion to its end."""
    name, root = request.param, tmp_path_factory.mktemp(request.param)
    small_videos.lay_out(name, root, *GIVEN.get(name, (FRAMES + 1, 16)))
    small_videos.dc_ae_v(LATENTS[name][1]).save_pretrained(root / "ae")
    small_videos.convert(root, *command(name))
    return name, root


@pytest.fixture(scope="module")
def job(whole):
    with small_videos.job_of(whole[1]) as job:
        yield job


def test_the_bundle_is_verified_and_the_stock_pipeline_draws_from_it(whole, tmp_path):
    name, root = whole
    manifest = read_json(root / "bundle" / "dcgen_manifest.json")
    family = families.get(manifest["family"])
    fps = 24 if name == "wan-2.2" else 16
    assert family.name == name.removesuffix("-2.2")
    assert (manifest["defaults"]["frames"], manifest["defaults"]["fps"]) == (5, fps)
    assert read_json(root / "bundle" / "model_index.json")[FPS_KEY] == fps
    assert f'"video.mp4", fps={fps})' in (root / "bundle" / "README.md").read_text()
    films = [*root.glob("run/adapt-1*/samples/*.mp4")]
    assert films and {rate(film) for film in films} == {fps}
    where = {"HF_HOME": str(tmp_path / "hub"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | where
    call = [sys.executable, "-c", PROGRAM, str(root / "bundle"), name]
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [family.pipeline_class, "AutoencoderDCVideo", str(SCALE)]


def test_the_sheet_of_a_training_shows_what_the_videos_are_drawn_from(whole, job):
    """Of a model that is given the first frame: that frame, as the autoencoder gives back the picture in a latent frame
    of its own. One video is held out: it has a row of five frames, and so has each video beside it.
    """
    name, root = whole
    files = sorted(root.glob("run/adapt-1*/samples/step-000002.png"))
    assert len(files) == len(job.source.experts)
    for file in files:
        cells = np.asarray(Image.open(file).convert("RGB"), dtype=np.float32)
        row, across = 14 + grids.SIDE + grids.GAP, grids.SIDE + grids.GAP
        rows, columns = (cells.shape[0] - 18) // row, (cells.shape[1] - grids.GAP) // across
        assert (rows, columns) == (3 if name.startswith("wan-image") else 2, 5)
    if not name.startswith("wan-image"):
        return
    shown = [cells[18 + 14 : 18 + 14 + grids.SIDE, grids.GAP + n * across :][:, : grids.SIDE] for n in range(columns)]
    assert all(np.array_equal(one, shown[0]) for one in shown)
    _, unseen = job.rows(SIDE).split()
    (first, *_), *_ = buckets.first_of_each(unseen.spans, 2)
    latent = unseen.pairs([first])[1][REFERENCE]
    frame = autoencoders.load(job.target, scale=SCALE).decode(latent)[0, :, 0]
    wanted = np.asarray(grids.cell(to_image(frame)), dtype=np.float32)
    assert wanted.std() > 1 and np.abs(shown[0] - wanted).max() <= 2


def test_every_latent_is_of_the_frames_of_its_autoencoder(whole, job):
    """8 frames for the new one, 5 for the base's: two latent frames each. One at a time; atol 2e-4."""
    name, root = whole
    rows = images.read_index(root / "run" / "latents" / images.ROWS, root / "videos")
    old, new = job.rows(SIDE).pairs(range(COUNT))
    base, target = autoencoders.load(job.source.vae), autoencoders.load(job.target, scale=SCALE)
    (channels, cells), factor = LATENTS[name]
    assert old["z"].shape == (COUNT, channels, 2, cells, cells)
    assert new["z"].shape == (COUNT, C, 2, *[SIDE // factor] * 2)
    for place, row in enumerate(rows):
        step = 2 if name in GIVEN else 1
        pixels = videos.read(row.file, step * FRAMES, SIDE, SIDE)[None, :, ::step]
        torch.testing.assert_close(new["z"][place], target.encode(pixels)[0], atol=2e-4, rtol=0)
        torch.testing.assert_close(old["z"][place], base.encode(pixels[:, :, :5])[0], atol=2e-4, rtol=0)
        if name.startswith("wan-image"):
            first = job.family.reference_video(pixels[:, :, 0], FRAMES, first=4)
            torch.testing.assert_close(new[REFERENCE][place], target.encode(first)[0], atol=2e-4, rtol=0)


TWO = pytest.mark.parametrize("whole", ["wan-a14b"], indirect=True)


@TWO
def test_each_of_two_networks_is_trained_at_its_own_noise_levels(whole, job):
    """They meet at .875. The held-out losses, the draws of the training and those of the closed form, whose solution is
    that of a dense solver in float64 on all its rows, to 1e-5 of the error (the head is kept in float32).
    """
    root, stages = whole[1], needs.stages(job.recipe, False, job.source.experts)
    assert [one.expert.component for one in job.experts] == ["transformer", "transformer_2"]
    assert stages == [path.name for path in sorted(root.glob("run/*/"), key=lambda path: stages.index(path.name))]
    for own in job.experts:
        low, high = own.expert.within
        before = read_json(own.folders.adapt(1) / "evaluation-before.json")
        levels = [float(key[1:]) for key in before if key.startswith("t")]
        assert len(levels) >= 3 and all(low - 0.005 <= t <= high + 0.005 for t in levels)
        rows, held_out = own.rows(SIDE).split()
        model = align_head.surgical(own, own.folders.align_embedder / names.MODULES, "cpu")
        task = phases.Task(model, own.family, own.recipe.adapt, rows, own.scheduler, within=own.expert.within)
        drawn = objective.draw(0, 5, range(512), (C, 2, 4, 4), task.sampling((C, 2, 4, 4)))
        assert low <= drawn.t.min() and drawn.t.max() <= high and drawn.t.max() - drawn.t.min() > 0.6 * (high - low)
        # all rows of the closed form at once, through the network's own hook
        fit, features, goals = HeadFit(own, task, held_out, root), [], []
        with fit.listening(), torch.no_grad():
            for unit in (unit for part in fit.parts[1:] for unit in part):
                z0, text = rows.batch(unit.rows)
                shape = z0.shape[1:]
                drawn = objective.draw(0, head_fit.DRAW_STREAM + unit.number, unit.rows, shape, task.sampling(shape))
                assert low <= drawn.t.min() and drawn.t.max() <= high
                x, goal, _ = fit._rows(z0, text, drawn)
                features.append(x.flatten(0, 1).double())
                goals.append(goal.flatten(0, 1).double())
        x, y = torch.cat(features), torch.cat(goals)
        solved = load_file(own.folders.align_head / names.MODULES)
        weight, bias = (solved[f"{own.family.head}.{name}"].double() for name in ("weight", "bias"))
        found = (x @ weight.T + bias - y).square().mean().item()
        x, y = x - x.mean(0), y - y.mean(0)
        ridge = (head_fit.RIDGE * len(x) * x.square().mean()).sqrt() * torch.eye(x.shape[1], dtype=torch.float64)
        rows = torch.cat([x, ridge]), torch.cat([y, y.new_zeros(len(ridge), y.shape[1])])
        best = (x @ torch.linalg.lstsq(*rows, driver="gelsd").solution - y).square().mean().item()
        assert found == pytest.approx(best, rel=1e-5)


UNTRAINED = ("surgery-high", "surgery-low", "data", "latents", "align-embedder-high", "align-embedder-low")


def begun(folder, root, *stages):
    """A folder that has what the conversion in ``root`` reads, and ``stages`` of its run."""
    folder.mkdir(exist_ok=True)
    for part in ("source", "ae", "videos"):
        (folder / part).symlink_to(root / part)
    for stage in stages:
        shutil.copytree(root / "run" / stage, folder / "run" / stage)
    return folder


@TWO
def test_two_ranks_train_both_networks_and_go_on_after_a_death(whole, tmp_path):
    """As one rank does, but for the order of sums: the difference is below 1 % of what the conversion has changed.
    Killed in the second network and begun again, two ranks end with the same bytes.
    """
    name, root = whole
    call = (*command(name), "--until", "merge-1")
    once, twice = (begun(tmp_path / kind, root, *UNTRAINED) for kind in ("once", "twice"))
    assert small_videos.as_two_ranks(once, *call) == [0, 0]
    assert small_videos.as_two_ranks(twice, *call, stop=("adapt-1-low", int(signal.SIGKILL)))[0] == -signal.SIGKILL
    assert (twice / "run/adapt-1-high/stage.json").exists() and not (twice / "run/adapt-1-low/stage.json").exists()
    assert small_videos.as_two_ranks(twice, "resume", "run", "--until", "merge-1") == [0, 0]
    log = (once / "run" / "log-rank-1.txt").read_text()
    assert log.count("task fit-head") >= 2 and log.count("task adapt") == 2
    for expert in ("high", "low"):
        file = f"run/merge-1-{expert}/transformer/diffusion_pytorch_model.safetensors"
        assert sha256(once / file) == sha256(twice / file)
        dense = f"run/surgery-{expert}/transformer/diffusion_pytorch_model.safetensors"
        two, one, before = (load_file(path) for path in (once / file, root / file, root / dense))
        apart, changed = (
            torch.cat([(one[key].double() - other[key].double()).flatten() for key in one]).norm()
            for other in (two, before)
        )
        assert apart < 0.01 * changed, (expert, apart, changed)


@TWO
def test_a_run_cut_off_in_the_training_of_the_second_network_ends_with_the_same_bytes(whole, tmp_path):
    name, root = whole
    begun(tmp_path, root, *UNTRAINED, "align-head-high", "align-head-low", "adapt-1-high")
    done = run_disturbed("adapt-1-low", int(signal.SIGTERM), *command(name), cwd=tmp_path)
    assert done.returncode == 143 and not (tmp_path / "run" / "adapt-1-low" / "stage.json").exists(), done.stderr[
        -2000:
    ]
    done = run_cli("resume", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "adapt-1-high: holds, skipped" in done.stderr and "adapt-1-low: continues where it stopped" in done.stderr
    for file in sorted((root / "bundle").rglob("*.safetensors")):
        assert sha256(file) == sha256(tmp_path / file.relative_to(root)), file
    again = run_cli("resume", "run", "--from", "merge-1", "--until", "merge-1", cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    told = [line for line in again.stderr.splitlines() if line.startswith("merged ")]
    assert len(told) == 2 and "adapt-1-low: holds" in again.stderr


@TWO
def test_a_flipped_bit_in_the_second_network_is_found_and_named(whole, tmp_path):
    root = whole[1]
    shutil.copytree(root / "bundle", tmp_path / "bundle")
    manifest = read_json(tmp_path / "bundle" / "dcgen_manifest.json")
    both = [read_weights(root / "bundle" / name) for name in ("transformer", "transformer_2")]
    assert manifest["tensors"].keys() == {*both[0], *(f"transformer_2/{name}" for name in both[1])}
    made = {name: entry["origin"] for name, entry in manifest["tensors"].items()}
    for prefix in ("", "transformer_2/"):  # cross-attention gets no LoRA
        assert made[f"{prefix}blocks.0.attn2.to_q.weight"] == "identical"
        assert made[f"{prefix}blocks.0.attn1.to_q.weight"] == made[f"{prefix}proj_out.weight"] == "changed"
    verify(tmp_path / "bundle", NULL, root / "source", probe=False)
    file = tmp_path / "bundle" / "transformer_2" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckFailed, match=r"transformer_2/diffusion_pytorch_model.* has another hash.*\(tensors \w"):
        verify(tmp_path / "bundle", NULL, probe=False)
    verify(root / "bundle", NULL, root / "source", probe=False)
    shutil.copytree(root / "source", tmp_path / "source")  # the base's second network is compared too
    file = tmp_path / "source" / "transformer_2" / "diffusion_pytorch_model.safetensors"
    name = "blocks.0.attn2.to_q.weight"
    entry = read_weights(file.parent)[name]
    content = bytearray(file.read_bytes())
    content[entry.start] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckFailed, match=f"tensor transformer_2/{name} should be the source's and differs"):
        verify(root / "bundle", NULL, tmp_path / "source", probe=False)
