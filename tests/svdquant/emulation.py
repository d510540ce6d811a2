"""An independent reader and CPU stand-in for nunchaku's kernels, written from the format document with index formulas
only.

It shares nothing with the package: codes are fetched one by one through `layouts`, and the arithmetic follows SVDQUANT
Part I.1 and I.2.
"""

import functools

import numpy as np
import torch

from . import layouts

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def gather(flat, index) -> torch.Tensor:
    return flat[torch.as_tensor(index)]


@functools.cache
def _grid(formula, rows: int, columns: int, size: int) -> np.ndarray:
    return np.array([[formula(row, column, size) for column in range(columns)] for row in range(rows)])


def svdq_weight(qweight: torch.Tensor, wscales: torch.Tensor, nvfp4: bool) -> torch.Tensor:
    """R / (tensor and row scales), float32 (N, K)."""
    n, k = qweight.shape[0], qweight.shape[1] * 2
    where = _grid(layouts.qweight, n, k, k)  # (N, K, 2)
    data = qweight.reshape(-1).view(torch.uint8).numpy()
    codes = (data[where[..., 0]] >> (4 * where[..., 1])) & 15
    group = 16 if nvfp4 else 64
    places = _grid(layouts.scale_nvfp4 if nvfp4 else layouts.scale_int4, n, k // group, k)
    scales = wscales.reshape(-1).float().numpy()[places]
    values = E2M1[codes] if nvfp4 else np.where(codes > 7, codes.astype(np.float32) - 16, codes)
    return torch.from_numpy((values * np.repeat(scales, group, 1)).astype(np.float32))


def channels(packed: torch.Tensor) -> torch.Tensor:
    return gather(packed.float(), [layouts.channel(i) for i in range(len(packed))])


def low_rank(down: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(D (R, K), U (N, R))."""
    (k, rank), n = down.shape, up.shape[0]
    return (
        gather(down.reshape(-1).float(), _grid(layouts.down, rank, k, rank)),
        gather(up.reshape(-1).float(), _grid(layouts.up, n, rank, rank)),
    )


def awq_weight(qweight: torch.Tensor, wscales: torch.Tensor, wzeros: torch.Tensor) -> torch.Tensor:
    n, k = qweight.shape[0] * 4, qweight.shape[1] * 2
    where = _grid(layouts.awq, n, k, k)
    words = qweight.contiguous().view(torch.int16).reshape(-1).numpy().view(np.uint16)
    codes = torch.from_numpy(((words[where[..., 0]] >> (4 * where[..., 1])) & 15).astype(np.float32))
    spread = [scale.float().T.repeat_interleave(64, 1) for scale in (wscales, wzeros)]
    return half(codes * spread[0] + spread[1])


def half(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).float()


class Ops:
    """The four operators that diffusers' nunchaku_lite modules call; quantised activations travel as dequantised
    float32 through `self.held`.
    """

    def __init__(self):
        self.held = {}

    def quantize_w4a4_act_fuse_lora(self, x, out, ascales, down, lora_act, smooth, fuse_glu, nvfp4):
        xs = half(x.float() / channels(smooth))
        group, most = (16, 6.0) if nvfp4 else (64, 7.0)
        groups = xs.view(len(x), -1, group)
        scale = groups.abs().amax(-1, keepdim=True) / most
        stored = scale.clamp(max=448).to(torch.float8_e4m3fn).float() if nvfp4 else half(scale)
        wanted = groups * torch.where(scale > 0, 1 / scale.clamp(min=1e-38), 0)
        codes = self._e2m1(wanted) if nvfp4 else wanted.round().clamp(-8, 7)
        self.held[out.data_ptr()] = (codes * stored).view_as(xs)
        self.held[lora_act.data_ptr()] = (x.float(), down)

    @staticmethod
    def _e2m1(x):
        levels = torch.from_numpy(E2M1[:8])
        distance = (x.abs().clamp(max=6).unsqueeze(-1) - levels).abs()
        even_first = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # argmin takes the first of equals: even codes win ties
        return levels[even_first[distance[..., even_first].argmin(-1)]] * x.sign()

    def gemm_w4a4(self, act, wgt, out, _qout, ascales, wscales, _o, _p, lora_act_in, lora_up, *rest):
        bias, nvfp4, alpha, wcscales = rest[5], rest[12], rest[13], rest[14]
        x, down = self.held.pop(lora_act_in.data_ptr())
        acc = self.held.pop(act.data_ptr()) @ svdq_weight(wgt, wscales, nvfp4).T
        y = half(acc * alpha.float()) if nvfp4 else half(acc)
        if nvfp4:
            y = y * channels(wcscales)
        y = half(y + (0 if bias is None else channels(bias)))
        d, u = low_rank(down, lora_up)
        out.copy_(half(y + half(x @ d.T) @ u.T))

    def awq_gemm_w4a16_g64_int32(self, x, qweight, wscales, wzeros):
        return (x.float() @ awq_weight(qweight, wscales, wzeros).T).to(x.dtype)

    def gemv_awq(self, x, qweight, wscales, wzeros, rows, n, k, group):
        assert (rows, n, k, group) == (len(x), qweight.shape[0] * 4, qweight.shape[1] * 2, 64)
        return self.awq_gemm_w4a16_g64_int32(x, qweight, wscales, wzeros)
