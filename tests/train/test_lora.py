"""Which linears get an adapter, and what stock diffusers makes of the export."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dcgen_convert.core import names
from dcgen_convert.core.errors import RecipeError
from dcgen_convert.core.files import sha256
from dcgen_convert.train import lora

from .train_worker import FLUX, Rows, adapt, tiny_flux


def test_targets_are_attention_and_mlp_but_not_the_head():
    model = tiny_flux()
    paths = lora.add_lora(model, FLUX.lora_targets, 4, 4.0, seed=0)
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert adapted == set(paths)
    double = [
        f"attn.{n}"
        for n in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    ]
    double += [f"{ff}.net.{n}" for ff in ("ff", "ff_context") for n in ("0.proj", "2")]
    single = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"]
    expected = {f"transformer_blocks.0.{n}" for n in double} | {f"single_transformer_blocks.0.{n}" for n in single}
    assert set(paths) == expected  # neither the final proj_out nor an AdaLN linear


def test_a_fresh_adapter_changes_nothing_and_comes_off():
    model = tiny_flux().eval()
    z0, text = Rows().batch(range(2))
    arguments = (z0, torch.tensor([0.3, 0.8]), text, torch.ones(2))
    with torch.no_grad():
        before = FLUX.predict(model, *arguments)
        lora.add_lora(model, FLUX.lora_targets, 4, 8.0, seed=0)
        assert torch.equal(FLUX.predict(model, *arguments), before)
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.fill_(0.1)
        assert not torch.allclose(FLUX.predict(model, *arguments), before)
        lora.remove_lora(model)
        assert torch.equal(FLUX.predict(model, *arguments), before)
    assert model.state_dict().keys() == tiny_flux().state_dict().keys()


def test_start_depends_on_the_seed_alone():
    def start(seed):
        model = tiny_flux()
        torch.randn(seed + 3)  # whatever was drawn before
        lora.add_lora(model, FLUX.lora_targets, 4, 8.0, seed)
        return torch.cat([p.flatten() for name, p in model.named_parameters() if ".lora_A" in name])

    assert torch.equal(start(1), start(1)) and not torch.equal(start(1), start(2))


def test_no_match_is_refused():
    with pytest.raises(RecipeError, match="no linear of FluxTransformer2DModel matches"):
        lora.add_lora(tiny_flux(), r"blocks\.\d+\.attn", 4, 4.0, seed=0)


def test_export_is_what_stock_diffusers_writes_and_reads(tmp_path):
    """Same keys, tensors and metadata as `save_lora_weights`; `load_lora_weights` gives the trained network back."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from diffusers.training_utils import _collate_lora_metadata

    metrics, model = adapt(tmp_path / "run", phase={"steps": 4}, adapt={"ema": 0.0})
    ours = load_file(metrics["exports"]["lora"])
    modules = load_file(metrics["exports"]["modules"])
    assert sorted(modules) == ["proj_out.bias", "proj_out.weight", "x_embedder.bias", "x_embedder.weight"]
    assert metrics["adapted_linears"] == len(ours) // 2 == 17

    trained = tiny_flux().eval()
    trained.load_state_dict({**trained.state_dict(), **modules})
    lora.add_lora(trained, FLUX.lora_targets, 4, 8.0, seed=5)
    state = {
        name.removeprefix("transformer.").replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): v
        for name, v in ours.items()
    }
    assert not trained.load_state_dict(state, strict=False).unexpected_keys
    layers = {name.removeprefix("transformer."): value for name, value in ours.items()}
    FluxPipeline.save_lora_weights(
        tmp_path / "stock", transformer_lora_layers=layers, **_collate_lora_metadata({"transformer": trained})
    )
    stock = load_file(tmp_path / "stock" / names.LORA)
    assert stock.keys() == ours.keys() and all(torch.equal(stock[name], ours[name]) for name in ours)
    assert rank_and_alpha(tmp_path / "stock" / names.LORA) == rank_and_alpha(metrics["exports"]["lora"]) == (4, 8.0)

    fresh = tiny_flux().eval()
    fresh.load_state_dict({**fresh.state_dict(), **modules})
    pipeline = FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, fresh)
    pipeline.load_lora_weights(tmp_path / "run" / "export")
    z0, text = Rows().batch(range(2))
    arguments = (z0, torch.tensor([0.3, 0.8]), text, torch.ones(2))
    with torch.no_grad():
        assert torch.allclose(FLUX.predict(fresh, *arguments), FLUX.predict(trained, *arguments), atol=1e-6)
        assert not torch.allclose(FLUX.predict(fresh, *arguments), FLUX.predict(model, *arguments), atol=1e-4)


def rank_and_alpha(path):
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()[lora.METADATA])
    return config["transformer.r"], config["transformer.lora_alpha"]


def test_export_hashes_alike_twice(tmp_path):
    a, _ = adapt(tmp_path / "a", phase={"steps": 2})
    b, _ = adapt(tmp_path / "b", phase={"steps": 2})
    assert all(sha256(a["exports"][kind]) == sha256(b["exports"][kind]) for kind in ("lora", "modules"))
