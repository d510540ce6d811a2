"""A whole conversion of tiny Wan pipelines to a random autoencoder of LTX-2's class, through the real command.

A latent frame of it has eight frames, one of Wan's four, and both have a first one of one frame alone: 17 frames are 3
and 5 latent frames.
"""

import os
import shutil
import subprocess
import sys
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLLTX2Video
from families.tiny_videos import VIDEOS, ltx_vae, sana_video
from safetensors.torch import load_file

from dcgen_convert.bundle.inspection import inspect
from dcgen_convert.bundle.verify import verify
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import CheckFailed
from dcgen_convert.core.files import read_json
from dcgen_convert.data import images, videos
from dcgen_convert.networks import autoencoder_ltx2, autoencoders
from dcgen_convert.stages import align_embedder, gap

from . import small_videos
from .small_videos import COUNT, SIDE, C

FRAMES = 17
LATENTS = {"wan": (16, 8), "wan-2.2": (48, 4), "sana-video": (16, 8)}  # (channels, cells per side) of the base
# Runs where this program is not: at two sizes, with two numbers of frames.
PROGRAM = """
import sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
assert "dcgen_convert" not in sys.modules
for height, width, count in ((64, 96, 9), (96, 64, 17)):
    options = dict(height=height, width=width, num_inference_steps=2, max_sequence_length=int(sys.argv[3]))
    more = dict(frames=count, use_resolution_binning=False), dict(num_frames=count)
    options |= more[sys.argv[2] != "sana-video"]
    shown = {}
    for kind in ("pt", "latent"):
        generator = torch.Generator().manual_seed(0)
        shown[kind] = pipe(prompt="a red fox", output_type=kind, generator=generator, **options).frames
    assert shown["pt"].shape == (1, count, 3, height, width), shown["pt"].shape
    vae, z = pipe.vae, shown["latent"]
    assert z.shape[2:] == ((count - 1) // 8 + 1, height // 32, width // 32), z.shape
    with torch.no_grad():
        raw = z * vae.latents_std.view(1, -1, 1, 1, 1) + vae.latents_mean.view(1, -1, 1, 1, 1)
        wanted = (vae.decode(raw).sample.movedim(1, 2) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(shown["pt"], wanted, atol=1e-5, rtol=0)
print(type(pipe).__name__, type(pipe.vae).__name__)
"""


@pytest.fixture(scope="module", params=LATENTS)
def whole(request, tmp_path_factory):
    """(name, folder with source, ae, videos, run and bundle), of a conversion to its end."""
    name, root = request.param, tmp_path_factory.mktemp(request.param)
    files = small_videos.lay_out(name, root, FRAMES + 1, 24 if name == "wan-2.2" else 16)
    seen = torch.stack([videos.read(file, FRAMES, SIDE, SIDE) for file in files])
    ltx_vae(C, seen).save_pretrained(root / "ae")
    small_videos.convert(root, *small_videos.command(name, **{"data.frames": FRAMES}))
    return name, root


@pytest.fixture(scope="module")
def job(whole):
    with small_videos.job_of(whole[1]) as job:
        yield job


