"""Transformers that come alone: single files of every kind against the folder they were made from, and LoRAs against
diffusers.
"""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from conftest import WEIGHTS
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from dcgen_convert.bundle.inspection import inspect
from dcgen_convert.checkpoint import keymap, stream
from dcgen_convert.checkpoint.headers import read_header, read_weights
from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.errors import AccessError, InputError
from dcgen_convert.families import grid
from dcgen_convert.networks import models
from dcgen_convert.recipe import loading
from dcgen_convert.recipe.identity import Identity

BASE = WEIGHTS / "tiny-flux"
FILE = BASE / "transformer" / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def weights():
    """tiny-flux, bfloat16."""
    return load_file(FILE)


def to_bfl(tensors):
    """Diffusers' tensors under BFL's names."""
    stacks = keymap.find("flux", "bfl").backward({name: tuple(value.shape) for name, value in tensors.items()})
    return {
        name: torch.cat([tensors[cut.name][cut.start : cut.stop] for cut in stack.cuts]).reshape(stack.shape)
        for name, stack in stacks.items()
    }


def laid_out(path, home, base=BASE, **options):
    """State of the transformer that stage import makes of ``path``, loaded by diffusers."""
    source = load_source("x", str(path), base=str(base) if base else None, home=home / "import", **options)
    source.lay_out(NULL)
    model = models.load(source.transformer, torch.float32)
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name].float()), name


def test_a_streamed_file_has_the_librarys_bytes(tmp_path, weights):
    tensors = {**weights, "a": torch.ones(3, dtype=torch.float16), "z": torch.tensor(1.5), "i": torch.arange(5)}
    save_file(tensors, tmp_path / "library.safetensors", {"format": "pt"})
    entries, metadata = read_header(tmp_path / "library.safetensors")
    items = {name: stream.whole(name, entry) for name, entry in entries.items()}
    stream.write(tmp_path / "mine.safetensors", items, metadata)
    assert (tmp_path / "mine.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nan_and_infinity_are_found_and_large_numbers_are_not(tmp_path, dtype):
    largest = torch.finfo(dtype).max
    for value, broken in ((largest, False), (-largest, False), (float("nan"), True), (float("-inf"), True)):
        numbers = torch.zeros(70_000, dtype=dtype)
        numbers[69_999] = value
        data = numbers.view(torch.uint8).numpy().tobytes()
        name = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}[dtype]
        if broken:
            with pytest.raises(InputError, match="NaN or infinite values in w"):
                stream.require_finite(data, name, "w", tmp_path)
        else:
            stream.require_finite(data, name, "w", tmp_path)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_bfl_and_all_in_one_files_are_the_folder(tmp_path, weights, prefix):
    path = tmp_path / "model.safetensors"
    tensors = {prefix + name: value for name, value in to_bfl(weights).items()}
    if prefix == "model.diffusion_model.":
        tensors |= {"vae.decoder.conv_in.weight": torch.ones(2), "text_encoders.clip_l.x": torch.ones(3)}
    save_file(tensors, path)
    same(laid_out(path, tmp_path), weights)
    found = inspect(path)
    assert (found["kind"], found["family"], found["layout"]) == ("checkpoint", "flux", "bfl")
    assert found["sizes"] == {key: value for key, value in inspect(BASE)["sizes"].items()} | {"out_channels": 64}


def test_the_written_folder_is_complete_and_keeps_the_config(tmp_path, weights):
    save_file(to_bfl(weights), tmp_path / "model.safetensors")
    laid_out(tmp_path / "model.safetensors", tmp_path)
    FluxPipeline.from_pretrained(tmp_path / "import")
    written, base = (
        json.loads((folder / "transformer" / "config.json").read_text()) for folder in (tmp_path / "import", BASE)
    )
    assert {**written, "out_channels": None} == base | {"_diffusers_version": written.get("_diffusers_version")}


def test_a_width_that_diffusers_refuses(tmp_path):
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=32, num_attention_heads=3,
        joint_attention_dim=24, pooled_projection_dim=12, guidance_embeds=False, axes_dims_rope=(8, 12, 12),
    ).float()  # fmt: skip
    save_file(to_bfl(model.state_dict()), tmp_path / "model.safetensors")
    same(laid_out(tmp_path / "model.safetensors", tmp_path), model.state_dict())


def test_diffusers_names_in_one_file_and_a_transformer_folder_alone(tmp_path, weights):
    save_file({f"transformer.{name}": value for name, value in weights.items()}, tmp_path / "model.safetensors")
    same(laid_out(tmp_path / "model.safetensors", tmp_path), weights)
    shutil.copytree(BASE / "transformer", tmp_path / "alone")
    same(laid_out(tmp_path / "alone", tmp_path / "second"), weights)


