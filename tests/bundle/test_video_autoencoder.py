"""A stock WanPipeline with AutoencoderDCVideo as in-bundle code."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors import safe_open

from dcgen_convert.bundle.expected import expected_tensors
from dcgen_convert.bundle.loading import adapter_part
from dcgen_convert.checkpoint import trust
from dcgen_convert.core.files import read_json, sha256
from dcgen_convert.networks import autoencoder_dc_video as video
from dcgen_convert.networks.folder import load_folder

C, F, WORDS = 8, 8, 16
# Runs where this program is not: it keeps what it draws: 1 frame, one chunk and a rest, several chunks.
PROGRAM = """
import sys, torch
from diffusers import DiffusionPipeline
none = dict(tokenizer=None, text_encoder=None)
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True, **none)
assert "dcgen_convert" not in sys.modules
pipe.set_progress_bar_config(disable=True)
drawn = {}
for frames in (1, 9, 41):
    text = torch.linspace(-1, 1, 4 * 16).reshape(1, 4, 16)
    options = dict(prompt_embeds=text, negative_prompt_embeds=-text, height=16, width=32, num_inference_steps=2)
    for kind in ("pt", "latent"):
        generator = torch.Generator().manual_seed(0)
        drawn[f"{kind}-{frames}"] = pipe(**options, num_frames=frames, output_type=kind, generator=generator).frames
torch.save(drawn, sys.argv[2])
"""


def wan(channels: int) -> WanTransformer3DModel:
    """A small random Wan for latents of so many channels, one token for each cell, and texts of WORDS numbers."""
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        in_channels=channels,
        out_channels=channels,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        ffn_dim=32,
        text_dim=WORDS,
        freq_dim=16,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random WanPipeline whose autoencoder is a small DC-AE-V, f8 K 8; without text encoder."""
    torch.manual_seed(0)
    transformer = wan(C)
    vae = video.AutoencoderDCVideo(
        latent_channels=C,
        block_out_channels=(8, 16, 16, 32),
        layers_per_block=(1, 1, 1, 1),
        chunk_frames=8,
        scaling_factor=0.7241,
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=transformer)
    root = tmp_path_factory.mktemp("wan")
    pipe.save_pretrained(root / "bundle")
    return root / "bundle"


def test_a_fresh_process_draws_as_many_frames_as_asked(folder, tmp_path):
    """Against the latents that the pipeline itself gives, decoded here: to 1e-5 of values from 0 to 1."""
    where = {"HF_HOME": str(tmp_path / "hub"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | where
    call = [sys.executable, "-c", PROGRAM, str(folder), str(tmp_path / "drawn.pt")]
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    drawn, vae = torch.load(tmp_path / "drawn.pt"), load_folder(folder / "vae", "autoencoder", torch.float32)
    assert type(vae) is video.AutoencoderDCVideo
    for frames in (1, 9, 41):
        assert drawn[f"pt-{frames}"].shape == (1, frames, 3, 16, 32)
        latents = drawn[f"latent-{frames}"]
        assert latents.shape == (1, C, (frames - 1) // 4 + 1, 2, 4)
        with torch.no_grad():
            wanted = vae.decode(latents / 0.7241).sample
        shown = (wanted.permute(0, 2, 1, 3, 4) / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(drawn[f"pt-{frames}"], shown, atol=1e-5, rtol=0)


def test_the_index_names_the_file_that_lies_there(folder):
    index = read_json(folder / "model_index.json")
    assert index["vae"] == [video.MODULE_NAME, video.CLASS_NAME]
    assert trust.is_own(folder / "vae" / f"{video.MODULE_NAME}.py")
    assert trust.foreign(folder, index) == [] and trust.foreign_files(folder) == []


def test_this_program_takes_its_own_class(folder):
    index = read_json(folder / "model_index.json")
    with adapter_part(folder, index, torch.float32) as parts:
        assert type(parts["vae"]) is video.AutoencoderDCVideo
        pipe = DiffusionPipeline.from_pretrained(folder, tokenizer=None, text_encoder=None, **parts)
    assert type(pipe.vae) is video.AutoencoderDCVideo
    assert isinstance(pipe.vae, AutoencoderKLWan) and {*dict(pipe.vae.named_children())} == {"encoder", "decoder"}
    assert (pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial) == (4, F)


def test_verify_knows_the_tensors_that_it_must_have(folder):
    expected, problems = expected_tensors(folder / "vae")
    with safe_open(folder / "vae" / "diffusion_pytorch_model.safetensors", "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  no mapping
    assert {name: entry.shape for name, entry in expected.items()} == found and problems == []


def test_changed_code_is_foreign(folder, tmp_path):
    file = folder / "vae" / f"{video.MODULE_NAME}.py"
    own = file.read_bytes()
    try:
        file.write_bytes(own + b"\nprint('more')\n")
        assert trust.foreign(folder, read_json(folder / "model_index.json")) == [
            f"vae/{file.name} differs from every version of it that this program has written"
        ]
    finally:
        file.write_bytes(own)
    crossed = [video.MODULE_NAME, trust.ADAPTER_CLASS]
    assert trust.foreign(folder, {"vae": crossed})  # each name has one class


def test_the_table_knows_the_file_as_it_is():
    """Who changes the code takes a new MODULE_NAME and adds a line; no line is taken away."""
    assert sha256(Path(video.__file__)) in trust.ADAPTERS[video.MODULE_NAME]
    assert trust.class_of(video.MODULE_NAME) == trust.VIDEO_CLASS == video.CLASS_NAME


def test_a_pickled_autoencoder_comes_back(folder):
    vae = load_folder(folder / "vae", "autoencoder", torch.float32)
    again = pickle.loads(pickle.dumps(vae))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in vae.state_dict().items())
