"""How many pictures are worked on together: counted bytes per pixel, halving where memory is short, what is said."""

from itertools import chain

import diffusers
import pytest
import torch
from conftest import WEIGHTS
from planning.test_census import Census

from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import ResourceError, explain, is_out_of_memory
from dcgen_convert.evaluate.metrics import psnr
from dcgen_convert.networks import at_once, autoencoders
from dcgen_convert.stages import memory, tasks
from dcgen_convert.tiny import world

KL = {
    "block_out_channels": (128, 256, 512, 512), "latent_channels": 16, "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
DEEP = (128, 256, 512, 512, 1024, 1024)
DC = {
    "latent_channels": 32, "encoder_block_out_channels": DEEP, "decoder_block_out_channels": DEEP,
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3), "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
    "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
}  # fmt: skip
SHORT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "config"), [("AutoencoderKL", KL), ("AutoencoderDC", DC)])
def test_bytes_per_pixel_are_those_of_the_published_sizes(kind, config, dtype):
    """Every tensor that lives, on the meta device: at most what the table says, and at least nine tenths of it."""
    side = 512
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**config).to(dtype).eval()
        pixels = torch.empty(1, 3, side, side, dtype=dtype)
    with torch.no_grad():
        with Census("meta") as census:
            encoded = model.encode(pixels)
            latent = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
        del encoded
        counted = [census.peak]
        with Census("meta") as census:
            model.decode(latent)
        counted.append(census.peak)
    for found, stated in zip(counted, at_once.BYTES[kind][dtype], strict=True):
        assert 0.9 * stated <= found / side**2 <= 1.01 * stated


def test_memory_is_divided_by_pixels():
    """FLUX's autoencoder in 20 GB: 4 pictures of 1024 px, one of 2048, and one where none fits."""
    fits = [
        at_once.pictures("AutoencoderKL", torch.float32, at_once.DECODE, side**2, 20 * 10**9)
        for side in (512, 1024, 2048, 4096)
    ]
    assert fits == [19, 4, 1, 1]


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
    stages = [stage for stage, _ in tasks.tasks_of(None, None, {}).values()]
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
    room = 3 * 64**2 * at_once.BYTES["AutoencoderDC"][torch.float32][at_once.DECODE] / at_once.SHARE
    monkeypatch.setattr(at_once, "free_bytes", lambda _: int(room) + 1)
    inner, counts = codec.model.decoder.forward, []
    monkeypatch.setattr(codec.model.decoder, "forward", lambda part: counts.append(len(part)) or inner(part))
    torch.testing.assert_close(codec.decode(latents), again)
    assert counts == [3, 2]


@pytest.mark.parametrize("folder", ["tiny-flux/vae", "tiny-dc-ae-f32"])
def test_large_pictures_are_taken_in_tiles(folder, monkeypatch):
    """Tiles that overlap change a picture little: PSNR of the round trips against each other, in dB."""
    codec = autoencoders.load(WEIGHTS / folder)
    pixels = world.draw(world.sample_labels(2, seed=1), seed=1, side=256)
    whole = codec.decode(codec.encode(pixels))
    monkeypatch.setattr(autoencoders, "TILED", 128)
    if folder == "tiny-dc-ae-f32":
        codec.model.enable_tiling(128, 128, 96, 96)
        codec.model.disable_tiling()
    tiled = codec.decode(codec.encode(pixels))
    assert not torch.equal(tiled, whole) and not codec.model.use_tiling
    assert psnr(tiled, whole, peak=2.0) > 25