def test_precision_variants_of_a_pipeline(tmp_path, weights):
    folder = tmp_path / "pipeline"
    shutil.copytree(BASE, folder)
    model = FluxTransformer2DModel.from_pretrained(BASE / "transformer", dtype=torch.bfloat16)
    shutil.rmtree(folder / "transformer")
    model.save_pretrained(folder / "transformer", variant="fp16", max_shard_size="2MB")
    (folder / "vae" / FILE.name).rename(folder / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    (folder / "text_encoder" / "model.safetensors").rename(folder / "text_encoder" / "model.fp16.safetensors")
    assert len(list((folder / "transformer").glob("*.fp16-0000?-of-0000?.safetensors"))) > 1
    assert len(read_weights(folder / "transformer")) == len(weights)
    same(laid_out(folder, tmp_path, base=None), weights)
    assert FluxPipeline.from_pretrained(tmp_path / "import").text_encoder is not None


def scaled(tensors, per_row):
    """Linear weights as float8 with scales, and the numbers that these stand for."""
    stored, exact = {}, {}
    for name, value in tensors.items():
        if value.ndim < 2:
            stored[name] = exact[name] = value
            continue
        exactly = value.float()
        peak = exactly.abs().amax(1) if per_row else exactly.abs().amax()
        scale = peak / 448
        rows = scale[:, None] if per_row else scale
        stored[name] = (exactly / rows).to(torch.float8_e4m3fn)
        stored[f"{name.removesuffix('.weight')}.scale_weight"] = scale
        exact[name] = (stored[name].float() * rows).bfloat16()
    return stored, exact


@pytest.mark.parametrize("per_row", [False, True])
def test_scaled_float8(tmp_path, weights, per_row):
    stored, exact = scaled(to_bfl(weights), per_row)
    extra = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn), "img_in.scale_input": torch.ones(())}
    save_file(
        {f"model.diffusion_model.{name}": value for name, value in (stored | extra).items()},
        tmp_path / "model.safetensors",
    )
    found = laid_out(tmp_path / "model.safetensors", tmp_path)
    wanted = {name: value.float() for name, value in to_bfl(found).items()}
    assert all(torch.equal(wanted[name], exact[name].float()) for name in exact)


def test_plain_float8_is_upcast_and_said(tmp_path, weights, capsys):
    cast = {name: value.to(torch.float8_e4m3fn) if value.ndim > 1 else value for name, value in weights.items()}
    save_file(cast, tmp_path / "model.safetensors")
    source = load_source("x", str(tmp_path / "model.safetensors"), base="tiny-flux", home=tmp_path / "import")
    source.lay_out(Console("human"))
    assert "float8 e4m3: they become bfloat16, but keep 3 bits" in capsys.readouterr().err
    state = models.load(source.transformer, torch.float32).state_dict()
    same(state, {name: value.bfloat16() for name, value in cast.items()})
    assert "float8" in inspect(tmp_path / "model.safetensors")["notes"][0]


def write_gguf(path, tensors, kinds):
    writer = gguf.GGUFWriter(path, "flux")
    for name, value in tensors.items():
        kind = kinds[0] if value.ndim > 1 and value.shape[-1] % 32 == 0 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(value.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "BF16", "F16"])
def test_gguf_is_what_its_package_makes_of_it(tmp_path, weights, kind):
    path = tmp_path / "model.gguf"
    originals = to_bfl(weights)
    write_gguf(path, originals, [gguf.GGMLQuantizationType[kind]])
    found = to_bfl(laid_out(path, tmp_path))
    for tensor in gguf.GGUFReader(path).tensors:
        numbers = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)).reshape(
            found[tensor.name].shape
        )
        rounded = numbers if tensor.tensor_type.name in ("F32", "F16") else numbers.bfloat16().float()
        assert torch.equal(found[tensor.name], rounded), tensor.name
    assert inspect(path)["layout"] == "bfl"
    assert loading.load(str(path), flags={"base": str(BASE)}).recipe.name == "model"


# -- LoRA ------------------------------------------------------------------------------------------------------------

TARGETS = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.2", "single_transformer_blocks.3.proj_mlp"]
ROWS = (128, 128, 512)  # outputs of these


