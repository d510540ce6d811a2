"""The streaming pass against the same model run whole: the same inputs reach every layer."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DiTTransformer2DModel, SanaTransformer2DModel

from dcgen_convert.core.errors import InputError
from dcgen_convert.svdquant import stats as stats_module
from dcgen_convert.svdquant.calibrate import Walker, repeated_blocks
from dcgen_convert.svdquant.settings import QuantSettings
from dcgen_convert.svdquant.skeleton import build, load
from dcgen_convert.svdquant.source import read_folder
from dcgen_convert.svdquant.spool import Spool
from dcgen_convert.svdquant.stats import Gatherer
from dcgen_convert.svdquant.stats import load as load_stats
from dcgen_convert.svdquant.stats import save as save_stats

from .reference import stats_of


def sana():
    model = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=32,
        cross_attention_dim=64,
        caption_channels=48,
        mlp_ratio=2.0,
        sample_size=8,
    )

    def call(seed):
        generator = torch.Generator().manual_seed(seed)
        return {
            "hidden_states": torch.randn(2, 4, 6, 6, generator=generator),
            "encoder_hidden_states": torch.randn(2, 5, 48, generator=generator),
            "timestep": torch.rand(2, generator=generator) * 1000,
            "encoder_attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]),
        }

    return model, [call(0), call(1)]


def dit():
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        patch_size=1,
        num_embeds_ada_norm=1000,
    )

    def call(seed):
        generator = torch.Generator().manual_seed(seed)
        return {
            "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
            "timestep": torch.tensor([10, 900]),
            "class_labels": torch.tensor([3, 1000]),
        }

    return model, [call(0), call(1)]


def whole_run(model, targets, calls):
    """Per target the inputs of every call, from the stock forward."""
    seen = {target: [] for target in targets}
    handles = [
        model.get_submodule(target).register_forward_pre_hook(
            lambda _m, args, target=target: seen[target].append(args[0].flatten(0, -2))
        )
        for target in targets
    ]
    with torch.no_grad():
        for call in calls:
            model(**call)
    for handle in handles:
        handle.remove()
    return {target: torch.cat(inputs) for target, inputs in seen.items()}


@pytest.fixture(params=["flux", "sana", "dit"])
def case(request, tmp_path):
    if request.param == "flux":
        flux = request.getfixturevalue("flux")
        return SimpleNamespace(model=flux.model, folder=flux.folder, targets=flux.targets.svdq, calls=flux.calls)
    torch.manual_seed(0)
    model, calls = {"sana": sana, "dit": dit}[request.param]()
    model.eval().save_pretrained(tmp_path / "transformer")
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "blocks." in name and "norm" not in name
    ]
    return SimpleNamespace(model=model, folder=tmp_path / "transformer", targets=targets, calls=calls)


def walk(walker, targets):
    while walker.needed(targets):
        block, stats = walker.step(targets)
        yield block, stats
        walker.finish(block)


def walker(case, spool, done=()):
    config, entries = read_folder(case.folder)
    model = build(config)
    blocks = repeated_blocks(model, case.targets)
    load(model, "", entries, "cpu", torch.float32, skip=tuple(blocks))
    return Walker(model, blocks, entries, case.calls, spool, QuantSettings(), done)


def test_the_stream_sees_what_the_whole_model_sees(case, tmp_path):
    wanted = whole_run(case.model, case.targets, case.calls)
    got = {}
    for _block, stats in walk(walker(case, Spool(tmp_path / "spool")), case.targets):
        got |= stats
    assert got.keys() == wanted.keys()
    for target, inputs in wanted.items():
        stats = got[target]
        assert torch.allclose(stats.amax, inputs.abs().amax(0), atol=1e-5)
        kept = stats.tokens  # these and those in the Hessian are all tokens there are
        moments = (stats.hessian(torch.ones(inputs.shape[1])) * stats.count + kept.T @ kept) / len(inputs)
        assert torch.allclose(moments, inputs.T @ inputs / len(inputs), atol=1e-4, rtol=1e-3)
        assert stats.count + len(kept) == len(inputs)


def test_blocks_behind_the_last_target_are_not_run(tmp_path):
    torch.manual_seed(0)
    model, calls = sana()
    model.save_pretrained(tmp_path / "transformer")
    target = "transformer_blocks.1.attn1.to_q"
    case = SimpleNamespace(folder=tmp_path / "transformer", targets=[target], calls=calls)
    walked = [block for block, _ in walk(walker(case, Spool(tmp_path / "spool")), [target])]
    assert walked == ["transformer_blocks.0", "transformer_blocks.1"]


@pytest.mark.parametrize("calls", [4, 64])
def test_what_is_kept_does_not_grow_with_the_calls(calls, monkeypatch):
    monkeypatch.setattr(stats_module, "SAMPLES", 48)
    monkeypatch.setattr(stats_module, "HESSIAN_TOKENS", 256)
    gatherer = Gatherer("m", 128, calls, seed=0)
    for number in range(calls):
        gatherer.add(torch.randn(200, 128, generator=torch.Generator().manual_seed(number)), number)
    held = [value for value in vars(gatherer).values() if isinstance(value, torch.Tensor)] + gatherer.drawn
    assert sum(tensor.nbytes for tensor in held) == 4 * (128 + 128 * 128 + 48 * 128)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in held)  # no view keeps a call alive
    assert gatherer.count == 256


def test_layers_that_read_the_same_tensor_share_statistics(flux, tmp_path):
    case = SimpleNamespace(folder=flux.folder, targets=flux.targets.svdq, calls=flux.calls)
    found = {}
    for _block, stats in walk(walker(case, Spool(tmp_path / "spool")), case.targets):
        found |= stats
    double, single = "transformer_blocks.0.attn", "single_transformer_blocks.0"
    assert found[f"{double}.to_q"] is found[f"{double}.to_k"] is found[f"{double}.to_v"]
    assert found[f"{double}.to_q"] is not found[f"{double}.add_q_proj"]
    assert found[f"{single}.attn.to_q"] is found[f"{single}.proj_mlp"]


def test_the_last_reader_of_a_hessian_takes_it_without_a_copy():
    stats, one = stats_of(torch.randn(40, 8)), torch.ones(8)
    stats.readers, memory = 2, stats.total.data_ptr()
    first, last = stats.hessian(one), stats.hessian(one)
    assert torch.allclose(first, last) and first.data_ptr() != memory == last.data_ptr()
    with pytest.raises(RuntimeError, match="given away"):
        stats.hessian(one)


def test_a_walk_resumes_from_kept_outputs(flux, tmp_path):
    case = SimpleNamespace(folder=flux.folder, targets=flux.targets.svdq, calls=flux.calls)
    first = walk(walker(case, Spool(tmp_path / "spool")), case.targets)
    assert next(first)[0] == "transformer_blocks.0"  # stopped here: its outputs are kept
    block, stats = next(walk(walker(case, Spool(tmp_path / "spool"), ["transformer_blocks.0"]), case.targets))
    assert block == "single_transformer_blocks.0"
    wanted = whole_run(flux.model, [f"{block}.proj_mlp"], flux.calls)[f"{block}.proj_mlp"]
    assert torch.allclose(stats[f"{block}.proj_mlp"].amax, wanted.abs().amax(0), atol=1e-5)


def test_a_target_outside_the_blocks_is_refused(flux):
    model = build(read_folder(flux.folder)[0])
    with pytest.raises(InputError, match="proj_out is not inside a repeated block"):
        repeated_blocks(model, ["proj_out"])


def test_the_skeleton_takes_no_memory_but_has_its_tables():
    model, _ = dit()
    with_tables = build(dict(model.config) | {"_class_name": "DiTTransformer2DModel"})
    assert all(parameter.is_meta for name, parameter in with_tables.named_parameters() if name.endswith("proj.weight"))
    assert torch.equal(with_tables.pos_embed.pos_embed, model.pos_embed.pos_embed)


def test_statistics_are_bounded_and_seeded(monkeypatch):
    monkeypatch.setattr(stats_module, "SAMPLES", 10)
    monkeypatch.setattr(stats_module, "HESSIAN_TOKENS", 100)
    inputs = [torch.randn(50, 8, generator=torch.Generator().manual_seed(call)) for call in range(4)]

    def gather(seed):
        return stats_of(*inputs, seed=seed)

    assert gather(0).tokens.shape == (10, 8)
    assert gather(0).count == 100
    assert torch.equal(gather(0).tokens, gather(0).tokens) and torch.equal(
        gather(0).hessian(torch.ones(8)), gather(0).hessian(torch.ones(8))
    )
    assert not torch.equal(gather(0).tokens, gather(1).tokens)


def test_the_smoothed_hessian_is_the_hessian_of_the_smoothed_input():
    x, smooth = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), torch.rand(8).add(0.5)
    plain, divided = stats_of(x), stats_of(x / smooth)
    assert torch.allclose(plain.hessian(smooth), divided.hessian(torch.ones(8)), atol=1e-5)


def test_kept_statistics_are_the_same_and_still_in_common(tmp_path):
    """In a file between two runs; a Hessian that was given away cannot be kept."""
    stats, one = stats_of(torch.randn(40, 8), torch.randn(12, 8)), torch.ones(8)
    stats.readers = 2
    save_stats({"q": stats, "k": stats}, tmp_path / "block.safetensors")
    again = load_stats(tmp_path / "block.safetensors", "cpu")
    assert again["q"] is again["k"] and (again["q"].name, again["q"].count, again["q"].readers) == ("layer", 39, 2)
    for wanted, got in ((stats.amax, again["q"].amax), (stats.tokens, again["q"].tokens)):
        assert torch.equal(got, wanted)
    assert all(torch.equal(again["q"].hessian(one), stats.hessian(one)) for _reader in range(2))
    with pytest.raises(RuntimeError, match="given away"):
        save_stats({"q": stats}, tmp_path / "block.safetensors")
