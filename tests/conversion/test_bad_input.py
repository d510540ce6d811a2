"""Bad input: one sentence, the right exit code, nothing left behind."""

import json
import shutil

import pytest
import torch
from conftest import run_cli, short_settings
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

CONVERT = ["--ae", "tiny-dc-ae-f32", "-o", "bundle", "--run-dir", "run", "-y"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def source(weights, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(weights / "tiny-flux", folder)
    return folder


def refused(tmp_path, *arguments, code=2, says=""):
    done = run_cli(*arguments, cwd=tmp_path)
    assert done.returncode == code, (done.returncode, done.stderr[-1500:])
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr[-1500:]
    assert says in errors[0], errors[0]
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert not (tmp_path / "bundle").exists()


def nan(path):
    tensors = load_file(path)
    tensors["x_embedder.bias"][3] = float("nan")
    tensors["time_text_embed.timestep_embedder.linear_1.weight"][0, 0] = float("inf")
    save_file(tensors, path, {"format": "pt"})


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])


def without_config(path):
    (path.parent / "config.json").unlink()


def pickled(path):
    path.rename(path.with_suffix(".bin"))


def other_class(path):
    config = json.loads((path.parent / "config.json").read_text())
    (path.parent / "config.json").write_text(json.dumps({**config, "_class_name": "UnknownTransformer"}))


def lost_tensor(path):
    tensors = load_file(path)
    del tensors["norm_out.linear.weight"]
    save_file(tensors, path, {"format": "pt"})


DAMAGE = [
    (nan, "time_text_embed.timestep_embedder.linear_1.weight"),
    (truncated, "truncated"),
    (without_config, "config.json"),
    (pickled, "pickle"),
    (other_class, "UnknownTransformer"),
    (lost_tensor, "norm_out.linear.weight"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
def test_damaged_sources(source, tmp_path, damage, says):
    damage(source / "transformer" / WEIGHTS)
    recipe = ["--recipe", "tiny-flux", *short_settings(**{"data.count": 8})]
    refused(tmp_path, "convert", str(source), *CONVERT, *recipe, says=says)


def test_autoencoder_whose_channels_disagree_with_its_config(weights, tmp_path):
    folder = tmp_path / "ae"
    shutil.copytree(weights / "tiny-dc-ae-f32", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "latent_channels": 64}))
    arguments = ["tiny-flux", "--ae", str(folder), *CONVERT[2:], *short_settings(**{"data.count": 8})]
    refused(tmp_path, *arguments, says="ae")


def test_autoencoder_whose_scale_is_wrong(weights, tmp_path):
    folder = tmp_path / "ae"
    shutil.copytree(weights / "tiny-dc-ae-f32", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "scaling_factor": 3 * config["scaling_factor"]}))
    arguments = [
        "tiny-flux",
        "--ae",
        str(folder),
        *CONVERT[2:],
        *short_settings(**{"data.count": 8, "latents.scale_tolerance": 0.3}),
    ]
    refused(tmp_path, *arguments, says="disagrees with the measured")


def test_broken_picture_beyond_the_limit_is_named(tmp_path):
    from dcgen_convert.data.images import to_image
    from dcgen_convert.tiny import world

    folder = tmp_path / "pictures"
    folder.mkdir()
    labels = world.sample_labels(8, 0)
    for i, (row, picture) in enumerate(zip(labels, world.draw(labels, 0), strict=True)):
        to_image(picture).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(world.caption(row))
    (folder / "3.png").write_bytes(b"\x89PNG broken")
    data = ["--data", str(folder)]
    refused(
        tmp_path,
        "tiny-flux",
        *CONVERT,
        *data,
        *short_settings(**{"data.max_broken": 0}),
        says="1 of 8 pictures cannot be read",
    )
    within = run_cli(
        "tiny-flux", *CONVERT, *data, *short_settings(**{"data.max_broken": 0.2}), "--until", "latents", cwd=tmp_path
    )
    assert within.returncode == 0 and "3.png cannot be read" in within.stderr, within.stderr[-1500:]


def test_output_that_is_taken(tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "precious.txt").write_text("keep me")
    for force in ([], ["--force"]):
        done = run_cli("tiny-flux", *CONVERT, *force, *short_settings(), cwd=tmp_path)
        assert done.returncode == 2 and "bundle" in done.stderr
        assert (tmp_path / "bundle" / "precious.txt").read_text() == "keep me"


def test_names_and_sizes(tmp_path):
    refused(tmp_path, "tiny-flxu", *CONVERT, says="tiny-flux")
    refused(tmp_path, "tiny-flux", "--ae", "tiny-dc-ae-f23", says="tiny-dc-ae-f32")
    refused(tmp_path, "tiny-flux", *CONVERT, "--resolution", "100", says="100")
    refused(tmp_path, "tiny-flux", *CONVERT, "--set", "adapt.emma=1", says="ema")


def test_widths_that_no_4_bit_format_holds_are_refused_before_anything_starts(source, tmp_path):
    config = json.loads((source / "transformer" / "config.json").read_text())
    torch.manual_seed(0)
    FluxTransformer2DModel.from_config({**config, "num_attention_heads": 3}).save_pretrained(source / "transformer")
    arguments = ["convert", str(source), "--recipe", "tiny-flux", *CONVERT, "--quantize", "int4"]
    refused(tmp_path, *arguments, says="transformer_blocks.*.attn.to_q")
    assert not list((tmp_path / "run").glob("*/"))  # a log at most


@pytest.mark.parametrize(
    ("name", "autoencoder", "prompts", "says"),
    [
        ("tiny-flux", "tiny-dc-ae-f32", "tiny-videos", "the tiny world has no caption"),
        ("tiny-wan", "tiny-dc-ae-v", "tiny-world", "the tiny world has no video"),
    ],
)
def test_prompts_that_the_judge_cannot_read_are_refused_before_any_work(tmp_path, name, autoencoder, prompts, says):
    """The last stage would find it out, after the whole training."""
    own = ["--set", f"data.prompts={prompts}", "--set", "data.count=4", "--ae", autoencoder, *CONVERT[2:]]
    refused(tmp_path, name, *own, says=says)
    assert not (tmp_path / "run" / "surgery").exists()
