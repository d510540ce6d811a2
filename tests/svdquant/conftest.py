"""A tiny random FLUX transformer folder, its targets, and calls of its forward."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel

from dcgen_convert.families import QuantTargets
from dcgen_convert.svdquant import layer


def flux_model(seed: int = 0, layers: int = 1, singles: int = 1) -> FluxTransformer2DModel:
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        in_channels=32,
        num_layers=layers,
        num_single_layers=singles,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    for name, parameter in model.named_parameters():
        if name.endswith("norm.linear.weight") or ".norm1" in name:
            parameter.data.mul_(3)  # let the modulation move tokens apart
    return model.to(torch.bfloat16).eval().requires_grad_(False)


def flux_targets(model) -> QuantTargets:
    inside = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "transformer_blocks" in name
    ]
    svdq, awq = ([name for name in inside if (".norm" in name) is modulation] for modulation in (False, True))
    return QuantTargets(svdq, awq)


def flux_call(seed: int, batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.zeros(36), torch.arange(36) // 6, torch.arange(36) % 6], 1)
    return {
        "hidden_states": torch.randn(batch, 36, 32, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 8, 64, generator=generator),
        "pooled_projections": torch.randn(batch, 64, generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        "guidance": torch.full((batch,), 3.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(8, 3),
    }


@pytest.fixture(scope="module")
def no_refits():
    """Layers are quantised once instead of three times, to save time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "REFITS", 0)
        yield


@pytest.fixture(scope="session")
def flux(tmp_path_factory):
    """folder, model (float32), targets, calls."""
    folder = tmp_path_factory.mktemp("flux") / "transformer"
    model = flux_model()
    model.save_pretrained(folder)
    return SimpleNamespace(
        folder=folder, model=model.float(), targets=flux_targets(model), calls=[flux_call(seed) for seed in range(3)]
    )
