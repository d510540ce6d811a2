"""Measures that need no weights, and so work for every family: sharpness and colour."""

from __future__ import annotations

import torch
from torch import Tensor

from dcgen_convert.evaluation.measure import Distance, Score
from dcgen_convert.evaluation.metrics import frechet
from dcgen_convert.evaluation.pixels import to_uint8

FINE = 1 / 8  # cycles per pixel: what repeats within 8 px or less is fine detail
# Brightness and two colour axes (Y, Cb, Cr) of R, G, B, as in JPEG (ITU-R BT.601); rows are channels.
YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


class Sharpness(Score):
    """Share of a picture's contrast that is fine detail: energy of its spectrum above FINE, 0..1.

    The brightness, less its mean, is faded out at the edges (Hann window), as the spectrum would take the step from one
    edge to the other for detail. A picture of one colour has 0.

    Blur lowers it. Noise and JPEG's blocks raise it, so it is no quality by itself: compare it with the base model's.
    Pictures of other sizes cannot be compared, as FINE counts pixels.
    """

    name = "sharpness"
    label = "Share of contrast that is fine detail"
    reads = False

    def scores(self, pictures: Tensor, captions: list[str]) -> Tensor:  # noqa: ARG002  it needs no caption
        return torch.cat([self._of(part) for part in pictures.split(1)])

    def _of(self, picture: Tensor) -> Tensor:
        light = _channels(picture)[:, 0]  # (1, H, W)
        light = light - light.mean((-2, -1), keepdim=True)
        height, width = light.shape[-2:]
        fade = [torch.hann_window(length, periodic=False, dtype=light.dtype) for length in (height, width)]
        energy = torch.fft.fft2(light * fade[0][:, None] * fade[1]).abs().square()
        across, down = torch.fft.fftfreq(width, dtype=light.dtype), torch.fft.fftfreq(height, dtype=light.dtype)
        fine = torch.hypot(down[:, None], across) > FINE
        every = energy.sum((-2, -1))
        return torch.where(every > 1e-9, (energy * fine).sum((-2, -1)) / every.clamp_min(1e-9), 0.0)


class Colour(Distance):
    """Frechet distance of brightness, contrast and colours: of the mean and the standard deviation of Y, Cb and Cr.

    These are six numbers per picture, in levels of 8 bits. So the distance says whether one set is darker, flatter, or
    of another tint, as a wrong scale of the latents makes it. What the pictures show plays no part in it.
    """

    name = "colour"
    label = "Distance in brightness, contrast and colour"
    unit = "levels²"

    def features(self, pictures: Tensor) -> Tensor:
        parts = [_channels(part).flatten(2) for part in pictures.split(1)]
        return torch.cat([torch.cat([part.mean(-1), part.std(-1, correction=0)], 1) for part in parts]).float()

    def distance(self, a: Tensor, b: Tensor) -> float:
        return frechet(a, b)


def _channels(pictures: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> Y, Cb and Cr in levels of 8 bits, float64; Cb and Cr are 0 for grey."""
    table = torch.tensor(YCBCR, dtype=torch.float64)
    return torch.einsum("kc,bchw->bkhw", table, to_uint8(pictures).double())
