"""Merging against PEFT's own `merge_and_unload`, byte equality of what is not merged, refusals."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dcgen_convert import families
from dcgen_convert.checkpoint import merge, updates
from dcgen_convert.core.errors import CheckFailed, InputError
from dcgen_convert.core.files import TEMPORARY, sha256

TARGETS = families.get("flux").lora_targets


def flux(dtype=torch.float32):
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    ).to(dtype)


def write_lora(model, path, **changes):
    """A PEFT LoRA with random A and B on ``model``, saved as stock pipelines read it; returns the PEFT model."""
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
                key = name.removeprefix("base_model.model.").replace(".default.", ".")
                tensors[f"transformer.{key}"] = parameter.detach().clone()
    config = {"transformer.r": 4, "transformer.lora_alpha": 6, **changes}
    save_file(tensors, path, {updates.METADATA: json.dumps(config)})
    return peft


@pytest.fixture
def folders(tmp_path):
    """(dense folder in shards, LoRA file, modules file, what PEFT makes of them)."""
    model = flux()
    model.save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    assert len(merge.shards_of(tmp_path / "dense")) > 2
    reference = write_lora(model, tmp_path / "lora.safetensors").merge_and_unload().state_dict()
    modules = {"x_embedder.weight": torch.full((32, 8), 0.5), "x_embedder.bias": torch.ones(32)}
    save_file(modules, tmp_path / "modules.safetensors")
    return tmp_path, {**reference, **modules}


def tensors(folder):
    return {name: value for shard in merge.shards_of(folder) for name, value in load_file(shard).items()}


def test_merge_is_peft_s(folders):
    path, reference = folders
    record = merge.merge(
        path / "dense", path / "out", lora=path / "lora.safetensors", modules=path / "modules.safetensors"
    )
    merged, dense = tensors(path / "out"), tensors(path / "dense")
    assert merged.keys() == reference.keys()
    assert max((merged[name] - reference[name]).abs().max().item() for name in reference) < 1e-6
    changed = {name for name in dense if not torch.equal(merged[name], dense[name])}
    assert len(changed) == 17 + 2 and record["merged"] == 17 and record["replaced"] == 2
    assert record["untouched"] == len(dense) - 19
    largest = max((merged[n] - dense[n]).abs().max().item() for n in changed if "x_embedder" not in n)
    assert record["max_delta"] == pytest.approx(largest, rel=1e-4)


def test_output_is_a_diffusers_folder_of_the_same_shards(folders):
    from diffusers import FluxTransformer2DModel

    path, _ = folders
    modules = path / "modules.safetensors"
    merge.merge(path / "dense", path / "out", modules=modules)
    names = sorted(file.name for file in (path / "dense").iterdir())
    assert sorted(file.name for file in (path / "out").iterdir()) == names
    same = [name for name in names if sha256(path / "out" / name) == sha256(path / "dense" / name)]
    assert len(names) - len(same) == 1  # the shard with the embedder; the others are copied byte for byte
    loaded = FluxTransformer2DModel.from_pretrained(path / "out")
    assert torch.equal(loaded.x_embedder.weight, load_file(modules)["x_embedder.weight"])
    assert all((file.stat().st_mode & 0o777) == 0o644 for file in (path / "out").glob("*.safetensors"))


def test_bf16_is_rounded_once(tmp_path):
    model = flux(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    dense = {name: value.double() for name, value in model.state_dict().items()}
    write_lora(model.float(), tmp_path / "lora.safetensors")
    merge.merge(tmp_path / "dense", tmp_path / "out", lora=tmp_path / "lora.safetensors")
    low_rank = load_file(tmp_path / "lora.safetensors")
    merged = tensors(tmp_path / "out")
    for name, weight in merged.items():
        assert weight.dtype == torch.bfloat16
        a = low_rank.get(f"transformer.{name.removesuffix('.weight')}.lora_A.weight")
        if a is not None:
            b = low_rank[f"transformer.{name.removesuffix('.weight')}.lora_B.weight"]
            exact = dense[name] + 1.5 * b.double() @ a.double()
            half_ulp = exact.abs() * 2**-8  # bfloat16 keeps 8 bits
            assert ((weight.double() - exact).abs() <= half_ulp + 1e-6).all()


def test_a_former_output_is_replaced_whole(folders):
    path, _ = folders
    (path / "out").mkdir()
    (path / "out" / "stale.json").write_text("{}")
    merge.merge(path / "dense", path / "out", modules=path / "modules.safetensors")
    assert not (path / "out" / "stale.json").exists()
    assert not list(path.glob(f"{TEMPORARY}*"))


def edit(path, change):
    """Rewrite a safetensors file after ``change(tensors)``."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    values = load_file(path)
    change(values)
    save_file(values, path, metadata)


