"""Wan: what the tests of every family do not say of latents with a third axis, (T, h, w)."""

import copy
import re
import shutil
from types import SimpleNamespace

import diffusers
import pytest
import torch
import torch.nn.functional as F
from judging import video_bundles

from dcgen_convert import families
from dcgen_convert.bundle.layout import BundleParts, model_index
from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.core.errors import InputError, RecipeError
from dcgen_convert.core.files import read_json
from dcgen_convert.data.buckets import nearest
from dcgen_convert.data.cache import LatentCache, write_captions, write_index, write_shard
from dcgen_convert.families.base import FPS_KEY
from dcgen_convert.families.grid import STILL, Grid, Time
from dcgen_convert.judging import painter
from dcgen_convert.networks import autoencoders
from dcgen_convert.planning.impossible import require_possible
from dcgen_convert.planning.shapes import shapes_of
from dcgen_convert.planning.structures import structure
from dcgen_convert.recipe import geometry
from dcgen_convert.recipe.geometry import bucket_sizes
from dcgen_convert.recipe.identity import Identity
from dcgen_convert.recipe.loading import load
from dcgen_convert.recipe.schema import Adapt
from dcgen_convert.recipe.videos import drawn_frames, frames_of
from dcgen_convert.stages import gap, grid, preview
from dcgen_convert.stages.align_embedder import Problem
from dcgen_convert.svdquant.targets import plan_targets
from dcgen_convert.train import objective, phases
from dcgen_convert.train.meter import meter_of

from .tiny_parts import Pairs
from .tiny_videos import VIDEOS, ltx_vae, video_vae

