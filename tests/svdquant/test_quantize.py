"""A folder in, a folder out: complete, byte for byte where nothing was quantised, the same bytes every time,
resumable.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dcgen_convert.checkpoint import shards
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import InputError
from dcgen_convert.families import QuantTargets
from dcgen_convert.ranks.crew import Crew
from dcgen_convert.recipe.schema import Quantize
from dcgen_convert.stages.quantize import settings_of
from dcgen_convert.svdquant import quantize as module
from dcgen_convert.svdquant.quantize import quantize
from dcgen_convert.svdquant.settings import QuantSettings

from .conftest import flux_call, flux_model, flux_targets

pytestmark = pytest.mark.usefixtures("no_refits")


@pytest.fixture(scope="module")
def done(flux, no_refits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("done") / "nvfp4"
    return SimpleNamespace(
        folder=folder, records=quantize(flux.folder, folder, flux.targets, QuantSettings(), flux.calls, NULL)
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_folder_is_complete_and_nothing_else(done, flux):
    assert sorted(contents(done.folder)) == ["config.json", "diffusion_pytorch_model.safetensors", "quantization.json"]
    assert not done.folder.with_name(".nvfp4.partial").exists()
    config = json.loads((done.folder / "config.json").read_text())
    quantisation = config.pop("quantization_config")
    assert config == json.loads((flux.folder / "config.json").read_text())
    assert quantisation == {
        "quant_method": "nunchaku_lite",
        "compute_dtype": "bfloat16",
        "svdq_w4a4": {"precision": "nvfp4", "group_size": 16, "rank": 32, "targets": flux.targets.svdq},
        "awq_w4a16": {"precision": "int4", "group_size": 64, "targets": flux.targets.awq},
    }
    with safe_open(done.folder / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_dense_tensors_are_untouched_and_targets_replaced(done, flux):
    before, after = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (flux.folder, done.folder))
    chosen = {*flux.targets.svdq, *flux.targets.awq}
    dense = {name for name in before if name.rpartition(".")[0] not in chosen}
    for name in dense:
        assert after[name].dtype == before[name].dtype and torch.equal(after[name], before[name])
    for target in flux.targets.svdq:
        parts = {name.rpartition(".")[2]: tensor for name, tensor in after.items() if name.rpartition(".")[0] == target}
        assert parts.keys() == {
            "qweight",
            "wscales",
            "smooth_factor",
            "proj_down",
            "proj_up",
            "wcscales",
            "wtscale",
            "bias",
        }
        assert parts["wscales"].dtype == torch.float8_e4m3fn and parts["wtscale"].shape == (1,)
    for target in flux.targets.awq:
        assert {name.rpartition(".")[2] for name in after if name.rpartition(".")[0] == target} == {
            "qweight",
            "wscales",
            "wzeros",
            "bias",
        }
    assert len(done.records) == len(chosen)


def test_one_record_per_layer_in_target_order(done, flux):
    assert [record["module"] for record in done.records] == [*flux.targets.svdq, *flux.targets.awq]
    report = json.loads((done.folder / "quantization.json").read_text())
    assert [layer["module"] for layer in report["layers"]] == [record["module"] for record in done.records]
    for record in done.records[: len(flux.targets.svdq)]:
        assert 0 < record["error"] < record["error_rtn"] < 1


def test_same_seed_same_bytes_other_seed_other_bytes(done, flux, tmp_path):
    quantize(flux.folder, tmp_path / "again", flux.targets, QuantSettings(), flux.calls, NULL)
    assert contents(tmp_path / "again") == contents(done.folder)
    quantize(flux.folder, tmp_path / "other", flux.targets, QuantSettings(seed=1), flux.calls, NULL)
    assert contents(tmp_path / "other") != contents(done.folder)


@pytest.mark.parametrize("stop_at", ["transformer_blocks.0", "single_transformer_blocks.0"])
def test_interrupted_runs_resume_with_the_same_bytes(done, flux, tmp_path, monkeypatch, stop_at):
    finish, finished = module._finish_block, []

    def interrupted(quantisation, block, *args):
        if block == stop_at:
            raise KeyboardInterrupt
        return finish(quantisation, block, *args)

    monkeypatch.setattr(module, "_finish_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(flux.folder, tmp_path / "out", flux.targets, QuantSettings(), flux.calls, NULL)
    assert not (tmp_path / "out").exists()
    for path in flux.folder.iterdir():
        os.utime(path)  # the bytes count, whatever the time stamps say
    monkeypatch.setattr(
        module, "_finish_block", lambda first, block, *args: (finished.append(block), finish(first, block, *args))[1]
    )
    quantize(flux.folder, tmp_path / "out", flux.targets, QuantSettings(), flux.calls, NULL)
    assert finished[0] == stop_at
    assert contents(tmp_path / "out") == contents(done.folder)


OTHER_RANK = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from dcgen_convert.core.console import NULL
from dcgen_convert.families import QuantTargets
from dcgen_convert.ranks.crew import Crew
from dcgen_convert.families import QuantTargets
from dcgen_convert.svdquant import layer
from dcgen_convert.svdquant.quantisation import Quantisation
from dcgen_convert.svdquant.quantize import work
from dcgen_convert.svdquant.settings import QuantSettings
layer.REFITS = 0
told = json.load(sys.stdin)
calls = sorted(Path(told["calls"]).glob("*.safetensors"))
targets, settings = QuantTargets(**told["targets"]), QuantSettings(**told["settings"])
quantisation = Quantisation.of_folder(Path(told["source"]), Path(told["output"]), targets, settings, calls)
finished = []
bar = SimpleNamespace(advance=lambda count, block: finished.append(block))
work(quantisation, NULL, bar, (1, 2), **told["begun"])
print(json.dumps(finished))
"""