Q = "transformer.transformer_blocks.0.attn.to_q"


def stray(values):
    values["transformer.blocks.9.to_q.lora_A.weight"] = values[f"{Q}.lora_A.weight"].clone()
    values["transformer.blocks.9.to_q.lora_B.weight"] = values[f"{Q}.lora_B.weight"].clone()


def zero(values):
    for name, value in values.items():
        if "lora_B" in name:
            value.zero_()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (stray, CheckFailed, "1 of 18 keys have no place in .*LoRA blocks.9.to_q.weight"),
        (zero, CheckFailed, "changes nothing"),
        (lambda v: v[f"{Q}.lora_A.weight"].fill_(float("nan")), CheckFailed, "to_q.weight is not finite"),
        (lambda v: v.update({f"{Q}.lora_A.weight": torch.ones(4, 7)}), CheckFailed, "its LoRA is"),
        (lambda v: v.pop(f"{Q}.lora_B.weight"), InputError, "has no partner"),
        (
            lambda v: v.update({"unet.x.lora_A.weight": torch.ones(1)}),
            InputError,
            "not a LoRA weight of the transformer",
        ),
    ],
)
def test_lora_that_does_not_fit_is_refused(folders, change, error, message):
    path, _ = folders
    edit(path / "lora.safetensors", change)
    with pytest.raises(error, match=message):
        merge.merge(path / "dense", path / "out", lora=path / "lora.safetensors")
    assert not (path / "out").exists() and not list(path.glob(f"{TEMPORARY}*"))


def test_modules_that_do_not_fit_are_refused(folders):
    path, _ = folders
    edit(path / "modules.safetensors", lambda v: v.update({"x_embedder.bias": torch.ones(31)}))
    with pytest.raises(CheckFailed, match=r"x_embedder.bias is"):
        merge.merge(path / "dense", path / "out", modules=path / "modules.safetensors")
    edit(path / "modules.safetensors", lambda v: (v.clear(), v.update({"nowhere": torch.ones(1)})))
    with pytest.raises(CheckFailed, match=r"1 of 1 keys have no place in .*module nowhere"):
        merge.merge(path / "dense", path / "out", modules=path / "modules.safetensors")


def test_nothing_to_merge_and_wrong_folders_are_refused(folders):
    path, _ = folders
    with pytest.raises(CheckFailed, match="0 tensors"):
        merge.merge(path / "dense", path / "out")
    with pytest.raises(InputError, match="not a transformer folder"):
        merge.merge(path, path / "out", modules=path / "modules.safetensors")
    merge.shards_of(path / "dense")[0].unlink()
    with pytest.raises(InputError, match=r"is named in .* but is not there"):
        merge.merge(path / "dense", path / "out", modules=path / "modules.safetensors")


@pytest.mark.parametrize("change", [{"transformer.use_dora": True}, {"transformer.rank_pattern": {"a": 8}}])
def test_other_kinds_of_lora_are_refused(tmp_path, change):
    write_lora(flux(), tmp_path / "lora.safetensors", **change)
    with pytest.raises(InputError, match="only plain LoRA"):
        updates.read_lora(tmp_path / "lora.safetensors", "transformer")
    save_file({"x": torch.ones(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(InputError, match="does not state its rank"):
        updates.read_lora(tmp_path / "bare.safetensors", "transformer")
