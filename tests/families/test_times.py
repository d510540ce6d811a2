"""How latent frames meet: `Time` and `pooled` against what the autoencoders of diffusers and loops do."""

import pytest
import torch

from dcgen_convert.families.grid import STILL, Time
from dcgen_convert.families.tensors import pooled

from .tiny_videos import ltx_vae, video_vae

WAN, DC, LTX = Time(4, alone=True), Time(4), Time(8, alone=True)


def test_frames_and_latent_frames():
    assert [DC.latents(n) for n in (4, 77, 80)] == [1, 20, 20] and DC.shown(80) == 77
    assert [WAN.latents(n) for n in (1, 5, 77, 81)] == [1, 2, 20, 21] and WAN.shown(81) == 81
    assert [LTX.latents(n) for n in (1, 9, 81)] == [1, 2, 11] and LTX.shown(81) == 81
    assert [time.whole(80) for time in (DC, WAN, LTX)] == [80, 81, 81]
    assert [time.whole(2) for time in (DC, WAN, LTX)] == [4, 5, 9] and STILL.latents(1) == STILL.whole(1) == 1
    for time in (DC, WAN, LTX):
        for n in range(1, 40):
            assert time.whole(n) == next(m for m in range(n, 60) if time.whole(m) == m)
            assert time.latents(time.whole(n)) == time.latents(n)


def test_which_latent_frames_meet():
    """The base is given the frames that pipelines draw: a token of the new one then meets whole tokens of the base."""
    assert DC.meets(WAN) and LTX.meets(WAN) and LTX.meets(LTX) and DC.meets(DC) and STILL.meets(STILL)
    assert not LTX.meets(DC) and not DC.meets(LTX) and not WAN.meets(LTX)
    for frames in (9, 17, 81):
        assert WAN.latents(LTX.shown(frames)) == 1 + 2 * (LTX.latents(frames) - 1)
    for frames in (4, 8, 80):
        assert WAN.latents(DC.shown(frames)) == DC.latents(frames)


@torch.no_grad()
def test_a_latent_frame_sees_no_later_frame_than_those_that_it_covers():
    """Change one frame: the latent frames before the one that covers it stay, in both autoencoders."""
    torch.manual_seed(1)
    pixels, other = torch.rand(2, 1, 3, 17, 64, 64) * 2 - 1
    for vae, time in ((video_vae(8, 16), WAN), (ltx_vae(8), LTX)):
        before = vae.encode(pixels).latent_dist.mode()
        assert before.shape[2] == time.latents(17)
        for frame in range(17):
            changed = pixels.clone()
            changed[:, :, frame] = other[:, :, frame]
            moved = (vae.encode(changed).latent_dist.mode() - before).abs().amax(dim=(0, 1, 3, 4)) > 1e-6
            covers = 0 if frame == 0 else 1 + (frame - 1) // time.frames
            assert not moved[:covers].any() and moved[covers]


def test_pooled_against_loops():
    """1e-12 in float64: two latent frames for each but the first, 2 x 2 cells; also where only the cells differ."""
    maps = torch.randn(2, 3, 7, 4, 6, dtype=torch.float64)
    found = pooled(maps, (4, 2, 3))
    for k in range(4):
        met = [0] if k == 0 else [2 * k - 1, 2 * k]
        for i in range(2):
            for j in range(3):
                wanted = maps[:, :, met, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(2).mean(2)
                assert (found[:, :, k, i, j] - wanted).abs().max() <= 1e-12
    same = pooled(maps, (7, 2, 3))
    assert torch.equal(same, torch.nn.functional.interpolate(maps, size=(7, 2, 3), mode="area"))
    assert torch.equal(pooled(maps[:, :, :1], (1, 2, 3)), same[:, :, :1])
    assert pooled(maps[:, :, 0], (2, 3)).shape == (2, 3, 2, 3)
    with pytest.raises(RuntimeError):
        pooled(maps, (0, 2, 3))