def test_two_processes_take_turns_and_give_the_bytes_of_one(done, flux, tmp_path, monkeypatch):
    """And the blocks are shared: the other process finishes the second one."""
    for number, call in enumerate(flux.calls):
        save_file(call, tmp_path / f"{number}.safetensors")
    told = {"source": str(flux.folder), "output": str(tmp_path / "out"), "calls": str(tmp_path)}
    told |= {"targets": asdict(flux.targets), "settings": asdict(QuantSettings())}
    others, sleep = [], time.sleep

    class Two(Crew):
        world = 2

        @contextmanager
        def share(self, task, bar=None, together=True, **begun):
            child = subprocess.Popen(
                [sys.executable, "-c", OTHER_RANK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            child.stdin.write(json.dumps(told | {"begun": begun}))
            child.stdin.close()

            def wait(seconds):
                assert child.poll() is None  # nobody waits for ever for the turn of a process that failed
                sleep(seconds)

            monkeypatch.setattr(time, "sleep", wait)
            yield
            others.append((child.stdout.read(), child.wait()))

    quantize(
        flux.folder,
        tmp_path / "out",
        flux.targets,
        QuantSettings(),
        sorted(tmp_path.glob("*.safetensors")),
        NULL,
        Two(),
    )
    assert [(json.loads(said.splitlines()[-1]), code) for said, code in others] == [
        (["single_transformer_blocks.0"], 0)
    ]
    assert contents(tmp_path / "out") == contents(done.folder)


def test_a_half_run_with_other_settings_is_not_believed(flux, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "assemble", lambda *args: None)
    quantize(flux.folder, tmp_path / "out", flux.targets, QuantSettings(), flux.calls, NULL)
    monkeypatch.undo()
    said = []
    console = SimpleNamespace(say=said.append, progress=NULL.progress, event=NULL.event)
    quantize(flux.folder, tmp_path / "out", flux.targets, QuantSettings(rank=16), flux.calls, console)
    assert "discarded" in said[0]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["svdq_w4a4"]["rank"] == 16


def test_sharded_source_and_sharded_output_hold_the_same_tensors(done, flux, tmp_path, monkeypatch):
    flux_model().save_pretrained(tmp_path / "source", max_shard_size="400KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 2
    monkeypatch.setattr(shards, "SHARD_BYTES", 300_000)
    quantize(tmp_path / "source", tmp_path / "out", flux.targets, QuantSettings(), flux.calls, NULL)
    index = json.loads((tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    merged = {}
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        tensors = load_file(path)
        assert all(index["weight_map"][name] == path.name for name in tensors)
        merged |= tensors
    wanted = load_file(done.folder / "diffusion_pytorch_model.safetensors")
    assert merged.keys() == wanted.keys()
    assert all(torch.equal(merged[name].view(torch.uint8), wanted[name].view(torch.uint8)) for name in wanted)


def test_calls_from_files_give_the_same_bytes(done, flux, tmp_path):
    for number, call in enumerate(flux.calls):
        save_file(call, tmp_path / f"{number}.safetensors")
    files = sorted(tmp_path.glob("*.safetensors"))
    quantize(flux.folder, tmp_path / "out", flux.targets, QuantSettings(), files, NULL)
    assert contents(tmp_path / "out") == contents(done.folder)


def test_dense_float32_stays_float32(tmp_path):
    model = flux_model().float()
    model.save_pretrained(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "out", flux_targets(model), QuantSettings(calibration="none"), [], NULL)
    kept = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")["x_embedder.weight"]
    assert torch.equal(kept, model.x_embedder.weight)


def broken(flux, tmp_path, change):
    """A copy of the source whose tensors `change` edits in place."""
    folder = tmp_path / "source"
    shutil.copytree(flux.folder, folder)
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return folder


TARGET = "single_transformer_blocks.0.attn.to_k"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.update({f"{TARGET}.weight": t[f"{TARGET}.weight"][:127].clone()}),
            f"{TARGET}.weight is 127 x 128: 127 out",
        ),
        (
            lambda t: t.update({f"{TARGET}.weight": t[f"{TARGET}.weight"][:, :127].clone()}),
            f"{TARGET}.weight is 128 x 127: 127 in",
        ),
        (lambda t: t.pop(f"{TARGET}.weight"), f"holds no {TARGET}.weight"),
        (lambda t: t[f"{TARGET}.weight"].__setitem__((3, 5), float("nan")), f"{TARGET}.weight holds 1 NaN"),
        (lambda t: t[f"{TARGET}.bias"].__setitem__(3, float("inf")), f"{TARGET}.bias holds 1 NaN"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name_and_leaves_no_output(flux, tmp_path, change, message):
    folder = broken(flux, tmp_path, change)
    with pytest.raises(InputError, match=message):
        quantize(folder, tmp_path / "out", flux.targets, QuantSettings(), flux.calls, NULL)
    assert not (tmp_path / "out").exists()


def test_impossible_requests_are_refused(flux, tmp_path):
    empty, out = QuantTargets([], []), tmp_path / "out"
    with pytest.raises(InputError, match="No layer is planned"):
        quantize(flux.folder, out, empty, QuantSettings(), flux.calls, NULL)
    with pytest.raises(InputError, match="at least one call"):
        quantize(flux.folder, out, flux.targets, QuantSettings(), [], NULL)
    with pytest.raises(InputError, match="config.json"):
        quantize(tmp_path, out, flux.targets, QuantSettings(), flux.calls, NULL)
    out.mkdir()
    with pytest.raises(InputError, match="exists already"):
        quantize(flux.folder, out, flux.targets, QuantSettings(), flux.calls, NULL)


def test_truncated_weights_are_refused(flux, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(flux.folder, folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated"):
        quantize(folder, tmp_path / "out", flux.targets, QuantSettings(), flux.calls, NULL)


def test_calibrated_calls_beat_data_free_in_the_model_s_output(done, flux, tmp_path):
    from dcgen_convert.svdquant.runtime import emulate

    quantize(flux.folder, tmp_path / "free", flux.targets, QuantSettings(calibration="none"), [], NULL)
    call = flux_call(99)
    wanted = flux.model(**call).sample

    def error(folder):
        return (emulate(folder)(**call).sample - wanted).norm() / wanted.norm()

    assert error(done.folder) < error(tmp_path / "free") < 0.2


def test_modulation_layers_behind_the_last_w4a4_layer_are_quantised_too(flux, tmp_path):
    few = [target for target in flux.targets.svdq if target.startswith("transformer_blocks.0.attn.to_")]
    targets = QuantTargets(few, flux.targets.awq)
    records = quantize(flux.folder, tmp_path / "out", targets, QuantSettings(), flux.calls, NULL)
    assert [record["module"] for record in records] == [*few, *flux.targets.awq]


def test_a_known_list_without_a_target_is_walked_block_by_block_too(flux, tmp_path, monkeypatch):
    """The same bytes as with that list loaded whole, and its weights are not among what stays in memory."""
    few = [target for target in flux.targets.svdq if target.startswith("single_transformer_blocks.0.attn.to_")]
    load, skipped = module.load, []
    monkeypatch.setattr(module, "load", lambda *args, skip=(): (skipped.append(skip), load(*args, skip=skip))[1])
    for name, blocks in (("whole", ()), ("walked", ("transformer_blocks", "single_transformer_blocks"))):
        quantize(flux.folder, tmp_path / name, QuantTargets(few, [], blocks=blocks), QuantSettings(), flux.calls, NULL)
    assert contents(tmp_path / "whole") == contents(tmp_path / "walked")
    assert skipped == [("single_transformer_blocks.0",), ("transformer_blocks.0", "single_transformer_blocks.0")]


def test_fusing_is_an_option_and_what_the_classic_container_needs():
    for section, fused in (({}, False), ({"fuse_qkv": True}, True), ({"container": "nunchaku"}, True)):
        assert settings_of(Quantize(format="nvfp4", **section), 0).fuse_qkv is fused


def test_fused_layers_have_one_smoothing_and_one_down_projection(flux, tmp_path):
    settings = QuantSettings(fuse_qkv=True)
    records = quantize(flux.folder, tmp_path / "out", flux.targets, settings, flux.calls, NULL)
    assert [record["module"] for record in records] == [*flux.targets.svdq, *flux.targets.awq]
    tensors = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    double = "transformer_blocks.0.attn"
    for part in ("smooth_factor", "proj_down", "wtscale"):
        query, key, value, other = (
            tensors[f"{double}.{name}.{part}"] for name in ("to_q", "to_k", "to_v", "add_q_proj")
        )
        assert torch.equal(query, key) and torch.equal(query, value)
        assert part == "wtscale" or not torch.equal(query, other)
    assert not torch.equal(tensors[f"{double}.to_q.qweight"], tensors[f"{double}.to_k.qweight"])
    single = "single_transformer_blocks.0"  # proj_mlp reads the same input but is no part of the attention
    assert not torch.equal(tensors[f"{single}.attn.to_q.proj_down"], tensors[f"{single}.proj_mlp.proj_down"])
    assert all(record["error"] < record["error_rtn"] for record in records if "error" in record)
