"""How many pictures are worked on together: counted bytes per pixel, halving where memory is short, what is said."""

from itertools import chain

import diffusers
import pytest
import torch
from conftest import WEIGHTS
from diffusers import AutoencoderKLWan
from planning.test_census import Census

from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import ResourceError, explain, is_out_of_memory
from dcgen_convert.evaluation.metrics import psnr
from dcgen_convert.families import catalog, components, deep_autoencoders, pixel_memory
from dcgen_convert.networks import at_once, autoencoders, pipelines, tiles
from dcgen_convert.networks.autoencoder_dc_video import AutoencoderDCVideo
from dcgen_convert.stages import memory, tasks
from dcgen_convert.stages.job import Job
from dcgen_convert.tiny import world

MAKES = ["dc-ae-f32", "dc-ae-f64", "dc-ae-f64-in", "dc-ae-f128", "dc-ae-f32-sana", "dc-ae-lite"]
SHORT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def published(name):
    """config.json of a published autoencoder."""
    if name == "kl-flux":
        return components.layout_of(catalog.SOURCES["flux-krea"]).parts["vae"].config
    return deep_autoencoders.config_of(catalog.AUTOENCODERS[name])


class Copying(Census):
    """Counts the input of a convolution in float32 twice while it runs, as a CPU keeps it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.aten.convolution.default and out.dtype is torch.float32:
            self.peak = max(self.peak, self.now + args[0].nbytes)
        return out


def counted(model, side, *frames):
    """Bytes per px of (encode, decode) at their peak: every tensor that lives, on the meta device."""
    pixels = torch.empty(1, 3, *frames, side, side, dtype=model.dtype, device="meta")
    with torch.no_grad():
        with Copying("meta") as census:
            encoded = model.encode(pixels)
            latent = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
        del encoded
        peaks = [census.peak / side**2]
        with Copying("meta") as census:
            model.decode(latent)
    return [*peaks, census.peak / side**2]


def on_meta(config, dtype=torch.float32):
    with torch.device("meta"):
        options = {key: value for key, value in config.items() if not key.startswith("_")}
        return getattr(diffusers, config["_class_name"])(**options).to(dtype).eval()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["kl-flux", *MAKES])
def test_bytes_per_pixel_are_those_of_the_published_sizes(name, dtype):
    """At most what the table says, and at least nine tenths of it."""
    config, side = published(name), 512 if name == "kl-flux" else 1024
    model = on_meta(config, pipelines.DTYPES[dtype])
    for found, stated in zip(counted(model, side), pixel_memory.bytes_per_pixel(config)[dtype], strict=True):
        assert 0.9 * stated <= found <= 1.02 * stated


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "kind, frames, options",
    [
        ("AutoencoderKLQwenImage", [1], {}),
        (
            "AutoencoderKLHunyuanImage",
            [],
            dict(
                in_channels=3,
                out_channels=3,
                latent_channels=64,
                block_out_channels=[128, 256, 512, 512, 1024, 1024],
                layers_per_block=2,
                spatial_compression_ratio=32,
                sample_size=384,
            ),
        ),
    ],
)
def test_bytes_per_pixel_of_shallow_autoencoders(kind, frames, options, dtype):
    """The published sizes are the defaults of the classes, or stand here."""
    model = on_meta({"_class_name": kind, **options}, pipelines.DTYPES[dtype])
    stated = pixel_memory.bytes_per_pixel({"_class_name": kind, **options})[dtype]
    for found, most in zip(counted(model, 512, *frames), stated, strict=True):
        assert 0.75 * most <= found <= 1.02 * most


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bytes_per_pixel_of_a_video_autoencoder(dtype):
    """Of DC-AE-V with 80 frames, and within a fifth with 40: chunks are worked on one after the other."""
    config = deep_autoencoders.config_of(catalog.AUTOENCODERS["dc-ae-v-f32t4c32"])
    with torch.device("meta"):
        model = AutoencoderDCVideo.from_config(config).to(pipelines.DTYPES[dtype]).eval()
    stated = pixel_memory.bytes_per_pixel(config)[dtype]
    for frames, least in ((80, 0.98), (40, 0.8)):
        for found, most in zip(counted(model, 64, frames), stated, strict=True):
            assert least * most <= found <= 1.02 * most


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("source, side", [("wan-1.3b", 64), ("wan-2.2-5b", 128)])
def test_bytes_per_pixel_of_the_autoencoders_of_wan(source, side, dtype):
    vae = components.layout_of(catalog.SOURCES[source]).parts["vae"]
    with torch.device("meta"):
        model = AutoencoderKLWan.from_config(vae.config).to(pipelines.DTYPES[dtype]).eval()
    stated = pixel_memory.bytes_per_pixel({"_class_name": vae.kind, **vae.config})[dtype]
    for found, most in zip(counted(model, side, 77), stated, strict=True):
        assert 0.98 * most <= found <= 1.02 * most


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bytes_of_the_autoencoder_of_ltx_2_grow_with_the_frames(dtype):
    """The published sizes are the defaults of the class."""
    options = {"decoder_causal": False, "spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
    config = {"_class_name": "AutoencoderKLLTX2Video", **options}
    model = on_meta(config, pipelines.DTYPES[dtype])
    assert sum(p.numel() for p in model.parameters()) == 1_222_479_601
    for frames, least in ((81, 0.98), (41, 0.95)):
        for way, found in enumerate(counted(model, 128, frames)):
            stated = pixel_memory.peak_bytes(config, dtype, way, 128, 128, frames) / 128**2
            assert least * stated <= found <= 1.03 * stated


def test_a_video_in_tiles_needs_one_tile_and_its_results():
    """960 px, the area of 704 x 1280: within a third of what is stated, and never more; less than whole."""
    config = deep_autoencoders.config_of(catalog.AUTOENCODERS["dc-ae-v-f32t4c32"])
    with torch.device("meta"):
        model = AutoencoderDCVideo.from_config(config).to(torch.bfloat16).eval()
    stated, side = pixel_memory.bytes_per_pixel(config)["bf16"], 960
    with tiles.by_size(model, 1, side, side):
        for way, found in enumerate(counted(model, side, pixel_memory.FRAMES)):
            allowed = pixel_memory.video_bytes(stated[way], way, side, side)
            assert 0.67 * allowed <= found * side**2 <= 1.02 * allowed < 0.5 * stated[way] * side**2


def test_a_picture_in_tiles_needs_one_tile_and_its_results():
    """3072 px against what is stated, within a fifth, and against 2048 px, which are taken whole."""
    config = published("dc-ae-f64")
    model, stated = on_meta(config), pixel_memory.bytes_per_pixel(config)["fp32"]
    with tiles.by_size(model, 1, 3072, 3072):
        for way, found in enumerate(counted(model, 3072)):
            allowed = pixel_memory.picture_bytes(stated[way], way, 3072, 3072)
            whole = pixel_memory.picture_bytes(stated[way], way, 2048, 2048)
            assert 0.8 * allowed <= found * 3072**2 <= 1.02 * allowed < whole


def test_pictures_are_taken_together_by_their_pixels():
    """1024 px and more one by one; what memory holds counts too: FLUX's autoencoder in 20 GB."""
    assert [pixel_memory.together(16, side**2) for side in (128, 512, 1024, 2048, 4096)] == [16, 4, 1, 1, 1]
    each = pixel_memory.bytes_per_pixel(published("kl-flux"))["fp32"][pixel_memory.DECODE]
    fits = [at_once.pictures(each * side**2, 20 * 10**9) for side in (512, 1024, 2048, 4096)]
    assert fits == [15, 3, 1, 1]


