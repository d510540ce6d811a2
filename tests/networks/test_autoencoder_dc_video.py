"""DC-AE-V against a second implementation in float64, chunks against the whole, and the numbers of frames."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat

from dcgen_convert.core.files import read_json
from dcgen_convert.families import pixel_memory
from dcgen_convert.families.grid import autoencoder_grid
from dcgen_convert.networks import autoencoder_dc_video as video
from dcgen_convert.networks import autoencoders, tiles
from dcgen_convert.networks.autoencoder_dc_video import AutoencoderDCVideo, ChunkConv, fold, tile_spans, unfold

K, C = 8, 4
F64 = dict(
    latent_channels=128,
    block_out_channels=(256, 512, 512, 1024, 1024, 1024, 1024),
    layers_per_block=(5, 10, 4, 4, 4, 4, 4),
    causal_time=False,
)


def small(**options) -> AutoencoderDCVideo:
    """f8, K 8, with weights of which every one matters."""
    torch.manual_seed(0)
    made = dict(latent_channels=C, block_out_channels=(8, 16, 16, 32), layers_per_block=(1, 2, 1, 1), chunk_frames=K)
    model = AutoencoderDCVideo(**made | options).eval()
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.2)
    return model


def clip(frames: int, seed: int = 1, side: int = 8) -> torch.Tensor:
    return torch.rand(2, 3, frames, side, 2 * side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
def latents(model, x):
    return model.encode(x).latent_dist.mode()


@torch.no_grad()
def frames(model, z):
    return model.decode(z, return_dict=False)[0]


# The second implementation: the convolution as sums over shifted cells, the network by the names of its tensors.


def slow_conv(x, weight, bias, chunk, causal=True):
    """Each frame by itself: the frame after it is there within its chunk, the one before it always (causal)."""
    total, whole = x.shape[2], x.shape[2] % chunk == 0
    padded = F.pad(x, (1, 1, 1, 1))
    result = []
    for t in range(total):
        seen = {0: t}
        if t > 0 and (not whole or causal or t % chunk):
            seen[-1] = t - 1
        if t + 1 < total and (not whole or (t + 1) % chunk):
            seen[1] = t + 1
        frame = torch.zeros(x.shape[0], weight.shape[0], *x.shape[3:], dtype=x.dtype)
        for shift, source in seen.items():
            for i in range(3):
                for j in range(3):
                    cells = padded[:, :, source, i : i + x.shape[3], j : j + x.shape[4]]
                    frame += torch.einsum("bchw,oc->bohw", cells, weight[:, :, shift + 1, i, j])
        result.append(frame if bias is None else frame + bias[:, None, None])
    return torch.stack(result, dim=2)


class Slow:
    """The network from its tensors alone."""

    def __init__(self, model):
        self.held = {name: value.detach() for name, value in model.state_dict().items()}
        self.stages, self.causal_time = len(model.config.block_out_channels), model.config.causal_time

    def conv(self, x, name, chunk, causal=True):
        return slow_conv(x, self.held[f"{name}.weight"], self.held.get(f"{name}.bias"), chunk, causal)

    def norm(self, x, name):
        x = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return torch.einsum("bcthw,c->bcthw", x, self.held[f"{name}.weight"]) + rearrange(
            self.held[f"{name}.bias"], "c -> c 1 1 1"
        )

    def blocks(self, x, part, stage, chunk):
        for n in range(1 if part == "decoder" and stage < self.stages - 1 else 0, 99):
            name = f"{part}.stages.{stage}.{n}"
            if f"{name}.norm.weight" not in self.held:
                return x
            inner = F.silu(self.conv(x, f"{name}.conv1", chunk))
            x = x + self.norm(self.conv(inner, f"{name}.conv2", chunk), f"{name}.norm")

    def encode(self, x):
        packed, chunk = "b c (t q) (h r) (w s) -> b (c q r s) t h w", K
        x = rearrange(self.conv(x, "encoder.conv_in.conv", K), packed, q=1, r=2, s=2)
        for stage in range(self.stages):
            last = stage == self.stages - 1
            chunk = K // 4 if last else K
            x = self.blocks(x, "encoder", stage, chunk)
            if not last:
                sizes = dict(q=4, r=1, s=1) if stage == self.stages - 2 else dict(q=1, r=2, s=2)
                (down,) = (
                    name.removesuffix(".weight")
                    for name in self.held
                    if name.startswith(f"encoder.stages.{stage}.") and name.endswith(".conv.weight")
                )
                y = rearrange(self.conv(x, down, K), packed, **sizes)
                x = y + reduce(rearrange(x, packed, **sizes), "b (c g) t h w -> b c t h w", "mean", c=y.shape[1])
        return self.conv(x, "encoder.conv_out", K // 4)

    def decode(self, z):
        spread, last = "b (c q r s) t h w -> b c (t q) (h r) (w s)", self.stages - 1
        x = self.blocks(self.conv(z, "decoder.conv_in", K // 4), "decoder", last, K // 4)
        for stage in reversed(range(last)):
            time = stage == last - 1
            wide = self.conv(
                x, f"decoder.stages.{stage}.0.conv", K // 4 if time else K, self.causal_time if time else True
            )
            wide = wide + repeat(x, "b c t h w -> b (c g) t h w", g=wide.shape[1] // x.shape[1])
            x = rearrange(wide, spread, **(dict(q=4, r=1, s=1) if time else dict(q=1, r=2, s=2)))
            x = self.blocks(x, "decoder", stage, K)
        x = F.silu(self.norm(x, "decoder.norm_out"))
        return rearrange(self.conv(x, "decoder.conv_out.conv", K), spread, q=1, r=2, s=2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("total", [4, 8, 24, 12])
def test_the_convolution_is_the_slow_one(total, causal):
    """Float64, to 1e-12: whole chunks, a rest that is no chunk, and no look at the chunk before."""
    torch.manual_seed(0)
    conv = ChunkConv(3, 5, K, causal=causal).double()
    x = torch.randn(2, 3, total, 4, 5, dtype=torch.float64)
    wanted = slow_conv(x, conv.weight, conv.bias, K, causal)
    torch.testing.assert_close(conv(x, {}), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("causal_time", [True, False])
@pytest.mark.parametrize("total", [16, 12])
def test_the_network_is_the_slow_one(total, causal_time):
    """Float64, to 1e-9 of numbers of size 1 to 100."""
    model = small(causal_time=causal_time).double()
    x = clip(total).double()
    slow = Slow(model)
    with torch.no_grad():
        z, y = model.encoder(x), model.decoder(model.encoder(x))
        torch.testing.assert_close(z, slow.encode(x), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(y, slow.decode(z), atol=1e-9, rtol=1e-9)
    assert z.shape == (2, C, total // 4, 1, 2) and y.shape == x.shape


@pytest.mark.parametrize("causal_time", [True, False])
def test_chunk_by_chunk_is_the_whole(causal_time):
    """To 1e-5 of numbers of size 1."""
    model, x = small(causal_time=causal_time), clip(3 * K)
    z = latents(model, x)
    with torch.no_grad():
        whole_z, whole = model.encoder(x), model.decoder(z)[:, :, :-3]
    torch.testing.assert_close(z, whole_z, atol=1e-5 * whole_z.std().item(), rtol=0)
    torch.testing.assert_close(frames(model, z), whole, atol=1e-5 * whole.std().item(), rtol=0)


def test_a_chunk_sees_itself_and_the_past():
    model, x = small(), clip(2 * K)
    z = latents(model, x)
    later, earlier = x.clone(), x.clone()
    later[:, :, K:] = clip(K, seed=2)
    earlier[:, :, K - 1] = clip(1, seed=2)[:, :, 0]
    assert torch.equal(latents(model, later)[:, :, :2], z[:, :, :2])
    changed = (latents(model, earlier) - z).abs().amax(dim=(0, 1, 3, 4))
    assert (changed > 1e-3).all()  # its own first latent frame too: within a chunk both directions are seen


def test_frames_that_are_no_whole_chunks_are_padded_with_zeros():
    """12 frames at K 8 in one piece: what a network with any longer chunk computes."""
    model, x = small(), clip(12)
    plain = AutoencoderDCVideo.from_config({**model.config, "chunk_frames": 400}).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert model.encoder(x).shape[2] == 3
        torch.testing.assert_close(model.encoder(x), plain.encoder(x))
        torch.testing.assert_close(latents(model, x)[:, :, 2:], plain.encoder(x[:, :, K:]))
    assert torch.equal(latents(model, x)[:, :, :2], latents(model, x[:, :, :K]))


@pytest.mark.parametrize("asked", [1, 4, 5, 9, 77])
def test_as_many_frames_come_back_as_wan_s_autoencoder_gives(asked):
    model = small(layers_per_block=(0, 0, 0, 1))
    z = latents(model, clip(asked))
    assert z.shape == (2, C, -(-asked // 4), 1, 2)
    assert frames(model, z).shape == (2, 3, 4 * z.shape[2] - 3, 8, 16)
    if asked % 4 == 1:  # the numbers that WanPipeline draws
        assert z.shape[2] == (asked - 1) // 4 + 1 and frames(model, z).shape[2] == asked


def test_the_last_frame_is_repeated_and_a_picture_is_four_of_it():
    model, x = small(), clip(5)
    assert torch.equal(latents(model, x), latents(model, torch.cat([x, *[x[:, :, 4:]] * 3], dim=2)))
    assert torch.equal(latents(model, x[:, :, :1]), latents(model, x[:, :, :1].repeat(1, 1, 4, 1, 1)))


@pytest.mark.parametrize(
    "options,whole,encoder,decoder",
    [({}, 2_138_635_436, 916_655_008, 1_221_980_428), (F64, 2_717_281_804, 1_152_892_160, 1_564_389_644)],
    ids=["f32t4c32", "f64t4c128"],
)
def test_published_sizes(options, whole, encoder, decoder):
    """2,138.6 M, of which the encoder has 916.7 and the decoder 1,222.0; f64 2,717.3 M."""
    with torch.device("meta"):
        model = AutoencoderDCVideo(**options)
    assert [sum(p.numel() for p in part.parameters()) for part in (model, model.encoder, model.decoder)] == [
        whole,
        encoder,
        decoder,
    ]
    factor = model.config.scale_factor_spatial
    assert autoencoder_grid(model.config) == (factor, model.config.z_dim) and factor == (64 if options else 32)


def test_blocks_of_cells_are_channels_in_the_order_c_t_h_w():
    x = torch.randn(2, 3, 4, 6, 10)
    flat = rearrange(x, "b c t h w -> (b t) c h w")
    assert torch.equal(rearrange(fold(x, 1, 2), "b c t h w -> (b t) c h w"), F.pixel_unshuffle(flat, 2))
    assert torch.equal(fold(x, 2, 2), rearrange(x, "b c (t q) (h r) (w s) -> b (c q r s) t h w", q=2, r=2, s=2))
    assert torch.equal(unfold(fold(x, 2, 2), 2, 2), x)


def test_pipelines_read_the_geometry_and_the_scale():
    config = small(scaling_factor=0.7241, latents_std=[7.0], z_dim=1).config
    assert (config.scale_factor_temporal, config.scale_factor_spatial, config.z_dim) == (4, 8, C)
    assert config.latents_mean == [0.0] * C and config.latents_std == [1 / 0.7241] * C


def test_what_does_not_fit_is_refused():
    model = small()
    for wrong in (torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 4, 8, 12)):
        with pytest.raises(ValueError, match="multiples of 8 px"):
            model.encode(wrong)
    with pytest.raises(ValueError, match="multiple of 4"):
        small(chunk_frames=6)
    for stages in (dict(layers_per_block=(1, 1)), dict(block_out_channels=(8, 16, 18, 32))):
        with pytest.raises(ValueError, match="do not make stages"):
            small(**stages)


def test_half_precision_is_near():
    model, x = small(), clip(K)
    z = latents(model, x)
    half = latents(model.bfloat16(), x.bfloat16())
    assert half.dtype is torch.bfloat16 and ((half.float() - z).std() / z.std()) < 0.05


def test_saved_it_brings_its_code(tmp_path):
    model = small(scaling_factor=0.5)
    model.save_pretrained(tmp_path)
    assert (tmp_path / f"{video.MODULE_NAME}.py").read_bytes() == Path(video.__file__).read_bytes()
    assert read_json(tmp_path / "config.json")["auto_map"] == {"AutoModel": f"{video.MODULE_NAME}.{video.CLASS_NAME}"}
    again = AutoencoderDCVideo.from_pretrained(tmp_path)
    assert again.config.latents_std == [2.0] * C and again.config.block_out_channels == [8, 16, 16, 32]
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_codec_scales_its_latents(tmp_path):
    """Model latents are scaling_factor times its own; frames come back clamped. To 1e-4 of numbers up to 10."""
    model, x = small(scaling_factor=0.7241), clip(9)
    model.save_pretrained(tmp_path)
    codec = autoencoders.load(tmp_path)
    assert (codec.factor, codec.channels, codec.axes, codec.scale) == (8, C, 3, 0.7241)
    z = codec.encode(x)
    torch.testing.assert_close(z, 0.7241 * latents(model, x), atol=1e-4, rtol=0)
    torch.testing.assert_close(codec.decode(z), frames(model, z / 0.7241).clamp(-1, 1), atol=1e-4, rtol=0)


def test_tiles_cover_a_side_with_as_few_as_do():
    for side in range(1, 60):
        for tile, overlap in ((8, 1), (16, 2), (5, 4)):
            spans = tile_spans(side, tile, overlap)
            assert (spans[0].start, spans[-1].stop) == (0, side) and len({len(span) for span in spans}) == 1
            assert len(spans[0]) <= tile
            pairs = [*pairwise(spans)]
            assert all(before.stop - after.start >= overlap for before, after in pairs)
            assert len(spans) == 1 or (len(spans) - 1) * (tile - overlap) + overlap < side  # one less would not do
    assert [len(tile_spans(side // 32, 16, 2)) for side in (704, 1280)] == [2, 3]  # of 12 and 15 cells


def by_hand(part, x, height, width, tile, overlap, unit, scale, length):
    """Every number as the mean over the tiles that hold it, weighted by how far it is from their inner edges."""
    total, weight = 0, 0
    for rows in tile_spans(height, tile, overlap):
        for columns in tile_spans(width, tile, overlap):
            cut = x[..., rows.start * unit : rows.stop * unit, columns.start * unit : columns.stop * unit]
            kept = {}
            found = torch.cat([part(chunk, kept) for chunk in cut.split(length, dim=2)], dim=2).double()
            share = torch.zeros(height * scale, width * scale, dtype=torch.float64)
            for i in range(rows.start * scale, rows.stop * scale):
                for j in range(columns.start * scale, columns.stop * scale):
                    inner = [(i - rows.start * scale, rows.start), (rows.stop * scale - 1 - i, rows.stop < height)]
                    inner += [(j - columns.start * scale, columns.start)]
                    inner += [(columns.stop * scale - 1 - j, columns.stop < width)]
                    share[i, j] = math.prod(
                        min(1.0, (distance + 0.5) / (overlap * scale)) for distance, is_inner in inner if is_inner
                    )
            margins = (
                columns.start * scale, (width - columns.stop) * scale, rows.start * scale, (height - rows.stop) * scale
            )  # fmt: skip
            total, weight = total + F.pad(found, margins) * share, weight + share
    return total / weight


@torch.no_grad()
def test_large_frames_are_taken_in_tiles(monkeypatch):
    """Of 4 cells that overlap by 1, against sums by hand; two chunks of frames, so that each tile keeps its own frames.
    After `by_size` frames are whole again. Tiles over all of a frame change nothing.
    """
    monkeypatch.setattr(pixel_memory, "FRAME_WHOLE", 8 * 16)
    monkeypatch.setattr(pixel_memory, "FRAME_TILE", 32)
    model, x = small(), clip(2 * K, side=56)
    whole = latents(model, x)
    with tiles.by_size(model, 1, 56, 112):
        assert (model.tile_sample_min_height, model.tile_sample_stride_width) == (64, 56)  # at least 8 cells
        model.enable_tiling(32, 32, 24, 24)
        z, drawn = latents(model, x), model.decode(whole).sample
    assert not model.use_tiling and torch.equal(latents(model, x), whole) and z.shape == whole.shape
    assert (z - whole).abs().max() > 1e-3
    wanted = by_hand(model.encoder, x, 7, 14, 4, 1, 8, 1, K)
    torch.testing.assert_close(z.double(), wanted, atol=1e-4, rtol=1e-4)
    wanted = by_hand(model.decoder, whole, 7, 14, 4, 1, 1, 8, K // 4)[:, :, :-3]
    torch.testing.assert_close(drawn.double(), wanted, atol=1e-4, rtol=1e-4)
    with tiles.by_size(model, 1, 8, 16):
        assert not model.use_tiling
    model.enable_tiling(56, 112, 48, 48)
    assert torch.equal(latents(model, x), whole)


@torch.no_grad()
def test_seams_do_not_show_and_end_within_cells():
    """Initial weights, two tiles of 13 cells that overlap by 2: no jump between neighbours is larger than that of the
    whole by a tenth, and six cells away from the overlap 1 % of the frame's size is left of the difference.
    """
    torch.manual_seed(0)
    sizes = dict(latent_channels=C, block_out_channels=(8, 16, 16, 32), layers_per_block=(1, 1, 1, 1))
    model = AutoencoderDCVideo(**sizes, chunk_frames=K).eval()
    ramp = torch.linspace(-1, 1, 192)
    z = latents(model, (ramp[:24, None] * ramp).expand(1, 3, 4, 24, 192))
    whole = model.decode(z).sample
    model.enable_tiling(128, 128, 112, 112)
    tiled = model.decode(z).sample
    jumps, before = ((one[..., 1:] - one[..., :-1]).abs().mean((0, 1, 2, 3)) for one in (tiled, whole))
    assert jumps.max() < 1.1 * before.max()
    apart = (tiled - whole).abs().mean((0, 1, 2, 3)).view(24, 8).mean(1) / whole.abs().mean()
    assert apart[10:14].max() > 0.1 and apart[:5].max() < 0.01 and apart[19:].max() < 0.01


def test_file_names_its_licence_since_it_travels_alone():
    assert Path(video.__file__).read_text().splitlines()[0] == "# SPDX-License-Identifier: Apache-2.0"
