"""Wan from a picture: condition and mask, and the embedder that reads them."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
import torch.nn.functional as F

from dcgen_convert import families
from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.core.errors import InputError, ResourceError
from dcgen_convert.core.pixels import to_image
from dcgen_convert.families import cleaning
from dcgen_convert.families.base import REFERENCE
from dcgen_convert.networks import autoencoders, pipelines
from dcgen_convert.networks.autoencoder_dc_video import AutoencoderDCVideo
from dcgen_convert.recipe.schema import Adapt
from dcgen_convert.stages.align_embedder import Problem
from dcgen_convert.train.meter import meter_of

from .tiny_parts import Pairs, reference_pixels
from .tiny_videos import VIDEOS

WAN, FRAMES = families.get("wan-image"), 3
SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 64,
    "num_layers": 1,
    "patch_size": [1, 2, 2],
    "in_channels": 36,
    "out_channels": 16,
    "image_dim": 16,
    "added_kv_proj_dim": 48,
}


def network(config, seed):
    torch.manual_seed(seed)
    return diffusers.WanTransformer3DModel(**config).double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan-image") / "source"
    VIDEOS["wan-image"].build(folder)
    source = load_source("wan-image", str(folder))
    return pipelines.load_pipeline(source, torch.float32), source


@torch.no_grad()
def test_condition_and_mask_are_those_of_the_stock_pipeline(pipeline):
    """From the pixels of the reference to the channels behind z, to 1e-5."""
    stock, source = pipeline
    pixels = reference_pixels([(64, 48)])[0][None]
    size = dict(height=64, width=48, num_frames=9)
    z, wanted = stock.prepare_latents(pixels, 1, 16, **size, dtype=torch.float32, device="cpu")
    codec = autoencoders.load(source.vae)
    reference = codec.encode(WAN.reference_video(pixels, 9, first=1))
    found = WAN.inputs(z, {REFERENCE: reference})
    assert found.shape == (1, 36, 3, 8, 6) and torch.equal(found[:, :16], z)
    torch.testing.assert_close(found[:, 16:], wanted, atol=1e-5, rtol=1e-5)


def test_several_prompts_are_drawn_one_by_one_in_all_their_frames(pipeline):
    """The stock pipeline gives its picture to every prompt of a call; each is as it is drawn alone, to 1e-5."""
    stock, source = pipeline
    given, settings = [reference_pixels([(32, 48)]), reference_pixels([(32, 48)])], dict(steps=1, guidance=1.0)
    settings |= {"side": 32, "width": 48, "frames": 5, "length": 512}
    both = pipelines.draw(source.family, stock, ["a", "b"], [1, 2], **settings, references=given)
    assert both.shape == (2, 3, 5, 32, 48)
    alone = pipelines.draw(source.family, stock, ["b"], [2], **settings, references=given[1:])
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=0)


def test_mask_where_four_frames_are_the_reference():
    """DC-AE-V has no first frame of its own: a mask of 1 for frames 0 to 3, viewed as latent frames, is the same."""
    pixels = reference_pixels([(6, 4)])[0][None]
    video = WAN.reference_video(pixels, 12, first=4)
    assert video.shape == (1, 3, 12, 6, 4) and not video[:, :, 4:].any()
    assert all(torch.equal(video[:, :, frame], pixels) for frame in range(4))
    frames = torch.zeros(1, 12, 2, 2)
    frames[:, :4] = 1
    z = torch.randn(1, 8, 3, 2, 2)
    mask = WAN.inputs(z, {REFERENCE: z})[:, 8:12]
    assert torch.equal(mask, frames.view(1, 3, 4, 2, 2).transpose(1, 2))


@torch.no_grad()
def test_the_bundle_s_condition_is_that_of_the_training(pipeline, tmp_path):
    """The stock pipeline with the bundle's autoencoder makes of 9 frames what the latents hold of 12: to 1e-5."""
    stock, _ = pipeline
    torch.manual_seed(0)
    sizes = {"latent_channels": 8, "block_out_channels": (8, 16, 16, 16, 32), "layers_per_block": (1,) * 5}
    AutoencoderDCVideo(**sizes, chunk_frames=8, scaling_factor=0.7).save_pretrained(tmp_path)
    codec = autoencoders.load(tmp_path)
    own = AutoencoderDCVideo.from_pretrained(tmp_path, **WAN.vae_config({}))
    bundle = diffusers.WanImageToVideoPipeline(**{**stock.components, "vae": own})
    pixels = reference_pixels([(64, 48)])[0][None]
    size = dict(height=64, width=48, num_frames=9)
    z, wanted = bundle.prepare_latents(pixels, 1, 8, **size, dtype=torch.float32, device="cpu")
    found = WAN.inputs(z, {REFERENCE: codec.encode(WAN.reference_video(pixels, 12, first=4))})
    assert found.shape == (1, 20, 3, 4, 3) and torch.equal(found[:, :8], z)
    torch.testing.assert_close(found[:, 8:], wanted, atol=1e-5, rtol=1e-5)
    plain = diffusers.WanImageToVideoPipeline(**{**stock.components, "vae": codec.model})
    _, other = plain.prepare_latents(pixels, 1, 8, **size, dtype=torch.float32, device="cpu")
    assert (other - wanted).abs().max() > 0.01  # without `first_alone` the picture is one frame of four