def pair(rank, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(rank, columns, generator=generator), 0.1 * torch.randn(rows, rank, generator=generator)


def peft_file(path, weights, alpha):
    tensors = {}
    for i, module in enumerate(TARGETS):
        down, up = pair(4, *weights[f"{module}.weight"].shape, i)
        tensors |= {f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up}
        if alpha:
            tensors[f"transformer.{module}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)


def fused_by_diffusers(path, scale):
    pipeline = FluxPipeline.from_pretrained(BASE, text_encoder=None, text_encoder_2=None, vae=None, dtype=torch.float32)
    pipeline.load_lora_weights(path)
    pipeline.fuse_lora(lora_scale=scale)
    pipeline.unload_lora_weights()
    return pipeline.transformer.state_dict()


def close(found, reference, weights):
    """Equal to the reference but for the rounding of the stored bfloat16 weight; untouched tensors bit for bit."""
    changed = 0
    for name, wanted in reference.items():
        if torch.equal(wanted, weights[name].float()):
            assert torch.equal(found[name], wanted), name
        else:
            changed += 1
            torch.testing.assert_close(found[name], wanted, rtol=2**-8, atol=1e-6)
    return changed


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_a_lora_is_fused_as_diffusers_fuses_it(tmp_path, weights, scale):
    peft_file(tmp_path / "lora.safetensors", weights, alpha=False)
    option = str(tmp_path / "lora.safetensors") + ("" if scale == 1 else f":{scale}")
    found = laid_out(BASE, tmp_path, base=None, loras=[option])
    assert close(found, fused_by_diffusers(tmp_path / "lora.safetensors", scale), weights) == len(TARGETS)


KOHYA = {  # BFL's names with underscores
    "double_blocks_0_img_attn_qkv": "double_blocks.0.img_attn.qkv",
    "double_blocks_1_txt_mlp_0": "double_blocks.1.txt_mlp.0",
    "single_blocks_2_linear2": "single_blocks.2.linear2",
}


def kohya_file(path, originals, names):
    tensors = {}
    for i, (short, module) in enumerate(names.items()):
        down, up = pair(4, *originals[f"{module}.weight"].shape, i)
        tensors |= {f"lora_unet_{short}.lora_down.weight": down, f"lora_unet_{short}.lora_up.weight": up}
        tensors[f"lora_unet_{short}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)
    return tensors


def test_a_kohya_lora_is_fused_as_diffusers_fuses_it(tmp_path, weights):
    path = tmp_path / "lora.safetensors"
    kohya_file(path, to_bfl(weights), KOHYA)
    found = laid_out(BASE, tmp_path, base=None, loras=[f"{path}:0.5"])
    assert close(found, fused_by_diffusers(path, 0.5), weights) == 5


def test_loras_on_fused_linears_and_swapped_halves_add_up(tmp_path, weights):
    """Against the dense sum in BFL's own layout, float64: linear1 (q, k, v and mlp) and the output norm."""
    originals = to_bfl(weights)
    names = {
        "single_blocks_1_linear1": "single_blocks.1.linear1",
        "final_layer_adaLN_modulation_1": "final_layer.adaLN_modulation.1",
    }
    tensors = kohya_file(tmp_path / "lora.safetensors", originals, names)
    wanted = {name: value.double() for name, value in originals.items()}
    for short, module in names.items():
        down, up = (tensors[f"lora_unet_{short}.lora_{part}.weight"].double() for part in ("down", "up"))
        wanted[f"{module}.weight"] += (0.3 + 1.0) * 0.5 * up @ down
    save_file(originals, tmp_path / "model.safetensors")
    path = tmp_path / "lora.safetensors"
    found = to_bfl(laid_out(tmp_path / "model.safetensors", tmp_path, loras=[f"{path}:0.3", str(path)]))
    for name in wanted:
        torch.testing.assert_close(found[name].double(), wanted[name], rtol=2**-8, atol=1e-7)
        assert name.removesuffix(".weight") in names.values() or torch.equal(found[name].double(), wanted[name])


def test_a_lora_changes_the_fingerprint(tmp_path, weights):
    peft_file(tmp_path / "a.safetensors", weights, alpha=False)
    peft_file(tmp_path / "b.safetensors", weights, alpha=True)
    a, b = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    prints = [
        load_source("x", str(BASE), loras=loras, home=tmp_path / "i").fingerprint
        for loras in ([a], [b], [f"{a}:0.5"], [a, b])
    ]
    assert len({*prints, load_source("x", str(BASE)).fingerprint}) == 5


def edit(tensors, changes):
    return {name: value for name, value in {**tensors, **changes}.items() if value is not None}


DOWN, UP = (f"transformer.{TARGETS[0]}.lora_{part}.weight" for part in "AB")


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"transformer.nowhere.lora_A.weight": torch.ones(4, 8), "transformer.nowhere.lora_B.weight": torch.ones(8, 4)},
         "merged 3 of 4 LoRA updates .* has no nowhere"),
        ({UP: None}, "lacks its down or up weight"),
        ({UP: torch.ones(7, 4)}, r"the update of transformer_blocks.0.attn.to_q is \[7, 4\] x \[4, 128\]"),
        ({UP: torch.ones(128, 5)}, "which do not multiply"),
        ({f"transformer.{TARGETS[0]}.dora_scale": torch.ones(1)}, "no plain LoRA weight"),
        ({f"transformer.{TARGETS[0]}.lora_B.bias": torch.ones(128)}, "no plain LoRA weight"),
        ({UP: torch.full((128, 4), float("nan"))}, "NaN or infinite"),
        ({f"transformer.{m}.lora_B.weight": torch.zeros(r, 4) for m, r in zip(TARGETS, ROWS, strict=True)},
         "changes nothing"),
    ],
)  # fmt: skip
def test_loras_that_do_not_fit(tmp_path, weights, changes, says):
    path = tmp_path / "lora.safetensors"
    peft_file(path, weights, alpha=False)
    save_file(edit(load_file(path), changes), path)
    with pytest.raises(InputError, match=says):
        laid_out(BASE, tmp_path, base=None, loras=[str(path)])


