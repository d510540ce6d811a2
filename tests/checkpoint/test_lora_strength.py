"""How strongly a LoRA file is fused, against PEFT and the formula; what a file holds twice is applied once."""

import json

import pytest
import torch
from conftest import WEIGHTS
from diffusers import FluxTransformer2DModel
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from dcgen_convert.checkpoint import lora
from dcgen_convert.checkpoint.headers import read_weights
from dcgen_convert.core.errors import InputError

FOLDER = WEIGHTS / "tiny-flux" / "transformer"
LINEAR = "transformer_blocks.0.attn.to_q"
CONFIGS = [
    {"r": 4, "lora_alpha": 32},
    {"r": 4, "lora_alpha": 32, "use_rslora": True},
    {"r": 4, "lora_alpha": 8, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_k": 16}},
    {"r": 4, "lora_alpha": 8, "rank_pattern": {r"^transformer_blocks\.0.*to_k": 2}, "use_rslora": True},
]


def changes(path):
    """Weight -> what the file changes, float32 and dense."""
    shapes = {name: entry.shape for name, entry in read_weights(FOLDER).items()}
    found = {}
    for name, updates in lora.read(str(path), "flux", shapes).updates().items():
        found[name] = torch.zeros(shapes[name])
        for start, update in updates:
            rows = found[name][start : start + len(update.up)]
            rows += update.delta(rows)
    return found


@pytest.fixture(scope="module")
def base():
    return FluxTransformer2DModel.from_pretrained(FOLDER, dtype=torch.float32).state_dict()


def adapted(config):
    torch.manual_seed(0)
    model = FluxTransformer2DModel.from_pretrained(FOLDER, dtype=torch.float32)
    return get_peft_model(model, LoraConfig(target_modules=["attn.to_q", "to_k"], init_lora_weights=False, **config))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_config_beside_the_file_counts_as_in_peft(tmp_path, base, config):
    adapted(config).save_pretrained(tmp_path)
    model = FluxTransformer2DModel.from_pretrained(FOLDER, dtype=torch.float32)
    wanted = PeftModel.from_pretrained(model, tmp_path).merge_and_unload().state_dict()
    found = changes(tmp_path / "adapter_model.safetensors")
    assert len(found) == 2 * len([name for name in base if name.endswith("attn.to_q.weight")])
    for name, change in found.items():
        torch.testing.assert_close(change, wanted[name] - base[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_metadata_of_diffusers_count_as_the_config_beside(tmp_path, config):
    """Both are a LoraConfig of PEFT, which diffusers loads with the weights."""
    model = adapted(config)
    model.save_pretrained(tmp_path)
    wanted = changes(tmp_path / "adapter_model.safetensors")
    inner = model.base_model.model
    metadata = {
        f"transformer.{key}": sorted(value) if isinstance(value, set) else value
        for key, value in _collate_lora_metadata({"transformer": inner})["transformer_lora_adapter_metadata"].items()
    }
    tensors = {
        name.replace("base_model.model.", "transformer.").replace(".default", ""): value.contiguous()
        for name, value in model.state_dict().items()
        if ".lora_" in name
    }
    path = tmp_path / "other" / "pytorch_lora_weights.safetensors"
    path.parent.mkdir()
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(metadata, default=str)})
    found = changes(path)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])


def plain(rank=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    down, up = (torch.randn(*shape, generator=generator) * 0.1 for shape in ((rank, 128), (128, rank)))
    return down, up


def write(path, metadata=None, **more):
    down, up = plain()
    tensors = {f"transformer.{LINEAR}.lora_A.weight": down, f"transformer.{LINEAR}.lora_B.weight": up}
    tensors |= {f"transformer.{LINEAR}.{name}": value for name, value in more.items()}
    save_file(tensors, path, metadata)
    return up @ down


@pytest.mark.parametrize("key", ["alpha", "lora_alpha", "network_alpha", "ss_network_alpha"])
def test_alpha_in_the_metadata(tmp_path, key):
    product = write(tmp_path / "a.safetensors", {"format": "pt", key: "2"})
    torch.testing.assert_close(changes(tmp_path / "a.safetensors")[f"{LINEAR}.weight"], 2 / 16 * product)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float16])
def test_an_alpha_tensor_of_any_dtype_counts_before_the_metadata(tmp_path, dtype):
    product = write(tmp_path / "a.safetensors", {"alpha": "5"}, alpha=torch.tensor(2, dtype=dtype))
    torch.testing.assert_close(changes(tmp_path / "a.safetensors")[f"{LINEAR}.weight"], 2 / 16 * product)


@pytest.mark.parametrize(
    "metadata, says",
    [
        ({"alpha": "two"}, "damaged LoRA metadata"),
        ({"alpha": "2", "lora_alpha": "3"}, "state several alphas"),
        ({"lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": 4}'}, "says rank 4 for .*to_q"),
        ({"lora_adapter_metadata": '{"transformer.use_dora": true}'}, "uses use_dora"),
        ({"lora_adapter_metadata": '{"transformer.init_lora_weights": "pissa_niter_4"}'}, "uses init_lora_weights"),
        ({"lora_adapter_metadata": '{"transformer.rank_pattern": {"(a+)+$": 2}}'}, "too complex"),
    ],
)
def test_metadata_that_cannot_be_followed(tmp_path, metadata, says):
    write(tmp_path / "a.safetensors", metadata)
    with pytest.raises(InputError, match=says):
        changes(tmp_path / "a.safetensors")


def twice(alpha=6.0):
    """q, k and v of one block: ({split name: dW}, tensors of the split linears, tensors of the fused one)."""
    pairs = {letter: plain(2, seed) for seed, letter in enumerate("qkv", 1)}
    at, fused_at = "transformer_blocks.0.attn.to_", "lora_unet_double_blocks_0_img_attn_qkv"
    split = {}
    for letter, (down, up) in pairs.items():
        split |= {f"transformer.{at}{letter}.lora_A.weight": down, f"transformer.{at}{letter}.lora_B.weight": up}
    fused = {
        f"{fused_at}.lora_down.weight": torch.cat([down for down, _ in pairs.values()]),
        f"{fused_at}.lora_up.weight": torch.block_diag(*(up for _, up in pairs.values())),
        f"{fused_at}.alpha": torch.tensor(alpha),
    }
    return {f"{at}{letter}.weight": up @ down for letter, (down, up) in pairs.items()}, split, fused


@pytest.mark.parametrize("left_out", ["", "to_k"])
def test_an_update_that_is_held_fused_and_split_is_applied_once(tmp_path, left_out):
    wanted, split, fused = twice()
    split = {name: value for name, value in split.items() if not left_out or left_out not in name}
    save_file({**split, **fused}, tmp_path / "a.safetensors")
    found = changes(tmp_path / "a.safetensors")
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])


def test_two_different_updates_of_one_weight_are_refused(tmp_path):
    _, split, fused = twice(alpha=3.0)
    save_file({**split, **fused}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="two different updates of transformer_blocks.0.attn.to_q.weight"):
        changes(tmp_path / "a.safetensors")