def test_the_whole_embedder_is_aligned():
    """68 channels against the base's convolution of its 36, averaged over 2 x 2; the optimum to 1e-10 in float64."""
    base, new = network(SMALL, 1), network(WAN.convert_config(SMALL, 32, 32, 480), 2)
    assert base.patch_embedding.in_channels == 36 and new.patch_embedding.in_channels == 68
    assert new.proj_out.out_features == 32
    pairs = Pairs((16, FRAMES, 8, 12), (32, FRAMES, 2, 3), 40, references=1, dtype=torch.float64)
    problem = Problem(SimpleNamespace(family=WAN), base, new, pairs, "average")
    x, y = problem.rows(list(range(40)))
    old, deep = pairs.pairs(slice(None))
    mask = torch.zeros(40, 4, FRAMES, 8, 12, dtype=torch.float64)
    mask[:, :, 0] = 1
    read = base.patch_embedding(torch.cat([old["z"], mask, old[REFERENCE]], dim=1))
    torch.testing.assert_close(y, F.avg_pool3d(read, (1, 2, 2)).flatten(2).transpose(1, 2), atol=1e-12, rtol=1e-12)
    wanted = torch.cat([deep["z"], mask[..., :2, :3], deep[REFERENCE]], dim=1)
    assert torch.equal(x, wanted.flatten(2).transpose(1, 2))
    weight, bias = problem.equations(7).solve(0.0, bias=True)
    x, y = x.flatten(0, 1), y.flatten(0, 1)
    design = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    best = (design @ torch.linalg.lstsq(design, y, driver="gelsd").solution - y).square().mean().item()
    assert (x @ weight.T + bias - y).square().mean().item() == pytest.approx(best, rel=1e-10)
    # the four channels of the mask are always equal: none of their weights runs away
    assert weight[:, 32:36].abs().max() < 10 * base.patch_embedding.weight.abs().max() * 16


def test_the_references_channels_are_no_tokens():
    z, text = torch.zeros(1, 4, 5, 2, 2), torch.zeros(1, 7, 16)
    condition = {"encoder_hidden_states": text, REFERENCE: z}
    config = SimpleNamespace(config=WAN.convert_config(SMALL, 32, 4, 64))
    adapt = Adapt(phases=[{"resolution": 64, "steps": 1}])
    assert meter_of(WAN, config, z.shape[1:], condition, adapt, False).tokens == 5 * 2 * 2 + 7


def test_what_its_text_needs(pipeline, monkeypatch):
    stock, _ = pipeline
    seen = [[to_image(reference_pixels([(64, 48)])[0])]]
    with pytest.raises(InputError, match="takes 512 text tokens, not 256"):
        WAN.encode_seen(stock, ["a fox"], 256, seen)
    with pytest.raises(TypeError, match="encode_seen"):
        WAN.encode_text(stock, ["a fox"], 512)
    monkeypatch.setattr(cleaning, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="ftfy, which is not installed"):
        WAN.encode_seen(stock, ["a fox"], 512, seen)
    with pytest.raises(ResourceError, match="PRXPipeline cleans prompts"):
        families.get("prx").encode_text(stock, ["a fox"], 16)