def test_a_file_that_is_no_lora_and_one_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no plain LoRA weight"):
        laid_out(BASE, tmp_path, base=None, loras=[str(FILE)])
    with pytest.raises(InputError, match=r"none.safetensors is no file"):
        laid_out(BASE, tmp_path, base=None, loras=["none.safetensors:0.5"])


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"img_in.qweight": torch.zeros(4, dtype=torch.int8)}, "already quantised .nunchaku or GPTQ"),
        ({"img_in.weight.absmax": torch.zeros(4)}, "already quantised .bitsandbytes"),
        (
            {"img_in.weight.quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8)},
            "already quantised .bitsandbytes",
        ),
        ({"img_in.weight": torch.zeros(128, 64, dtype=torch.int8)}, "no floating-point weight"),
        ({"img_in.scale_weight": torch.ones(1)}, "scales without an 8-bit weight"),
        ({"stray.weight": torch.ones(1)}, "1 tensors have no place in the original layout: stray.weight"),
        ({"guidance_in.in_layer.bias": None}, "lacks 1 tensors .*guidance_embedder.linear_1.bias"),
        ({"txt_in.bias": torch.ones(64)}, "context_embedder.bias is"),
        (
            {"img_in.weight": torch.ones(128, 384), "final_layer.linear.weight": torch.ones(64, 128)},
            "384 numbers per token where the base",
        ),
        ({"txt_in.bias": torch.full((128,), float("inf"))}, "NaN or infinite values in context_embedder.bias"),
    ],
)
def test_files_that_cannot_work(tmp_path, weights, changes, says):
    save_file(edit(to_bfl(weights), changes), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=says):
        laid_out(tmp_path / "model.safetensors", tmp_path)


def test_prefixed_tensors_beside_others_are_asked_about(tmp_path, weights):
    tensors = {f"model.diffusion_model.{name}": value for name, value in to_bfl(weights).items()}
    save_file({**tensors, "loose.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"holds loose.weight beside the tensors under model.diffusion_model"):
        laid_out(tmp_path / "model.safetensors", tmp_path)


def test_without_a_base_and_without_network_the_repository_is_named(tmp_path, weights, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    save_file(to_bfl(weights), tmp_path / "model.safetensors")
    with pytest.raises(
        AccessError, match=r"come from black-forest-labs/FLUX.1-dev, which is not in the local cache"
    ) as raised:
        load_source("x", str(tmp_path / "model.safetensors"), home=tmp_path, offline=True)
    assert "--base" in raised.value.hint
    assert Identity(str(tmp_path / "model.safetensors")).grid == grid.Grid(8, 16, 2)


def test_a_base_of_another_family_is_refused(tmp_path, weights):
    save_file(to_bfl(weights), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"the base tiny-sana is a sana, .* is a flux"):
        laid_out(tmp_path / "model.safetensors", tmp_path, base="tiny-sana")
    with pytest.raises(InputError, match=r"has no model_index.json"):
        laid_out(tmp_path / "model.safetensors", tmp_path, base=tmp_path)
