"""Group-scaled 4-bit weights: scales, round-to-nearest, and the value a code stands for.

N out channels, K in channels, g group (nvfp4 16, int4 64), G = K / g.
"""

from dataclasses import dataclass

import torch

from dcgen_convert.svdquant.formats import DECODE, E2M1_MAX, E4M3_MAX, ENCODE, ROUND, round_bf16, round_e4m3
from dcgen_convert.svdquant.settings import GROUP

GRID = torch.bfloat16  # holds every e2m1 and int4 value exactly, in half the memory
GRID_MAX = {"nvfp4": E2M1_MAX, "int4": 7.0}
# Weights that are rounded at once: several copies of 1 MB stay in a core's cache, and no copy is a whole layer.
CACHED = 1 << 18
HEADROOM = 1.4  # searched scales may grow past abs-max / 6; keep them below e4m3's largest value
# Candidate scales relative to abs-max / grid maximum. A factor below 1 clips the largest weights; a factor above 1
# moves them away from the coarse end of the grid.
FACTORS = {"nvfp4": (0.80, 0.86, 0.92, 1.0, 1.09, 1.17, 1.25, 1.34), "int4": (0.70, 0.76, 0.82, 0.88, 0.94, 1.0, 1.07)}


@dataclass
class QuantWeight:
    """A 4-bit weight: value[n, k] = grid[n, k] * micro[n, k // g] * tensor_scale. `grid` holds e2m1 or int4 values as
    bfloat16 (N, K).
    """

    grid: torch.Tensor
    micro: torch.Tensor  # (N, G) float32 that e4m3 (nvfp4) or bfloat16 (int4) holds exactly
    tensor_scale: float  # a bfloat16 value; 1.0 for int4
    precision: str

    def dequantise(self) -> torch.Tensor:
        """float32 (N, K)."""
        n, k = self.grid.shape
        scales = (self.micro * self.tensor_scale).unsqueeze(-1)
        return (self.grid.view(n, -1, GROUP[self.precision]) * scales).view(n, k)

    def codes(self) -> torch.Tensor:
        """Nibbles, uint8 (N, K)."""
        return ENCODE[self.precision](self.grid)

    @classmethod
    def from_codes(cls, codes: torch.Tensor, micro: torch.Tensor, tensor_scale: float, precision: str) -> "QuantWeight":
        """From nibbles (N, K) and scales (N, G)."""
        return cls(DECODE[precision](codes).to(GRID), micro.float(), tensor_scale, precision)


def tensor_scale(weight: torch.Tensor, precision: str) -> float:
    """The scalar that keeps every micro scale inside e4m3. It is a bfloat16 value, because the runtime casts wtscale to
    bfloat16. int4 has none.
    """
    if precision == "int4":
        return 1.0
    largest = weight.abs().max().item()
    return round_bf16(torch.tensor(largest / (E2M1_MAX * E4M3_MAX / HEADROOM))).item() if largest > 0 else 1.0


def group_scales(
    weight: torch.Tensor, precision: str, scale: float, factor: torch.Tensor | None = None
) -> torch.Tensor:
    """Micro scales (N, G), float32, rounded to the stored format: abs-max / 6 (nvfp4) or / 7 (int4), times `factor`
    (N, G).
    """
    base = _groups(weight, precision).abs().amax(-1) / (GRID_MAX[precision] * scale)
    return _stored(base if factor is None else base * factor, precision)


def search_factor(
    weight: torch.Tensor, precision: str, scale: float, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """Per group (N, G) the factor on its abs-max scale with the least sum_k importance[k] (w[n, k] - Q(w[n, k]))^2.

    importance (K,) is the mean square of the inputs, None for ones.
    """
    return torch.cat([_search_factor(part, precision, scale, importance) for part in weight.split(_rows(weight))])


def _search_factor(weight: torch.Tensor, precision: str, scale: float, importance: torch.Tensor | None) -> torch.Tensor:
    groups = _groups(weight, precision)  # (N, G, g)
    largest = groups.abs().amax(-1) / (GRID_MAX[precision] * scale)
    weights = None if importance is None else importance.view(1, -1, GROUP[precision])
    best = torch.ones(groups.shape[:2], device=weight.device)
    best_error = torch.full_like(best, torch.inf)
    for factor in FACTORS[precision]:
        micro = _stored(largest * factor, precision)
        error = _group_error(groups, (micro * scale).unsqueeze(-1), precision, weights)
        better = error < best_error
        best, best_error = torch.where(better, factor, best), torch.where(better, error, best_error)
    return best


def _rows(weight: torch.Tensor) -> int:
    return max(1, CACHED // weight.shape[1])


def _groups(weight: torch.Tensor, precision: str) -> torch.Tensor:
    return weight.view(weight.shape[0], -1, GROUP[precision])


def round_to_nearest(weight: torch.Tensor, micro: torch.Tensor, scale: float, precision: str) -> QuantWeight:
    """Every weight to the nearest multiple of its group's scale that the format has."""
    grid, rows = torch.empty_like(weight, dtype=GRID), _rows(weight)
    for out, part, scales in zip(grid.split(rows), weight.split(rows), (micro * scale).split(rows), strict=True):
        out.copy_(ROUND[precision](_groups(part, precision) / scales.unsqueeze(-1)).view_as(part))
    return QuantWeight(grid, micro, scale, precision)


def _stored(micro: torch.Tensor, precision: str) -> torch.Tensor:
    """Scales as the file keeps them. The smallest scale replaces 0; the codes of such a group are 0 or exact."""
    if precision == "nvfp4":
        return round_e4m3(micro).clamp_(min=2.0**-9)
    return round_bf16(micro).clamp_(min=2.0**-100)


def _group_error(
    groups: torch.Tensor, scales: torch.Tensor, precision: str, importance: torch.Tensor | None
) -> torch.Tensor:
    error = ROUND[precision](groups / scales).mul_(scales).sub_(groups).square_()
    return (error if importance is None else error.mul_(importance)).sum(-1)
