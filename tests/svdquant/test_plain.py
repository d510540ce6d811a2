"""Plain block-16 NVFP4 (the container `bfl`): what we write is read by stock diffusers and by an independent emulation,
at SANA's real width of 2240, which no SVDQuant container holds.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import BFLQuantizationConfig, SanaTransformer2DModel
from diffusers.quantizers.bfl import utils as bfl
from safetensors.torch import load_file

from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import CheckFailed, InputError
from dcgen_convert.families import FAMILIES, QuantTargets
from dcgen_convert.families import sana as sana_family
from dcgen_convert.svdquant.activation import quantize_scaled
from dcgen_convert.svdquant.forms import formats_of
from dcgen_convert.svdquant.plain import NVFP4, PlainLinear, pack_plain, plain_spec, quantize_plain, unpack_plain
from dcgen_convert.svdquant.quantize import quantize
from dcgen_convert.svdquant.runtime import emulate, load_dequantised
from dcgen_convert.svdquant.settings import QuantSettings
from dcgen_convert.svdquant.stats import Gatherer
from dcgen_convert.svdquant.targets import plan_targets
from dcgen_convert.svdquant.tensors import check_tensors
from dcgen_convert.svdquant.weights import round_to_nearest

from .emulation import E2M1, Ops, half

WIDTH, WEIGHTS = 2240, "diffusion_pytorch_model.safetensors"
PLAIN = QuantSettings(rank=0)


def weight_of(tensors) -> np.ndarray:
    """float32 (N, K), fetched one by one: even channels in the lower four bits, a scale for each 16."""
    packed, scales = tensors["weight"].numpy(), tensors["weight_scale"].float().numpy()
    n, half_k = packed.shape
    weight = np.empty((n, 2 * half_k), np.float32)
    for k in range(2 * half_k):
        codes = packed[:, k // 2] >> 4 if k % 2 else packed[:, k // 2] & 15
        weight[:, k] = E2M1[codes] * (scales[:, k // 16] * tensors["weight_scale_2"].numpy())
    return weight


def inputs_of(x: torch.Tensor, scale: float) -> torch.Tensor:
    """x (T, K) as the kernel rounds it: e4m3 scales of 16 channels times ``scale``, ties to the even code."""
    groups = half(x).view(len(x), -1, 16)
    stored = (groups.abs().amax(-1, keepdim=True) / 6 * (1 / scale)).clamp(max=448).to(torch.float8_e4m3fn).float()
    wanted = groups * torch.where(stored > 0, 1 / (stored * scale).clamp(min=1e-38), 0)
    return (Ops._e2m1(wanted) * stored * scale).view_as(x)


def kernel(self, inputs):
    """`BFLNVFP4Linear.forward` as FlashInfer computes it: products of 4-bit numbers, summed in float32."""
    x = inputs.reshape(-1, self.in_features).float()
    weight = {name: getattr(self, name).detach() for name in ("weight", "weight_scale", "weight_scale_2")}
    y = half(inputs_of(x, self.input_scale.item()) @ torch.from_numpy(weight_of(weight)).T)
    y = y if self.bias is None else half(y + self.bias.float())
    return y.reshape(*inputs.shape[:-1], -1).to(self.compute_dtype)


def call(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(2, 8, 6, 6, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=generator),
        "timestep": torch.tensor([300, 700]),
    }


@pytest.fixture(scope="module")
def sana(tmp_path_factory):
    """A SANA of one block of the real width with random weights; its MLP, of convolutions, is narrow."""
    torch.manual_seed(0)
    model = SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=70,
        attention_head_dim=32,
        num_layers=1,
        num_cross_attention_heads=20,
        cross_attention_head_dim=112,
        cross_attention_dim=WIDTH,
        caption_channels=32,
        mlp_ratio=0.1,
        sample_size=32,
        patch_size=1,
    )
    root = tmp_path_factory.mktemp("sana")
    model.to(torch.bfloat16).save_pretrained(root / "dense")
    config = json.loads((root / "dense" / "config.json").read_text())
    targets = plan_targets(sana_family.Sana(), config, None, "bfl")
    calls = [call(seed) for seed in range(2)]
    records = quantize(root / "dense", root / "plain", targets, PLAIN, calls, NULL)
    return SimpleNamespace(dense=model.float().eval(), folder=root / "plain", targets=targets, records=records)


def stock(folder, dtype):
    """As diffusers documents it."""
    options = {"config": str(folder), "quantization_config": BFLQuantizationConfig(dtype), "dtype": dtype}
    return SanaTransformer2DModel.from_single_file(str(folder / WEIGHTS), **options)


def test_every_linear_of_the_real_width_is_held(sana):
    wanted = {
        f"transformer_blocks.0.{name}"
        for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0")
    }
    assert set(sana.targets.svdq) == wanted == set(formats_of(sana.folder)) and not sana.targets.impossible
    assert all(record["shape"] == [WIDTH, WIDTH] and 0 < record["error"] < 0.2 for record in sana.records)
    assert json.loads((sana.folder / "config.json").read_text())["quantization_config"] == {"quant_method": "bfl"}
    with pytest.raises(InputError, match="multiples of 128, it has 2240 -> 2240") as caught:
        plan_targets(sana_family.Sana(), json.loads((sana.folder / "config.json").read_text()), None)
    assert "quantize.container=bfl" in caught.value.hint


def test_stock_diffusers_opens_it_and_computes_what_we_dequantise(sana):
    model = stock(sana.folder, torch.float32)
    assert {n for n, m in model.named_modules() if isinstance(m, bfl.BFLNVFP4Linear)} == set(sana.targets.svdq)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    with torch.no_grad():
        theirs, ours = model(**call(9)).sample, load_dequantised(sana.folder, torch.float32)(**call(9)).sample
        wanted = sana.dense(**call(9)).sample
    assert torch.equal(theirs, ours)
    assert 1e-3 < (theirs - wanted).norm() / wanted.norm() < 0.1


def test_our_emulation_is_that_of_the_kernel_written_independently(sana, monkeypatch):
    monkeypatch.setattr(bfl.BFLNVFP4Linear, "forward", kernel)
    given = {name: value.bfloat16() if value.is_floating_point() else value for name, value in call(9).items()}
    with torch.no_grad():
        theirs = stock(sana.folder, torch.bfloat16)(**given).sample.float()
        ours = emulate(sana.folder, torch.bfloat16)(**given).sample.float()
        wanted = sana.dense(**call(9)).sample
    lost = (theirs - wanted).norm()
    assert lost < 0.15 * wanted.norm()
    # Same arithmetic. Float32 sums differ in order, and now and then a bfloat16 or 4-bit number falls the other way.
    assert (ours - theirs).norm() < min(0.01 * theirs.norm(), 0.1 * lost)


def test_the_written_tensors_are_the_rounded_layer(sana):
    name = sana.targets.svdq[3]
    found = {key.removeprefix(f"{name}."): value for key, value in load_file(sana.folder / WEIGHTS).items()}
    tensors = {key: found[key] for key in plain_spec((WIDTH, WIDTH), True)}
    layer = unpack_plain(tensors)
    assert np.array_equal(weight_of(tensors), layer.dense().numpy())
    assert all(torch.equal(value, tensors[key]) for key, value in pack_plain(layer).items())
    dense = sana.dense.get_submodule(name).weight
    assert (layer.dense() - dense).norm() < 0.12 * dense.norm()


def gathered(x: torch.Tensor):
    gatherer = Gatherer("layer", x.shape[1], 1, seed=0)
    gatherer.add(x, 0)
    return gatherer.stats(readers=1)


def correlated(tokens: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(tokens, 12, generator=generator) @ torch.randn(12, k, generator=generator) + torch.randn(
        tokens, k, generator=generator
    )


def test_rounding_on_the_hessian_beats_rounding_to_nearest():
    """The error of the weights' part alone, on tokens that took no part."""
    x, weight = correlated(4000, 96), torch.randn(64, 96, generator=torch.Generator().manual_seed(5))
    layer = quantize_plain("layer", weight, None, gathered(x[:3000]), PLAIN)
    quantised = layer.quantised
    nearest = round_to_nearest(weight, quantised.micro, quantised.tensor_scale, NVFP4).dequantise()
    ours, plain = ((x[3000:] @ (found - weight).T).norm() for found in (layer.dense(), nearest))
    assert ours < 0.7 * plain
    assert layer.record["error"] < layer.record["error_rtn"]