WAN = families.get("wan")
FRAMES, SIDES = 3, (4, 6)  # of a latent
SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 64,
    "num_layers": 2,
    "patch_size": [1, 2, 2],
    "in_channels": 16,
    "out_channels": 16,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return diffusers.WanTransformer3DModel(**SMALL).double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(2)
    return (
        diffusers.WanTransformer3DModel(**WAN.convert_config(SMALL, 32, 32, 480)).double().eval().requires_grad_(False)
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan") / "source"
    VIDEOS["wan"].build(folder)
    return load_source("wan", str(folder))


def latents(channels, *sides, rows=1):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, channels, *sides, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("patch", [1, 2])
def test_tokens_stand_frame_by_frame_and_are_undone(patch):
    z = torch.arange(2 * 3 * FRAMES * 4 * 6, dtype=torch.float32).reshape(2, 3, FRAMES, *SIDES)
    tokens = WAN.tokens(z, patch)
    rows, columns = 4 // patch, 6 // patch
    assert tokens.shape == (2, FRAMES * rows * columns, 3 * patch**2)
    assert WAN.grid(z.shape[2:], patch) == (FRAMES, rows, columns)
    # frame 2, row 1, column 0; the last number is the last channel's last cell
    assert tokens[1, (2 * rows + 1) * columns, 0] == z[1, 0, 2, patch, 0]
    assert tokens[0, -1, -1] == z[0, 2, 2, 3, 5]
    assert torch.equal(WAN.untokens(tokens, z.shape[2:], patch, WAN.in_order), z)
    head = WAN.untokens(tokens, z.shape[2:], patch)  # the head's numbers: the channel is the last
    assert head[1, 2, 1, 0, 0] == tokens[1, rows * columns, 2]


def test_the_target_of_the_embedder_is_the_bases_convolution_averaged_over_two_by_two(model, student):
    """AvgPool3d (1, 2, 2) of the convolution itself (arXiv 2509.25182), rows (f h w); float64, to 1e-12."""
    pairs = Pairs((16, FRAMES, 8, 12), (32, FRAMES, 2, 3), 8, dtype=torch.float64)
    base, deep = (found["z"] for found in pairs.pairs(slice(None)))
    problem = Problem(SimpleNamespace(family=WAN), model, student, pairs, "average")
    x, y = problem.rows(list(range(8)))
    conv = model.patch_embedding(base)
    wanted = F.avg_pool3d(conv, (1, 2, 2)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(y, wanted, atol=1e-12, rtol=1e-12)
    assert torch.equal(x, deep.flatten(2).transpose(1, 2))
    # bilinear pooling goes the other way: the new latents onto the base's grid
    problem.pooling = "bilinear"
    x, y = problem.rows([0])
    assert torch.equal(y, conv[:1].flatten(2).transpose(1, 2))
    wanted = torch.stack([F.interpolate(z, size=(4, 6), mode="bilinear") for z in deep[:1].unbind(2)], dim=2)
    torch.testing.assert_close(x, wanted.flatten(2).transpose(1, 2), atol=1e-12, rtol=1e-12)


def test_the_closed_form_of_the_embedder_is_the_least_squares_optimum(model, student):
    """Against a dense solver in float64, to 1e-10 of the error."""
    pairs = Pairs((16, FRAMES, 8, 12), (32, FRAMES, 2, 3), 24, dtype=torch.float64)
    problem = Problem(SimpleNamespace(family=WAN), model, student, pairs, "average")
    weight, bias = problem.equations(5).solve(0.0, bias=True)
    x, y = (rows.flatten(0, 1) for rows in problem.rows(list(range(24))))
    design = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    wanted = torch.linalg.lstsq(design, y).solution
    best = (design @ wanted - y).square().mean().item()
    assert (x @ weight.double().T + bias.double() - y).square().mean().item() == pytest.approx(best, rel=1e-10)


def test_maps_of_blocks_are_those_of_the_convolution_and_gaps_are_pooled_over_the_picture_alone(model):
    z = latents(16, FRAMES, *SIDES, rows=2)
    conv = model.patch_embedding(z)
    found = WAN.block_map(conv.flatten(2).transpose(1, 2), (FRAMES, 2, 3), {})
    assert torch.equal(found, conv)
    old, new = latents(5, FRAMES, 4, 6), latents(5, FRAMES, 2, 3) * 0.5
    goal = F.avg_pool3d(old, (1, 2, 2))
    wanted = torch.stack([(new - goal).square().sum(), goal.square().sum()])
    torch.testing.assert_close(gap.squares(old, new), wanted, rtol=1e-6, atol=0)


def test_a_converted_network_takes_one_timestep_and_none_for_every_two_by_two_cells(student):
    """Those of `expand_timesteps` are all t when Wan 2.2 TI2V draws from text: as many as tokens give the same, to
    1e-10. The stock pipeline makes a quarter of them, too few for the tokens of a converted network.
    """
    z, text = latents(32, FRAMES, *SIDES), {"encoder_hidden_states": latents(7, 16)}
    t = torch.tensor([0.7], dtype=torch.float64)
    wanted = WAN.predict(student, z, t, text)
    cells = z[:, 0].new_full(z[:, 0].shape, 700)  # as the pipeline does it: a mask of the latent's cells times t
    each, fewer = cells.flatten(1), cells[:, :, ::2, ::2].flatten(1)
    torch.testing.assert_close(student(z, each, return_dict=False, **text)[0], wanted, atol=1e-10, rtol=1e-10)
    with pytest.raises(RuntimeError, match="must match the size"):
        student(z, fewer, return_dict=False, **text)


def test_losses_broadcast_one_t_per_video(student):
    """Against the same loss of each video alone."""
    z0, eps = latents(32, 2, 2, 2, rows=3).float(), latents(32, 2, 2, 2, rows=3).float().flip(0)
    t, text = torch.tensor([0.2, 0.5, 0.9]), {"encoder_hidden_states": latents(7, 16, rows=3).float()}
    draws = objective.Draws(eps, t, torch.ones(3), torch.tensor([False, True, False]))
    null = {"encoder_hidden_states": torch.zeros(1, 7, 16)}
    network = copy.deepcopy(student).float()

    def velocity(z, t, text, guidance):
        return objective.velocity(WAN, network, z, t, text, guidance)

    def consistency(z0, text, draws):
        return objective.consistency_loss(WAN, network, z0, text, draws, null, velocity, 0.5)

    def flow(z0, text, draws):
        return objective.flow_loss(WAN, network, z0, text, draws, null)

    def nothing(z0, text, draws):
        return objective.nothing_loss(WAN, z0, text, draws)

    for i in range(3):
        wanted = (1 - t[i]) * z0[i] + t[i] * eps[i]
        assert torch.equal(objective.noised(z0, eps, t)[i], wanted)
    for loss in (flow, consistency, nothing):
        each = []
        for i in range(3):
            own = objective.Draws(*(value[i : i + 1] for value in vars(draws).values()))
            each.append(loss(z0[i : i + 1], {key: value[i : i + 1] for key, value in text.items()}, own))
        torch.testing.assert_close(loss(z0, text, draws), torch.stack(each).mean(), rtol=1e-5, atol=1e-6)


def test_a_cache_holds_videos_of_several_lengths(tmp_path):
    """Tables of several numbers of frames are spans of their own, as sizes are; each row is read from its own."""
    tables = {"64-a": latents(4, 2, 2, 2, rows=3), "64-b": latents(4, 5, 2, 2, rows=5)}
    for name, z in tables.items():
        write_shard(tmp_path, f"target-{name}", 0, {"z": z.float()})
    write_shard(tmp_path, "text", 0, {"encoder_hidden_states": torch.zeros(8, 7, 16)})
    write_shard(tmp_path, "null", 0, {"encoder_hidden_states": torch.zeros(1, 7, 16)})
    write_captions(tmp_path, ["a fox"] * 8)
    write_index(tmp_path, 8, 8, [4], None, {64: [["64-a", 64, 64, 0, 3], ["64-b", 64, 64, 3, 8]]})
    cache = LatentCache(tmp_path, 64)
    assert cache.shapes == [(4, 2, 2, 2), (4, 5, 2, 2)] and [*map(len, cache.spans)] == [3, 5]
    assert torch.equal(cache.batch([6])[0][0], tables["64-b"][3].float())
    # what the shift and the meter count of such a video
    config = WAN.convert_config(SMALL, 32, 4, 64)
    adapt = Adapt(shift="flux2", phases=[{"resolution": 64, "steps": 1}])
    assert phases.sampling_of(WAN, adapt, cache.shapes[1], config, {}).shift == (4 * 5 * 2 * 2 / 4096) ** 0.5
    network = SimpleNamespace(config=config)
    assert meter_of(WAN, network, cache.shapes[1], cache.batch([6])[1], adapt, False).tokens == 5 * 2 * 2 + 7


@pytest.mark.parametrize("frames, latent", [(1, 1), (5, 2), (9, 3)])
def test_the_autoencoder_sees_all_frames_of_a_video(frames, latent, tmp_path):
    """Against the diffusers class and the statistics of its config; 4 frames to a latent frame after the first."""
    vae = video_vae(8, 16)
    vae.save_pretrained(tmp_path)
    codec, pixels = autoencoders.load(tmp_path), torch.rand(2, 3, frames, 32, 48) * 2 - 1
    z = codec.encode(pixels)
    assert (codec.axes, z.shape) == (3, (2, 16, latent, 4, 6))
    mean, std = (torch.tensor(vae.config[key]).view(-1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    with torch.no_grad():
        raw = vae.encode(pixels).latent_dist.mode()
        torch.testing.assert_close(z, (raw - mean) / std, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(codec.decode(z), vae.decode(raw).sample.clamp(-1, 1), atol=1e-4, rtol=1e-4)
    assert torch.equal(grid.shown(WAN, pixels[0]), pixels[0, :, frames // 2])


def test_what_is_no_text_to_video_model_of_wan():
    config = {"_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "in_channels": 16, "out_channels": 16}
    assert families.recognise(config) is WAN and WAN.patch(config, 16) == 2
    # one that is given a picture too, without an image encoder (Wan 2.2), or the last frame
    pictured = {**config, "in_channels": 36}
    assert families.recognise({**pictured, "image_dim": 1280}) is families.get("wan-image")
    assert families.recognise(pictured) is None
    assert families.recognise({**pictured, "image_dim": 1280, "pos_embed_seq_len": 514}) is None
    with pytest.raises(InputError, match="patches of 2 x 2 x 2 cells"):
        WAN.patch({**config, "patch_size": [2, 2, 2]}, 16)
    published = {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 5.0}
    WAN.check_scheduler({**published, "prediction_type": "flow_prediction"})
    WAN.check_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0})
    assert WAN.shift(7800, published) == 5.0
    with pytest.raises(InputError, match="UniPCMultistepScheduler, is set to another prediction"):
        WAN.check_scheduler({**published, "prediction_type": "epsilon"})


def test_what_a_model_with_two_networks_cannot_have(tmp_path):
    """And what to do in its place."""
    VIDEOS["wan-a14b"].build(tmp_path / "source")
    source = load_source("mine", str(tmp_path / "source"))
    settings = {
        "2 networks, each with a LoRA": ({"merge_lora": False}, [], "--merge-lora adds it to the weights"),
        "2 networks, and consistency": ({}, ["adapt.phases.*.consistency=0.5"], "set the phases' consistency to 0"),
    }
    for words, (flags, sets, hint) in settings.items():
        resolved = load("wan-2.2-a14b-480p", flags=flags, sets=[*sets, "data.kind=folder", "data.path=x"])
        with pytest.raises(RecipeError, match=words) as told:
            require_possible(resolved.recipe, resolved.identity)
        assert told.value.hint == hint
    for more in ({"loras": ["x.safetensors"]}, {"base": str(tmp_path / "source")}):
        with pytest.raises(
            InputError, match="several networks, and this program can fuse, rename or complete none"
        ) as told:
            load_source("mine", str(tmp_path / "source"), home=tmp_path / "run", offline=True, **more)
        assert "without --lora and --base" in told.value.hint
    with pytest.raises(InputError, match="no linear of this wan-a14b model can be quantised to 4 bits: ") as told:
        plan_targets(source.family, source.config, None)
    assert told.value.hint == "keep it in 16 bits (convert: --quantize none)"


def test_a_converted_pipeline_in_memory_is_set_as_its_bundle_is(tmp_path):
    """Of Wan 2.2 TI2V: without a timestep for every 2 x 2 cells, which the source has."""
    VIDEOS["wan-2.2"].build(tmp_path / "source")
    source = load_source("wan-2.2", str(tmp_path / "source"))
    scheduler = read_json(source.root / "scheduler" / "scheduler_config.json")
    recipe = SimpleNamespace(latents=SimpleNamespace(scale_override=None))
    job = SimpleNamespace(family=WAN, source=source, target=video_bundles.autoencoder(tmp_path / "ae"), recipe=recipe)
    job.dtype, job.scheduler = torch.float32, scheduler
    torch.manual_seed(1)
    network = diffusers.WanTransformer3DModel(**WAN.convert_config(SMALL, video_bundles.F, video_bundles.C, 64))
    found = preview.converted_pipeline(job, network.eval())
    parts = BundleParts(WAN, source.root, tmp_path, autoencoder=job.target, scheduler=scheduler)
    index = model_index(parts)
    assert source.index["expand_timesteps"] and not found.config["expand_timesteps"]
    assert {key: found.config[key] for key in ("expand_timesteps", "boundary_ratio")} == {
        key: index[key] for key in ("expand_timesteps", "boundary_ratio")
    }


def test_frames_a_second_are_those_of_the_family_or_what_the_source_states():
    for name, index, fps in (
        ("wan", {}, 16),
        ("wan", {"expand_timesteps": False}, 16),
        ("wan", {"expand_timesteps": True}, 24),
        ("wan", {"expand_timesteps": True, FPS_KEY: 12.5}, 12.5),
        ("wan-image", {FPS_KEY: 8}, 8),
        ("sana-video", {}, 16),
        ("flux", {FPS_KEY: 8}, 0),
    ):
        assert families.get(name).frames_per_second(index) == fps, (name, index)
    for wrong in ("16", True, 0, -1, float("nan"), 10_000, None):
        with pytest.raises(InputError, match="model_index.json says _frames_per_second"):
            WAN.frames_per_second({FPS_KEY: wrong})
    known = {name: Identity(name, offline=True).fps for name in ("wan-1.3b", "wan-2.2-5b", "sana-video-2b", "flux-dev")}
    assert known == {"wan-1.3b": 16, "wan-2.2-5b": 24, "sana-video-2b": 16, "flux-dev": 0}


def test_lora_leaves_the_cross_attention_alone(source):
    names = [layer.name for layer in structure(source.config).layers]
    adapted = [name for name in names if re.fullmatch(WAN.lora_targets, name)]
    assert adapted[:6] == [
        *(f"blocks.0.attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        "blocks.0.ffn.net.0.proj",
        "blocks.0.ffn.net.2",
    ]
    assert len(adapted) == 6 * source.config["num_layers"]


def test_what_takes_pictures_alone_refuses(source, tmp_path):
    with pytest.raises(InputError, match="is a wan model, which draws videos") as caught:
        painter.opened("wan", str(source.root), None, tmp_path)
    assert "give a model that draws pictures" in caught.value.hint
    with pytest.raises(InputError, match="no linear of this wan model can be quantised to 4 bits: `nunchaku_lite`"):
        plan_targets(WAN, source.config, None)


def test_the_recipe_of_videos(source, tmp_path):
    given = {"source": str(source.root), "ae": "dc-ae-v-f32t4c32", "data.path": str(tmp_path)}

    def loaded(**changes):
        return load("wan-1.3b-480p", flags={**given, **changes}).recipe

    assert frames_of(loaded(), WAN, Time(4)) == 80 and frames_of(loaded(**{"data.frames": 8}), WAN, Time(4)) == 8
    assert [drawn_frames(frames, WAN.time) for frames in (80, 8, 81, 0)] == [81, 9, 81, 1]
    with pytest.raises(RecipeError, match="data.frames is 81, and 4 frames make one latent frame") as caught:
        loaded(**{"data.frames": 81})
    assert caught.value.hint == "--set data.frames=80 or 84"
    with pytest.raises(RecipeError, match="data.frames is 2,") as caught:
        loaded(**{"data.frames": 2})
    assert caught.value.hint == "--set data.frames=4"
    with pytest.raises(RecipeError, match="tiny-dc-ae-f32 is for pictures, and .* draws videos"):
        loaded(ae="tiny-dc-ae-f32")
    with pytest.raises(RecipeError, match="latents.normalise is set, which rewrites an autoencoder for pictures"):
        loaded(**{"latents.normalise": "channel"})
    assert loaded(**{"adapt.weighting": "bell"}).adapt.weighting == "bell"
    with pytest.raises(RecipeError, match="adapt.weighting is bell, and the objective guidance-corrected has no"):
        load("tiny-flux", flags={"adapt.weighting": "bell"})
    with pytest.raises(RecipeError, match="data.frames is 8, and tiny-flux draws pictures"):
        load("tiny-flux", flags={"data.frames": 8})
    assert frames_of(load("tiny-flux").recipe, families.get("flux"), STILL) == 0


def test_the_recipe_of_videos_for_an_autoencoder_with_a_first_frame_alone(source, tmp_path):
    """LTX-2's. What it is refused for, each with one sentence; and what `plan` says of its tokens and its memory."""
    ltx_vae(8).save_pretrained(tmp_path / "ae")
    given = {"source": str(source.root), "ae": str(tmp_path / "ae"), "data.path": str(tmp_path)}

    def loaded(**changes):
        return load("wan-1.3b-480p", flags={**given, **changes})

    found = loaded()
    assert geometry.training_frames(found.recipe, found.identity) == 81
    assert geometry.new_grid(found.recipe.ae) == Grid(32, 8, 1, Time(8, alone=True))
    with pytest.raises(RecipeError, match="data.frames is 80, and 8 frames make one .* after a first one") as caught:
        loaded(**{"data.frames": 80})
    assert caught.value.hint == "--set data.frames=73 or 81"
    with pytest.raises(RecipeError, match="latents.scale_override is set, and .* holds mean and standard deviation"):
        loaded(**{"latents.scale_override": 0.5})
    with pytest.raises(RecipeError, match="align_embedder.target is home, but a latent frame .* has 8 frames and one"):
        loaded(**{"align_embedder.target": "home"})
    with pytest.raises(RecipeError, match="align_embedder.pooling is bilinear, .* has fewer latent frames"):
        loaded(**{"align_embedder.pooling": "bilinear"})
    sizes = shapes_of(found.recipe, found.identity)
    side = found.recipe.adapt.phases[-1].resolution
    assert sizes.frames == sizes.drawn_frames == 81
    assert sizes.drawn(sizes.new, side) == 11 * (side // 32) ** 2
    assert sizes.drawn(sizes.old, side) == 21 * (side // 16) ** 2
    numbers = sizes.latent_numbers([side])
    assert numbers == 11 * 8 * (side // 32) ** 2 + 21 * 16 * (side // 8) ** 2
    VIDEOS["wan-image"].build(tmp_path / "image")
    with pytest.raises(RecipeError, match="a wan-image model reads a mask with a number for each of the 4 frames"):
        loaded(source=str(tmp_path / "image"))
    shutil.copytree(source.root, tmp_path / "deep")
    shutil.rmtree(tmp_path / "deep" / "vae")
    shutil.copytree(tmp_path / "ae", tmp_path / "deep" / "vae")
    with pytest.raises(RecipeError, match="their tokens do not meet in time"):
        loaded(source=str(tmp_path / "deep"), ae="dc-ae-v-f32t4c32")


def test_what_a_bundle_draws_by_default_is_the_bucket_of_wide_videos(source):
    """As the authors trained, and the nearest to 720 x 1280 px that has whole tokens."""
    height, width = WAN.shape
    grids = Grid(8, 16, 2), Grid(32, 32, 1)
    for side, size in ((640, (480, 832)), (960, (704, 1280))):
        assert nearest(bucket_sizes(WAN, source.config, *grids, side), width, height) == size
