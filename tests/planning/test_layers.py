"""Parameter counts by arithmetic equal those of the diffusers classes, for the shipped configs and for random ones."""

import json
import math

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcgen_convert import families
from dcgen_convert.core.errors import InputError
from dcgen_convert.families import catalog
from dcgen_convert.planning.arithmetic import forward_flops, lora_parameters, matching, train_flops, trainable
from dcgen_convert.planning.structures import structure

CONFIGS = catalog.CONFIGS
flags = st.booleans()
small = st.integers(1, 3)


def shipped(name: str) -> dict:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def family_of(config: dict) -> families.Family:
    """The family of a shipped config; of the only one that its pipeline tells, that one."""
    return families.recognise(config) or families.get("wan-image-a14b")


def agree(config: dict) -> torch.nn.Module:
    """The structure and the real class (on the meta device) have the same parameters, layer names and layer sizes."""
    with torch.device("meta"):
        model = getattr(diffusers, config["_class_name"]).from_config(config)
    found = structure(config, family_of(config))
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    kinds = (torch.nn.Linear, torch.nn.Conv2d | torch.nn.Conv3d)
    real = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    assert set(real) == {layer.name for layer in found.layers}
    for layer in found.layers:
        module = real[layer.name]
        assert layer.weights == module.weight.numel(), layer.name
        assert layer.bias == (0 if module.bias is None else module.bias.numel()), layer.name
        assert layer.outputs == module.weight.shape[0], layer.name
        assert layer.convolution == isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d), layer.name
    return model


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_configs(path):
    config = json.loads(path.read_text())
    agree(config)
    for f, c in ((32, 32), (64, 128), (128, 512)):
        agree(family_of(config).convert_config(config, f, c, 1024))


@pytest.mark.parametrize("channels, total", [(64, 11_901_408_320), (32, 11_901_211_680), (128, 11_901_801_600)])
def test_published_counts_of_flux(channels, total):
    assert structure({**shipped("flux-dev"), "in_channels": channels}).parameters == total


def test_lora_of_flux():
    found = structure(shipped("flux-dev"))
    adapted = matching(found, families.get("flux").lora_targets)
    assert len(adapted) == 418
    assert lora_parameters(adapted, 256) / 1e9 == pytest.approx(1.046, abs=5e-4)
    assert len(found.layers) == 504
    assert lora_parameters(list(found.layers), 256) / 1e9 == pytest.approx(1.388, abs=5e-4)
    modulation = [
        layer for layer in found.layers if layer.name.endswith((".norm1.linear", "_context.linear", ".norm.linear"))
    ]
    assert lora_parameters(adapted + modulation, 256) / 1e9 == pytest.approx(1.375, abs=5e-4)
    attention = [layer for layer in adapted if ".attn." in layer.name]
    assert (len(attention), round(lora_parameters(attention, 256) / 1e9, 3)) == (266, 0.418)


@settings(max_examples=15, deadline=None)
@given(
    small,
    st.integers(0, 3),
    small,
    st.sampled_from([8, 16]),
    st.integers(1, 40),
    st.integers(1, 40),
    flags,
    st.sampled_from([None, 12]),
)
def test_random_flux(doubles, singles, heads, width, text, pooled, guidance, out):
    agree(
        {
            "_class_name": "FluxTransformer2DModel", "num_layers": doubles, "num_single_layers": singles,
            "num_attention_heads": heads, "attention_head_dim": width, "in_channels": 20, "out_channels": out,
            "patch_size": 1, "joint_attention_dim": text, "pooled_projection_dim": pooled,
            "guidance_embeds": guidance, "axes_dims_rope": [2, 2, width - 4],
        }
    )  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(
    small,
    small,
    st.sampled_from([4, 8]),
    st.integers(1, 3),
    st.integers(1, 20),
    st.sampled_from([2.5, 3.0]),
    flags,
    flags,
    flags,
)
def test_random_sana(blocks, heads, width, patch, text, ratio, bias, affine, sprint):
    agree(
        {
            "_class_name": "SanaTransformer2DModel", "num_layers": blocks, "num_attention_heads": heads,
            "attention_head_dim": width, "num_cross_attention_heads": heads, "cross_attention_head_dim": width,
            "cross_attention_dim": heads * width, "caption_channels": text, "mlp_ratio": ratio, "attention_bias": bias,
            "patch_size": patch, "in_channels": 6, "out_channels": 5, "sample_size": 8,
            "norm_elementwise_affine": affine, "guidance_embeds": sprint,
            "qk_norm": "rms_norm_across_heads" if sprint or affine else None,
        }
    )  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(small, small, st.sampled_from([4, 8]), st.integers(1, 2), st.integers(1, 20), flags)