@pytest.mark.parametrize("folder, frames", [("tiny-dc-ae-v", 16), ("tiny-wan/vae", 13)])
def test_videos_are_taken_together_by_the_pixels_of_all_their_frames(folder, frames, monkeypatch):
    """Videos of 128 px four at a time, of 256 px one by one. The results are those of one by one, to 1e-5."""
    codec, calls = autoencoders.load(WEIGHTS / folder), []

    def counting(name):
        work = getattr(codec.model, name)

        def call(rows):
            calls.append(len(rows))
            return work(rows)

        monkeypatch.setattr(codec.model, name, call)

    alone = torch.rand(5, 3, frames, 128, 128) * 2 - 1
    expected = [codec.encode(video[None]) for video in alone]
    shown = [codec.decode(z) for z in expected]
    counting("encode"), counting("decode")
    latents = codec.encode(alone)
    torch.testing.assert_close(latents, torch.cat(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(codec.decode(torch.cat(expected)), torch.cat(shown), atol=1e-5, rtol=1e-5)
    assert calls == [4, 1, 4, 1]
    codec.encode(torch.zeros(2, 3, frames, 256, 256))
    assert calls[4:] == [1, 1]


def short_above(limit, calls):
    def work(part):
        calls.append(len(part))
        if len(part) > limit:
            raise SHORT
        return [2 * number for number in part]

    return work


def test_a_batch_is_halved_until_it_fits_and_stays_so():
    calls, told = [], []
    at = at_once.AtOnce("stage", told.append)
    rows = list(range(11))
    assert [*chain(*at.parts(rows, short_above(2, calls), 8))] == [2 * number for number in rows]
    assert calls == [8, 4, 2, 2, 2, 2, 2, 1] and len(told) == 2
    assert told[0] == "stage: out of memory with 8 pictures at once, going on with 4"
    calls.clear()
    assert len([*chain(*at.parts(rows, short_above(2, calls), 8))]) == 11 and max(calls) == 2
    with pytest.raises(torch.OutOfMemoryError):
        list(at.parts(rows, short_above(0, calls)))
    with pytest.raises(ValueError, match="something else"):
        list(at.parts(rows, lambda _: (_ for _ in ()).throw(ValueError("something else"))))


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (SHORT, True),
        (MemoryError(), True),
        (
            RuntimeError("alloc_cpu.cpp:121: DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_which_errors_say_that_memory_is_short(error, short):
    assert is_out_of_memory(error) == short
    assert explain(error).message.startswith("out of memory") == short


@pytest.mark.parametrize(
    ("stage", "setting"),
    [
        ("data", "data.batch"),
        ("latents", "latents.batch"),
        ("align-head", "align_head.batch"),
        ("adapt-2", "adapt.phases.1.micro_batch"),
        ("quantize", "quantize.calibration.batch"),
        ("verify", "data.batch"),
        ("merge-1", "more memory"),
    ],
)
def test_the_hint_names_the_setting_of_the_stage(stage, setting):
    with pytest.raises(ResourceError, match=f"stage {stage}: out of memory: CUDA") as caught, memory.named(stage):
        raise SHORT
    assert setting in caught.value.hint and caught.value.exit_code == 4
    with pytest.raises(ValueError, match="kept"), memory.named(stage):
        raise ValueError("kept")


def test_every_task_of_the_ranks_has_its_stage():
    stages = [stage for stage, _ in tasks.tasks_of(Job(*[None] * 6), None, {}).values()]
    assert len(stages) == 8 and all(memory.kind_of(stage.format(number=1)) in memory.LOWER for stage in stages)


def test_an_autoencoder_takes_what_fits_and_says_when_it_did_not(monkeypatch, capsys):
    """The results are those of all pictures at once, to rounding."""
    codec = autoencoders.load(WEIGHTS / "tiny-dc-ae-f32", console=Console())
    pixels = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = codec.encode(pixels)
    again, counts, inner = codec.decode(latents), [], codec.model.encoder.forward

    def encoder(part):
        counts.append(len(part))
        if len(part) > 2:
            raise SHORT
        return inner(part)

    monkeypatch.setattr(codec.model.encoder, "forward", encoder)
    torch.testing.assert_close(codec.encode(pixels), latents)
    assert counts == [5, 2, 2, 1] and "encodes: out of memory with 5 pictures at once, going on with 2" in (
        capsys.readouterr().err.replace("\n", " ")
    )
    room = 3 * codec.needs(pixel_memory.DECODE, 64, 64) / at_once.SHARE
    monkeypatch.setattr(at_once, "free_bytes", lambda _: int(room) + 1)
    inner, counts = codec.model.decoder.forward, []
    monkeypatch.setattr(codec.model.decoder, "forward", lambda part: counts.append(len(part)) or inner(part))
    torch.testing.assert_close(codec.decode(latents), again)
    assert counts == [3, 2]


@pytest.mark.parametrize(
    ("folder", "tile", "least"), [("tiny-flux/vae", 256, 30), ("tiny-dc-ae-f32", 256, 35), ("tiny-dc-ae-f64", 512, 25)]
)
def test_large_pictures_are_taken_in_tiles(folder, tile, least, monkeypatch):
    """Tiles that overlap change a picture little, and make it hardly worse: PSNR in dB of the round trips against each
    other, and against the picture. At f64 a tile of 512 px has 8 latents only, and differs most.
    """
    codec = autoencoders.load(WEIGHTS / folder)
    before = {name: value for name, value in vars(codec.model).items() if name.startswith(("tile_", "use_"))}
    pixels = world.draw(world.sample_labels(1, seed=1), seed=1, side=2 * tile - 128)
    whole = codec.decode(codec.encode(pixels))
    monkeypatch.setattr(tiles, "TILED", tile)
    monkeypatch.setattr(tiles, "TILE", tile)
    tiled = codec.decode(codec.encode(pixels))
    assert not torch.equal(tiled, whole)
    assert {name: value for name, value in vars(codec.model).items() if name in before} == before
    assert least < psnr(tiled, whole, peak=2.0) < 80
    assert psnr(tiled, pixels, peak=2.0) > psnr(whole, pixels, peak=2.0) - 0.5
