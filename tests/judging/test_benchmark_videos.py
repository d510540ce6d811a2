"""The verb `benchmark` on models that draw videos, and on one whose pipeline takes one prompt in a call."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pretend_device
import pytest
import torch
from bundle.conftest import autoencoder_dc
from families.tiny_models import TINY
from families.tiny_videos import VIDEOS, ltx_vae
from networks.test_random_source import CUT, small

import dcgen_convert
from dcgen_convert.api.order import without_data
from dcgen_convert.checkpoint.headers import read_header
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_json
from dcgen_convert.evaluation.speed import rows as named_rows
from dcgen_convert.families import components, deep_autoencoders
from dcgen_convert.judging import pair as pairs
from dcgen_convert.judging import recording, speed, speed_text
from dcgen_convert.networks.autoencoder_ltx2 import AutoencoderLTX2ForWan

from . import video_bundles
from .test_benchmark import QUICK, bench, seen


@pytest.mark.parametrize("family", ["wan", "wan-image"])
def test_what_is_timed_is_what_the_stock_pipeline_asks_for_of_videos(family, tmp_path):
    """Tokens, inputs and latents of both models, at 48 x 80 px: the shape of wide videos with the area of 64 px."""
    VIDEOS[family].build(tmp_path / "source")
    settings = {"ae": str(video_bundles.autoencoder(tmp_path / "ae")), "resolution": 64}
    pair = pairs.of_source(without_data(tmp_path / "source", settings), torch.float32, 64, random=False)
    assert pair.frames == 77 and pair.size_of(64) == (48, 80)
    pair = replace(pair, frames=5, steps=2, length=VIDEOS[family].length, guidance=2.5)
    one = bench(pair)
    wanted = {"base": 2 * 3 * 5, "converted": 2 * 3 * 5}  # f8 with patch 2, and f16
    assert one._tokens(64) == {**wanted, "ratio": 1.0}
    for key, model in pair.models.items():
        drawing, (passes, _, latents) = one.record(key, 64), seen(model, one.settings, (48, 80))
        assert drawing.passes == len(passes) == 2 * len(drawing.step) and len(drawing.text) == 1
        given = family == "wan-image"
        assert len(drawing.references) == len(drawing.image) == given
        if given:
            told = passes[0][1]["encoder_hidden_states_image"]
            torch.testing.assert_close(drawing.image[0](), told, atol=1e-6, rtol=1e-6)
        tensors = {name: value for name, value in passes[0][1].items() if isinstance(value, torch.Tensor)}
        mine = {name: drawing.step[0].kwargs[name] for name in tensors}
        torch.testing.assert_close(mine, tensors, atol=0, rtol=0)
        assert drawing.step[0].kwargs["hidden_states"].shape[2:] == latents[0].shape[2:]
        assert drawing.decode.args[0].shape == latents[0].shape
        tokens = []
        model.network.blocks[0].register_forward_pre_hook(
            lambda _, args, tokens=tokens: tokens.append(args[0].shape[1])
        )
        drawing.encode_text(), drawing.encode_references(), drawing.one_step()
        assert {*tokens} == {wanted[key]}
        assert drawing.decode()[0].shape == (1, 3, 5, 48, 80)
    if family == "wan-image":
        rows = one.size(64, None)["rows"]
        assert list(rows) == ["text", "image", "encode", "step", "decode", "picture"]
        assert rows["image"]["base"] is rows["image"]["converted"]  # they share it
        encoder = pair.models["base"].pipeline.image_encoder
        assert rows["image"]["base"]["peak_bytes"] >= speed.weights([encoder])
        drawing, seconds = one.record("base", 64), {what: {"base": {"seconds": 2.0**-i}} for i, what in enumerate(rows)}
        assert speed._sum("base", drawing, seconds) == 1 + 0.5 + 0.25 + 2 * 0.125 + 0.0625
    with pytest.raises(InputError, match="8 px are smaller than a token of 16 px"):
        pair.size_of(8)


def note(calls, network, _, kwargs):
    """A hook: what a network is called with."""
    calls.append((network, kwargs))


@pytest.mark.parametrize("family", ["wan-a14b", "wan-image-a14b"])
def test_of_two_networks_the_first_is_timed_and_both_are_counted(family, tmp_path):
    """The second one is of the same size and the stock pipeline asks it for the same, so its steps take as long."""
    VIDEOS[family].build(tmp_path / "source")
    settings = {"ae": str(video_bundles.autoencoder(tmp_path / "ae")), "resolution": 64}
    pair = pairs.of_source(without_data(tmp_path / "source", settings), torch.float32, 64, random=False)
    pair = replace(pair, frames=5, steps=3, length=VIDEOS[family].length, guidance=2.5)
    models = speed_text.facts(pair, torch.device("cpu"))["models"]
    for key, model in pair.models.items():
        first, second = (getattr(model.pipeline, name) for name in ("transformer", "transformer_2"))
        sizes = [[(name, value.shape) for name, value in one.named_parameters()] for one in (first, second)]
        assert sizes[0] == sizes[1] and model.networks == [first, second]
        calls = []
        hooks = [
            network.register_forward_pre_hook(partial(note, calls), with_kwargs=True) for network in model.networks
        ]
        recording.draw(model.pipeline, model.family, (48, 80), bench(pair).settings)
        for hook in hooks:
            hook.remove()
        asked = {network: [kwargs for one, kwargs in calls if one is network] for network in (first, second)}
        assert [network for network, _ in calls] == [first] * len(asked[first]) + [second] * len(asked[second])
        assert len(asked[first]) % 2 == len(asked[second]) % 2 == 0 < len(asked[second]) < 6 == len(calls)
        shapes = [{name: getattr(value, "shape", value) for name, value in kwargs.items()} for _, kwargs in calls]
        assert all(one == shapes[0] for one in shapes)
        drawing = bench(pair).record(key, 64)
        assert (drawing.passes, drawing.steps, [call.function for call in drawing.step]) == (6, 3, [first, first])
        for call, kwargs in zip(drawing.step, asked[first], strict=False):
            tensors = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
            torch.testing.assert_close({name: call.kwargs[name] for name in tensors}, tensors, atol=0, rtol=0)
        both = [value for network in (first, second) for value in network.parameters()]
        assert models[key]["parameters"] == sum(value.numel() for value in both)
        assert models[key]["bytes"] == speed.weights([first, second]) == 2 * speed.weights([first])
    with pretend_device.ready() as device:  # what does not compute stays away from the device
        there = bench(pair, device)
        there.record("converted", 64)
        model = pair.models["converted"]
        assert [next(one.parameters()).device.type for one in model.networks] == [device, "cpu"]
        for part in speed._parts(model):
            part.to("cpu")


def test_the_conversion_of_wan_2_2_is_timed_as_its_bundle_draws(tmp_path):
    """It is given one timestep: the base has one for every 2 x 2 cells, fewer than the tokens of the conversion."""
    VIDEOS["wan-2.2"].build(tmp_path / "source")
    settings = {"ae": str(video_bundles.autoencoder(tmp_path / "ae")), "resolution": 128}
    pair = pairs.of_source(without_data(tmp_path / "source", settings), torch.float32, 128, random=False)
    one = bench(replace(pair, frames=5, steps=1, length=VIDEOS["wan-2.2"].length, guidance=2.5))
    for name, shape in (("base", (1, 2 * 3 * 5)), ("converted", (1,))):
        (step, _) = one.record(name, 128).step
        assert step.kwargs["timestep"].shape == shape
        step()


def test_an_autoencoder_with_eight_frames_per_latent_frame(tmp_path):
    """LTX-2's: 9 frames are 3 latent frames of the base and 2 of the conversion. Its bundle's class is timed."""
    VIDEOS["wan"].build(tmp_path / "source")
    ltx_vae(8, factor=16).save_pretrained(tmp_path / "ae")
    settings = {"ae": str(tmp_path / "ae"), "resolution": 64}
    pair = pairs.of_source(without_data(tmp_path / "source", settings), torch.float32, 64, random=False)
    assert pair.frames == 81 and type(pair.models["converted"].pipeline.vae) is AutoencoderLTX2ForWan
    one = bench(replace(pair, frames=9, steps=1, length=VIDEOS["wan"].length, guidance=2.5))
    assert one._tokens(64) == {"base": 3 * 3 * 5, "converted": 2 * 3 * 5, "ratio": 1.5}
    for key, times in (("base", 3), ("converted", 2)):
        drawing = one.record(key, 64)
        assert drawing.decode.args[0].shape[2] == times and drawing.decode()[0].shape == (1, 3, 9, 48, 80)


@pytest.mark.parametrize("name", ["wan", "wan-a14b"])
def test_a_bundle_is_timed_in_its_own_shape(name, tmp_path):
    bundle = video_bundles.build(name, tmp_path)
    found = dcgen_convert.benchmark(bundle, against=tmp_path / "source", seconds=QUICK)
    (size,) = found.sizes
    assert [size[key] for key in ("resolution", "height", "width", "frames")] == [45, 32, 64, 5]
    assert size["tokens"] == {"base": 2 * 2 * 4, "converted": 2 * 2 * 4, "ratio": 1.0}
    assert list(size["rows"]) == ["text", "step", "decode", "picture"]
    stored = [file for one in ("transformer", "transformer_2") for file in (bundle / one).glob("*.safetensors")]
    count = sum(math.prod(entry.shape) for file in stored for entry in read_header(file)[0].values())
    assert len(stored) == 1 + (name != "wan") and found.models["converted"]["parameters"] == count
    text = found.text()
    assert "32 x 64 px, 5 frames" in text and "whole video" in text and "videos per minute" in text
    kept = read_json(bundle / "dcgen_manifest.json")["metrics"]["benchmark"]
    assert next(what for what, _ in named_rows(kept)).startswith("Time at 32 x 64 px, 5 frames on")


@pytest.mark.parametrize("name", ["wan-1.3b", "wan-2.2-a14b"])
def test_random_weights_of_the_catalogue_need_no_download(name, monkeypatch):
    """With DC-AE-V f32, shrunk: a token of the base is 16 px wide, one of the conversion 32 px."""
    deep = {"block_out_channels": (8, 16, 16, 16, 16, 32), "layers_per_block": (1,) * 6, "chunk_frames": 8}
    layout, config = components.layout_of, deep_autoencoders.config_of
    monkeypatch.setattr(components, "layout_of", lambda entry: small(layout(entry)))
    monkeypatch.setattr(deep_autoencoders, "config_of", lambda entry: {**config(entry), **deep})
    assert "WanTransformer3DModel" in CUT
    resolved = without_data(name, {"ae": "dc-ae-v-f32t4c32"})
    pair = pairs.of_source(resolved, torch.bfloat16, 128, random=True)
    assert pair.side == 640 and pair.size_of(640) == (480, 832) and pair.size_of(128) == (96, 160)
    one = bench(replace(pair, steps=1, length=16, frames=5))
    assert one._tokens(128) == {"base": 2 * 6 * 10, "converted": 2 * 3 * 5, "ratio": 4.0}
    for key in pair.models:
        out = one.record(key, 128).step[0]()[0]
        assert torch.isfinite(out).all() and out.dtype is torch.bfloat16


def test_a_pipeline_that_takes_one_prompt_in_a_call_is_timed_with_one(tmp_path):
    TINY["prx"].build(tmp_path / "source")
    autoencoder_dc(32, 128).save_pretrained(tmp_path / "ae")
    settings = {"ae": str(tmp_path / "ae"), "resolution": TINY["prx"].side}
    resolved = without_data(tmp_path / "source", settings)
    pair = pairs.of_source(resolved, torch.float32, TINY["prx"].side, random=False)
    one = bench(replace(pair, steps=1, length=TINY["prx"].length, guidance=2.5))
    row = one._largest(TINY["prx"].side, {name: {"peak_bytes": 0} for name in pair.models})
    assert {figure["batch"] for figure in row.values()} == {1}
