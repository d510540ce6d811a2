"""An independent reader of ComfyUI's 8-bit and 4-bit linears, by index formulas; it shares nothing with the package.

Source: QUANTIZATION.md and comfy/ops.py of ComfyUI; cuBLAS, "1D block scaling factors layout".
"""

import json

import numpy as np
import torch


def e2m1(code: int) -> float:
    """Sign, two bits of exponent with bias 1, one bit of mantissa."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    return (-1) ** sign * (mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def e4m3(code: int) -> float:
    """Sign, four bits of exponent with bias 7, three bits of mantissa."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    return (-1) ** sign * (mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def scale_place(n: int, g: int, columns: int) -> int:
    """Byte of the scale of row n and group g, for ``columns`` columns after padding (cuBLAS, block scaling)."""
    return (n // 128 * (columns // 4) + g // 4) * 512 + n % 32 * 16 + n // 32 % 4 * 4 + g % 4


def meaning(tensors: dict[str, torch.Tensor], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(weight (N, K) float64, its scales (N, K), the values that a code can have) of a linear in a file."""
    conf = json.loads(tensors[f"{name}.comfy_quant"].numpy().tobytes())
    codes = tensors[f"{name}.weight"].view(torch.uint8).numpy()
    if conf["format"] == "float8_e4m3fn":
        table = np.array([e4m3(code) for code in range(256)])
        scales = np.full(codes.shape, float(tensors[f"{name}.weight_scale"]))
        return table[codes] * scales, scales, np.delete(table, [127, 255])  # these two are NaN
    assert conf == {"format": "nvfp4"}
    (n, half), stored = codes.shape, tensors[f"{name}.weight_scale"]
    flat, columns = stored.view(torch.uint8).numpy().reshape(-1), stored.shape[1]
    scales = np.array(
        [[e4m3(int(flat[scale_place(row, k // 16, columns)])) for k in range(2 * half)] for row in range(n)]
    ) * float(tensors[f"{name}.weight_scale_2"])
    nibbles = np.array([[codes[row, k // 2] >> (0 if k % 2 else 4) & 15 for k in range(2 * half)] for row in range(n)])
    table = np.array([e2m1(code) for code in range(16)])
    return table[nibbles] * scales, scales, table
