"""A bundle that draws videos: what is written, what verify looks at, and that the stock pipeline draws from it."""

import math
import os
import subprocess
import sys

import diffusers
import pytest
import torch
from families.tiny_videos import VIDEOS
from safetensors.torch import load_file

from dcgen_convert import families
from dcgen_convert.bundle import loading, probe, sample
from dcgen_convert.bundle.layout import BundleParts, write_bundle
from dcgen_convert.bundle.manifest import FILE
from dcgen_convert.bundle.manifest import read as read_manifest
from dcgen_convert.bundle.verify import verify
from dcgen_convert.checkpoint import trust
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import CheckFailed, InputError
from dcgen_convert.core.files import read_json, write_json
from dcgen_convert.data import videos
from dcgen_convert.networks import autoencoder_dc_video as video
from dcgen_convert.stages.job import find_autoencoder

from .conftest import Parts, converted, manifest_of

WAN, F, C, SCALE = families.get("wan"), 16, 8, 1.5
# Runs where this program is not. It shows what the pipeline knows of the latents, and draws 9 frames.
PROGRAM = """
import sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
assert "dcgen_convert" not in sys.modules and type(pipe).__name__ == "WanPipeline"
assert (pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial) == (4, 16)
print(pipe.vae.config.latents_std[0], type(pipe.vae).__name__)
options = dict(height=32, width=64, num_frames=9, num_inference_steps=2, max_sequence_length=32)
drawn = {}
for kind in ("pt", "latent"):
    generator = torch.Generator().manual_seed(0)
    drawn[kind] = pipe("a red fox", output_type=kind, generator=generator, **options).frames
torch.save(drawn, sys.argv[2])
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Shadows the pictures' `parts`: a tiny Wan, its converted transformer and a small DC-AE-V."""
    root = tmp_path_factory.mktemp("wan")
    VIDEOS["wan"].build(root / "source")
    config = read_json(root / "source" / "transformer" / "config.json")
    torch.manual_seed(4)
    model = diffusers.WanTransformer3DModel.from_config(WAN.convert_config(config, F, C, 64))
    converted(model, WAN, root / "source", root / "transformer")
    torch.manual_seed(5)
    video.AutoencoderDCVideo(
        latent_channels=C,
        block_out_channels=(8, 16, 16, 16, 32),
        layers_per_block=(1,) * 5,
        chunk_frames=8,
        scaling_factor=0.9,
    ).save_pretrained(root / "autoencoder")
    return Parts(WAN, root / "source", root / "transformer", root / "autoencoder", C, F, 64)


@pytest.fixture
def bundle(parts, tmp_path):
    manifest = manifest_of(parts)
    manifest["defaults"] |= {"text_length": 32, "frames": 9}
    scheduler = read_json(parts.source / "scheduler" / "scheduler_config.json")
    own = {"autoencoder": parts.autoencoder, "scheduler": scheduler, "scaling_factor": SCALE}
    whole = BundleParts(WAN, parts.source, parts.transformer, **own)
    return write_bundle(tmp_path / "fox", whole, manifest, NULL)


def test_verify_draws_a_video_in_a_fresh_process(bundle):
    """In the shape that the bundle is made for, with 15 tokens of 16 px to a frame: a square has 16."""
    record = read_manifest(bundle)
    record["defaults"] |= {"height": 480, "width": 832, "frames": 77}
    write_json(bundle / FILE, record)
    picture = verify(bundle, NULL)["picture"]
    assert (picture["frames"], picture["height"], picture["width"]) == (9, 48, 80) and picture["std"] > 0
    assert (picture["untold"], picture["untold_width"]) == (480, 832)


@pytest.mark.parametrize(
    "own, token, drawn",
    [
        ((480, 832), 32, (96, 160)),
        ((704, 1280), 64, (192, 320)),
        ((1280, 704), 64, (320, 192)),
        ((32, 64), 16, (32, 64)),  # its own size has 8 tokens
        ((1024, 1024), 32, (128, 128)),
        ((64, 64), 32, (128, 128)),
    ],
)
def test_the_picture_of_verify_has_the_shape_of_the_bundle_and_few_tokens(own, token, drawn):
    assert probe.size_of(dict(zip(("height", "width"), own, strict=True)), token) == drawn
    assert math.prod(drawn) <= (4 * token) ** 2