def test_the_stock_pipeline_draws_the_frames_that_are_asked_for(whole, tmp_path):
    """And they are its own latents, decoded with the mean and the standard deviation by hand: to 1e-5."""
    name, root = whole
    manifest = read_json(root / "bundle" / "dcgen_manifest.json")
    assert manifest["defaults"]["frames"] == FRAMES
    stated = {key: manifest["autoencoder"][key] for key in ("frames", "code", "factor", "scaling_factor")}
    assert stated == {"frames": 8, "code": autoencoder_ltx2.CLASS_NAME, "factor": 32, "scaling_factor": 1.0}
    where = {"HF_HOME": str(tmp_path / "hub"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | where
    call = [sys.executable, "-c", PROGRAM, str(root / "bundle"), name, str(VIDEOS[name].length)]
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    stock = {"sana-video": "SanaVideoPipeline"}.get(name, "WanPipeline")
    assert done.stdout.split() == [stock, autoencoder_ltx2.CLASS_NAME]


@pytest.mark.parametrize("whole", ["wan"], indirect=True)
def test_inspect_and_verify_look_into_its_bundle(whole, tmp_path):
    root = whole[1]
    own = {"class": autoencoder_ltx2.CLASS_NAME, "f": 32, "c": C, "frames": 8, "scaling_factor": 1.0}
    found = inspect(root / "bundle")
    assert (found["kind"], found["family"], found["autoencoder"]) == ("bundle", "wan", own)
    assert verify(root / "bundle", NULL, root / "source", probe=False)["ok"]
    for name in ("diffusion_pytorch_model.safetensors", f"{autoencoder_ltx2.MODULE_NAME}.py"):
        copy = tmp_path / name
        shutil.copytree(root / "bundle", copy)
        content = bytearray((copy / "vae" / name).read_bytes())
        content[-3] ^= 1
        (copy / "vae" / name).write_bytes(content)
        with pytest.raises(CheckFailed, match=f"vae/{name} has another hash"):
            verify(copy, NULL, probe=False)


def test_both_autoencoders_are_given_the_same_frames(whole, job):
    """17 each: 5 latent frames of the base's, and 3 of the new one. One at a time; atol 2e-4."""
    name, root = whole
    rows = images.read_index(root / "run" / "latents" / images.ROWS, root / "videos")
    old, new = job.rows(SIDE).pairs(range(COUNT))
    base, target = autoencoders.load(job.source.vae), autoencoders.load(job.target)
    channels, cells = LATENTS[name]
    assert old["z"].shape == (COUNT, channels, 5, cells, cells) and new["z"].shape == (COUNT, C, 3, 2, 2)
    for place, row in enumerate(rows):
        pixels = videos.read(row.file, FRAMES, SIDE, SIDE)[None]
        torch.testing.assert_close(new["z"][place], target.encode(pixels)[0], atol=2e-4, rtol=0)
        torch.testing.assert_close(old["z"][place], base.encode(pixels)[0], atol=2e-4, rtol=0)
    power = new["z"].double().square().mean(dim=(0, 2, 3, 4))
    torch.testing.assert_close(power, torch.ones_like(power), atol=5e-3, rtol=0)  # by the statistics of its weights


def test_the_embedder_is_the_least_squares_of_the_tokens_that_it_meets(whole, job):
    """Brute force in float64: the first token meets the first latent frame of the base, each other one two of them; in
    each the 2 x 2 (Wan 2.2: one) tokens at its place. 1e-10, relative; and the stage's own float32 is within 1e-4.
    """
    family = job.family
    teacher, student = (
        align_embedder.embedding(folder, family.embedder).double()
        for folder in (job.source.transformer, job.folders.surgery / "transformer")
    )
    rows = job.of_phase(1).rows(SIDE)

    def pairs(indices):
        return tuple({key: value.double() for key, value in found.items()} for found in rows.pairs(indices))

    cache = SimpleNamespace(pairs=pairs, spans=rows.spans)
    weight, bias = align_embedder.Problem(job, teacher, student, cache, "average").equations(3).solve(0.0, bias=True)
    old, new = pairs(range(COUNT))
    with torch.no_grad():
        embedded = teacher.get_submodule(family.embedder)(old["z"])  # (B, D, 5, h, w)
    h = embedded.shape[-1] // 2
    x, y = [], []
    for row, k, i, j in product(range(COUNT), range(3), range(2), range(2)):
        met = [0] if k == 0 else [2 * k - 1, 2 * k]
        part = embedded[row][:, met, h * i : h * i + h, h * j : h * j + h]
        x.append(torch.cat([new["z"][row, :, k, i, j], torch.ones(1, dtype=torch.float64)]))
        y.append(part.flatten(1).mean(1))
    wanted = torch.linalg.lstsq(torch.stack(x), torch.stack(y), driver="gelsd").solution.T
    found = torch.cat([weight, bias[:, None]], dim=1)
    assert (found - wanted).norm() <= 1e-10 * wanted.norm()
    written = load_file(job.folders.align_embedder / "modules.safetensors")
    assert written[f"{family.embedder}.weight"].shape[1:] == (C, 1, 1, 1)
    stage = torch.cat([value.double().flatten(1) for value in (written[f"{family.embedder}.weight"],)], dim=1)
    assert (stage - wanted[:, :C]).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize("source", ["bundle", "sana-video"])
def test_a_model_that_works_on_this_autoencoder_is_a_source(source, whole, tmp_path):
    """A bundle of an earlier conversion, and SANA-Video as it is published for 720p: embedder and head stay."""
    name, root = whole
    if name != "wan":
        return
    where, kind = root / "bundle", "wan"
    if source == "sana-video":
        where, kind = tmp_path / "source", "sana-video"
        deep = AutoencoderKLLTX2Video.from_pretrained(root / "ae")
        sana_video(where, deep, in_channels=C, out_channels=C, patch_size=(1, 1, 1))
    call = small_videos.command(kind, root, where, **{"data.frames": FRAMES})
    small_videos.convert(tmp_path, *call, "--until", "align-embedder")
    kept = load_file(tmp_path / "run" / "align-embedder" / "modules.safetensors")
    made = load_file(where / "transformer" / "diffusion_pytorch_model.safetensors")
    assert kept and all(torch.equal(value, made[key].float()) for key, value in kept.items())
    latents, same = (load_file(next((at / "run" / "latents").glob("target-*"))) for at in (tmp_path, root))
    torch.testing.assert_close(latents["z"], same["z"], atol=1e-6, rtol=0)


def test_the_gap_is_measured_on_the_tokens_that_meet():
    """Against loops in float64, 1e-6 of float32 sums."""
    torch.manual_seed(0)
    old, new = torch.randn(1, 6, 5, 4, 4), torch.randn(1, 6, 3, 2, 2)
    distance = norm = 0.0
    for k, i, j in product(range(3), range(2), range(2)):
        met = [0] if k == 0 else [2 * k - 1, 2 * k]
        goal = old[0][:, met, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].double().flatten(1).mean(1)
        distance += (new[0, :, k, i, j].double() - goal).square().sum().item()
        norm += goal.square().sum().item()
    assert gap.squares(old, new).tolist() == pytest.approx([distance, norm], rel=1e-6)