def test_inputs_are_cut_off_only_beyond_twice_what_the_calibration_saw():
    x = correlated(64, 96)
    layer = quantize_plain("layer", torch.eye(96), None, gathered(x), PLAIN)
    for factor, least, most in ((1e-3, 0, 0.1), (1.0, 0, 0.1), (2.0, 0, 0.1), (4.0, 0.1, 0.8)):
        error = (quantize_scaled(x * factor, layer.input_scale) - x * factor).norm() / (x * factor).norm()
        assert least < error < most, factor
    ours, theirs = (rounded(x, layer.input_scale) for rounded in (quantize_scaled, inputs_of))
    assert ((ours - theirs).abs() > 1e-5 * theirs.abs()).float().mean() < 0.002  # ties, of a product and of a quotient
    assert not quantize_scaled(torch.zeros(2, 32), 0.3).any()


def test_an_input_that_is_always_zero_has_a_scale():
    layer = quantize_plain("layer", torch.eye(32), None, gathered(torch.zeros(8, 32)), PLAIN)
    assert layer.input_scale == 1 and torch.isfinite(layer.output(torch.ones(1, 32))).all()


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: QuantSettings(rank=0, precision="int4"), "rank 0 is for nvfp4 only"),
        (lambda: QuantSettings(rank=0, calibration="none"), "needs calibration"),
        (lambda: quantize_plain("a", torch.ones(32, 48), None, gathered(torch.ones(8, 48)), PLAIN), "multiples of 32"),
        (lambda: quantize_plain("a", torch.full((32, 32), torch.nan), None, gathered(torch.ones(8, 32)), PLAIN), "NaN"),
    ],
)
def test_what_it_cannot_hold_is_refused(make, sentence):
    with pytest.raises(InputError) as caught:
        make()
    assert sentence in caught.value.message


def test_a_scale_that_is_not_above_zero_is_no_layer():
    layer = quantize_plain("a", torch.eye(32), None, gathered(torch.ones(8, 32)), PLAIN)
    wrong = PlainLinear(layer.quantised, 0.0, None)
    with pytest.raises(CheckFailed, match="a.input_scale is 0; a scale is above zero"):
        check_tensors("a", pack_plain(wrong), plain_spec((32, 32), False))


def test_targets_without_a_place_are_dense():
    linears = {"transformer_blocks.0.attn.to_q": (96, 96), "transformer_blocks.0.norm1.linear": (768, 128)}
    family = FAMILIES["flux"]
    found = family.quant_targets(linears, None, "bfl")
    assert found == QuantTargets(
        ["transformer_blocks.0.attn.to_q"],
        [],
        {"transformer_blocks.0.norm1.linear": "kept dense, the container bfl has no W4A16"},
        family.blocks,
    )


def test_families_say_whether_diffusers_has_a_reader_of_single_files():
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    known = {*SINGLE_FILE_LOADABLE_CLASSES, "UNet2DConditionModel"}
    assert {name: family.single_file for name, family in FAMILIES.items()} == {
        name: family.model_class in known for name, family in FAMILIES.items()
    }
