"""GPTQ (arXiv 2210.17323) in its equivalent LDLQ form (arXiv 2307.13304, theorem 6): one Cholesky factor, no inverse.

It minimises tr((W - Q) H (W - Q)^T). Write H = (I + M) D (I + M)^T with M strictly lower triangular. The columns are
rounded from the last to the first: Q_k = round(W_k + sum_{j > k} (W_j - Q_j) M_jk). Shapes: W (N, K), H (K, K). The
code works on the transpose (K, N), so that a column is contiguous.
"""

import torch

from dcgen_convert.core import pulse
from dcgen_convert.svdquant.formats import ROUND
from dcgen_convert.svdquant.settings import GROUP
from dcgen_convert.svdquant.weights import GRID, QuantWeight, round_to_nearest

BLOCK = 128
CLEAR = 0.9  # below this fraction of the objective without feedback, rounding to nearest cannot win


def shrink(hessian: torch.Tensor, count: int) -> torch.Tensor:
    """Pull the Hessian's off-diagonal towards zero, as far as the sampling noise of `count` tokens explains it. Works
    in place.

    The intensity is Ledoit and Wolf's (2004) for a diagonal target: sum Var(h_ij) / sum h_ij^2 over i != j, with
    Var(h_ij) = (h_ii h_jj + h_ij^2) / n as for normal inputs. Without it, few tokens show correlations that do not
    exist; GPTQ would follow them, and could then be worse than rounding to nearest.
    """
    diagonal = hessian.diagonal().clone()
    off = max((hessian.norm().square() - diagonal.square().sum()).item(), 0.0)
    pairs = (diagonal.sum().square() - diagonal.square().sum()).item()
    keep = 1 - min(1.0, (pairs + off) / (max(count, 1) * off)) if off > 0 else 0.0
    hessian.mul_(keep).diagonal().copy_(diagonal)
    return hessian


def factor(hessian: torch.Tensor) -> torch.Tensor | None:
    """Lower Cholesky factor L (K, K) of the damped Hessian; None when even that is not positive definite.

    Damping is 1 % of the mean diagonal, or more where float32 rounding of the largest eigenvalue needs it. The factor
    overwrites the Hessian: at 15360 channels a second copy would take 0.9 GB.
    """
    diagonal = hessian.diagonal()
    vector = diagonal.clone()
    for _ in range(8):  # power iteration
        vector = hessian @ (vector / vector.norm().clamp(min=1e-30))
    rounding = 32 * torch.finfo(torch.float32).eps * vector.norm()
    diagonal.add_(torch.maximum(0.01 * diagonal.mean(), rounding).clamp(min=1e-30))
    lower = hessian.mT  # column-major, as LAPACK wants it; the matrix is symmetric
    info = torch.empty((), dtype=torch.int32, device=hessian.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    return lower if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()) else None


def gptq(weight: torch.Tensor, lower: torch.Tensor, micro: torch.Tensor, scale: float, precision: str) -> QuantWeight:
    """Round `weight` (N, K) column by column on fixed scales, and feed each column's error into those that follow.

    lower: from `factor`. micro (N, K / g), scale: from `weights.group_scales`, `weights.tensor_scale`. The result is
    never worse than rounding to nearest under H = L L^T. Where feedback gains little, rounding to nearest can win by
    chance; then both are compared, and the better one is returned.
    """
    k = weight.shape[1]
    target = weight.T.contiguous()  # (K, N); a finished column is overwritten by its error
    grid = torch.empty_like(target, dtype=GRID)
    scales = (micro * scale).T.contiguous()  # (G, N)
    diagonal = lower.diagonal()  # L / diagonal = I + M, D = diagonal^2
    # ||e_k||^2 of what was rounded; sum_k D_k ||e_k||^2 is the objective
    rounding_error = torch.empty(k, device=weight.device)
    group, rounding = GROUP[precision], ROUND[precision]
    for stop in range(k, 0, -BLOCK):
        pulse.bump()
        start = max(0, stop - BLOCK)
        width = stop - start
        feedback = (lower[start:, start:stop] / diagonal[start:stop]).T.contiguous()  # (width, K - start)
        wanted = feedback[:, width:] @ target[stop:]  # (width, N): so far the errors of the finished columns
        for j in range(width - 1, -1, -1):
            column, step, value = start + j, scales[(start + j) // group], wanted[j]
            value += target[column]
            if j + 1 < width:
                value += feedback[j, j + 1 : width] @ target[column + 1 : stop]
            rounded = rounding(value / step)
            grid[column] = rounded
            target[column].addcmul_(rounded, step, value=-1)
        steps = scales[start // group : stop // group].repeat_interleave(group, 0)  # (width, N)
        rounding_error[start:stop] = wanted.addcmul_(grid[start:stop].float(), steps, value=-1).square_().sum(1)
    spent = diagonal.square() @ rounding_error
    without_feedback = torch.linalg.vector_norm(lower, dim=1).square() @ rounding_error  # sum_k H_kk ||e_k||^2
    if spent > CLEAR * without_feedback:
        del target  # a copy of the layer; as few of them as possible exist at one time
        plain = round_to_nearest(weight, micro, scale, precision)
        if _objective(plain.dequantise().sub_(weight), lower) < spent:
            return plain
    return QuantWeight(grid.T.contiguous(), micro, scale, precision)


def _objective(error: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """tr(E L L^T E^T) for E (N, K), a block of columns of E L at a time."""
    blocks = range(0, error.shape[1], BLOCK)
    parts = ((error[:, start:] @ lower[start:, start : start + BLOCK]).square().sum() for start in blocks)
    return sum(parts, start=error.new_zeros(()))