def test_the_stock_pipeline_draws_where_this_program_is_not(bundle, parts, tmp_path):
    """The frames are those of its own latents, decoded here with the scale that the bundle was given: to 1e-5."""
    where = {"HF_HOME": str(tmp_path / "hub"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | where
    call = [sys.executable, "-c", PROGRAM, str(bundle), str(tmp_path / "drawn.pt")]
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    std, name = done.stdout.split()
    assert float(std) == pytest.approx(1 / SCALE) and name == video.CLASS_NAME
    drawn = torch.load(tmp_path / "drawn.pt")
    assert drawn["pt"].shape == (1, 9, 3, 32, 64) and drawn["latent"].shape == (1, C, 3, 2, 4)
    vae = video.AutoencoderDCVideo.from_pretrained(parts.autoencoder)
    with torch.no_grad():
        wanted = vae.decode(drawn["latent"] / SCALE).sample
    shown = (wanted.permute(0, 2, 1, 3, 4) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(drawn["pt"], shown, atol=1e-5, rtol=0)


def test_sample_writes_videos(bundle, tmp_path):
    """The file shows what the loaded pipeline draws, as far as H.264 keeps noise: the light of it."""
    size = {"height": 32, "width": 64, "steps": 2, "guidance": 1.0}
    done = sample.sample(bundle, ["a red fox"], tmp_path / "out", NULL, seed=3, **size)
    (file,) = (tmp_path / "out").iterdir()
    assert done["images"] == [str(file)] and file.name == "0000-seed-3.mp4"
    assert videos.shape(file) == (64, 32, 9)
    pipeline, _ = loading.load(bundle)
    drawn = sample.draw_pixels(pipeline, WAN, ["a red fox"], [3], **size, length=32, frames=9)[0].movedim(0, 1)
    weights = torch.tensor([0.2126, 0.7152, 0.0722])[:, None, None, None]
    light = [(one.float() * weights).sum(0) for one in (videos.read(file, 9, 32, 64), drawn, drawn.flip(1))]
    same, other = torch.corrcoef(torch.stack([one.flatten() for one in light]))[0, 1:]
    assert same > 0.95 and other < 0.8


def test_the_files_of_the_autoencoder(bundle, parts):
    index, config = read_json(bundle / "model_index.json"), read_json(bundle / "vae" / "config.json")
    assert index["vae"] == [video.MODULE_NAME, video.CLASS_NAME] and index["_class_name"] == "WanPipeline"
    assert trust.is_own(bundle / "vae" / f"{video.MODULE_NAME}.py") and trust.foreign(bundle, index) == []
    assert (config["scaling_factor"], config["latents_std"]) == (SCALE, [1 / SCALE] * C)
    assert (config["z_dim"], config["scale_factor_temporal"], config["scale_factor_spatial"]) == (C, 4, F)
    weights = "diffusion_pytorch_model.safetensors"
    written, given = load_file(bundle / "vae" / weights), load_file(parts.autoencoder / weights)
    assert written.keys() == given.keys() and all(torch.equal(value, given[key]) for key, value in written.items())


def test_verify_finds_a_config_that_does_not_follow(bundle):
    """What pipelines read of the latents follows from the scaling factor, whatever stands there."""
    path = bundle / "vae" / "config.json"
    write_json(path, {**read_json(path), "latents_std": [1.0] * C})
    with pytest.raises(CheckFailed, match=r"vae/config.json says latents_std \[1.0, .*, its other values give \[0.66"):
        verify(bundle, NULL, probe=False)


def test_the_card(bundle):
    card = (bundle / "README.md").read_text()
    assert "pipeline_tag: text-to-video" in card
    assert "one token per 16 x 16 px of 4 frames" in card
    assert "num_frames=9" in card and 'export_to_video(video, "video.mp4", fps=16)' in card
    assert "trust_remote_code=True" in card and "vae/autoencoder_dc_video_v" in card
    assert "draws 480 x 832 px" in card and "`pipe.vae.enable_tiling()`" in card and "Inpainting" not in card


def test_each_kind_of_model_takes_its_own_autoencoder(parts, tmp_path):
    assert find_autoencoder(str(parts.autoencoder), tmp_path, axes=3).factor == F
    with pytest.raises(InputError, match="AutoencoderDCVideo, a conversion needs an AutoencoderDC to draw pictures"):
        find_autoencoder(str(parts.autoencoder), tmp_path)
    with pytest.raises(InputError, match="is a AutoencoderDC, a conversion needs an AutoencoderDCVideo") as caught:
        find_autoencoder("tiny-dc-ae-f32", tmp_path, axes=3)
    assert "dc-ae-v-f32t4c32" in caught.value.hint and "dc-ae-f32-mix" not in caught.value.hint