def test_random_dit(blocks, heads, width, patch, classes, bias):
    agree(
        {
            "_class_name": "DiTTransformer2DModel", "num_layers": blocks, "num_attention_heads": heads,
            "attention_head_dim": width, "patch_size": patch, "in_channels": 4, "out_channels": 8, "sample_size": 8,
            "num_embeds_ada_norm": classes, "attention_bias": bias,
        }
    )  # fmt: skip


@pytest.mark.parametrize("name", ["flux-dev", "sana-1.6b", "sana-sprint-1.6b", "dit-xl-256"])
def test_trained_parameters_are_those_of_peft(name):
    from peft import LoraConfig, inject_adapter_in_model

    config = {**shipped(name), "num_layers": 2}
    if "num_single_layers" in config:
        config["num_single_layers"] = 2
    family = families.recognise(config)
    found = trainable(structure(config), "lora", 16, family.lora_targets, (family.embedder, family.head))
    with torch.device("meta"):
        model = getattr(diffusers, config["_class_name"]).from_config(config)
        model.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=16, target_modules=family.lora_targets), model)
    for module in (family.embedder, family.head):
        model.get_submodule(module).requires_grad_(True)
    sizes = {True: 0, False: 0}
    for parameter in model.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    assert (found.trained, found.frozen) == (sizes[True], sizes[False])
    assert found.linears == sum("lora_A" in key and key.endswith("default") for key, _ in model.named_modules())


@pytest.mark.parametrize("name", ["flux-dev", "dit-xl-256", "wan-1.3b", "sana-video-2b"])
def test_flops_are_those_that_torch_counts(name):
    """Against torch's own counter on a small real model; sizes that no constant could hide in."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = {**shipped(name), "num_layers": 2, "num_attention_heads": 2}
    if name == "flux-dev":
        config |= {
            "num_single_layers": 3,
            "attention_head_dim": 32,
            "axes_dims_rope": [8, 12, 12],
            "joint_attention_dim": 40,
        }
    if name == "sana-video-2b":
        config |= {"num_cross_attention_heads": 2, "cross_attention_dim": 224}
    family = families.recognise(config)
    model = getattr(diffusers, config["_class_name"]).from_config(config).eval()
    frames = (3,) if family.axes == 3 else ()
    side, text = 32, 300 if frames else 7
    z = torch.randn(1, 4 if name == "dit-xl-256" else 16, *frames, side, side)
    if name == "flux-dev":
        condition = {"encoder_hidden_states": torch.randn(1, text, 40), "pooled_projections": torch.randn(1, 768)}
    elif name == "wan-1.3b":
        condition = {"encoder_hidden_states": torch.randn(1, text, 4096)}
    elif frames:
        condition = {"encoder_hidden_states": torch.randn(1, text, 2304), "encoder_attention_mask": torch.ones(1, text)}
    else:
        condition, text = {"class_labels": torch.tensor([1])}, 0
    # the counter does not know the fused CPU attention: let it see the two matrix products
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        family.predict(model, z, torch.tensor([0.5]), condition, torch.tensor([3.5]))
    tokens = (side // 2) ** 2 * math.prod(frames)
    assert forward_flops(structure(config), tokens, text) == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_training_flops_count_what_runs():
    """forward + activation gradients; then weights, recomputation and the null branch one by one."""
    assert train_flops(1.0, full=False, checkpointing=False, passes=0) == 2
    assert train_flops(1.0, full=True, checkpointing=False, passes=0) == 3
    assert train_flops(1.0, full=True, checkpointing=True, passes=1) == 5
    assert train_flops(1.0, full=False, checkpointing=False, passes=2) == 4


def test_unknown_classes_and_missing_sizes_are_refused():
    with pytest.raises(InputError, match="UNet2DModel"):
        structure({"_class_name": "UNet2DModel"})
    with pytest.raises(InputError, match="lacks attention_head_dim"):
        structure({"_class_name": "FluxTransformer2DModel"})
