"""4-bit bundles: their table of formats, drawing without the kernels, and damage that the stock loader lets pass."""

import os
import shutil
import sys

import numpy
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from dcgen_convert.api.order import quantisation
from dcgen_convert.bundle import manifest as manifests
from dcgen_convert.bundle.card import render
from dcgen_convert.bundle.loading import choose_runtime, load
from dcgen_convert.bundle.sample import sample
from dcgen_convert.bundle.verify import verify
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.errors import CheckFailed, InputError, ResourceError
from dcgen_convert.core.files import read_json, sha256, write_json
from dcgen_convert.quantization import Drawing, Request, SourceQuantisation
from dcgen_convert.svdquant.record import CALLS, read_calls

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
TARGET = "transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize("precision", ["nvfp4", "int4"])
def test_every_tensor_has_its_format(quantised, precision):
    bundle, _ = quantised(precision)
    table = read_json(bundle / manifests.FILE)["tensors"]
    by_format = {}
    for name, record in table.items():
        by_format.setdefault(record["format"], set()).add(name)
    assert set(by_format) == {precision, "awq", "dense"}
    assert f"{TARGET}.qweight" in by_format[precision]
    assert "transformer_blocks.0.norm1.linear.wzeros" in by_format["awq"]
    assert {"x_embedder.weight", "proj_out.weight", "transformer_blocks.0.attn.norm_q.weight"} <= by_format["dense"]
    assert table[f"{TARGET}.wscales"]["dtype"] == ("F8_E4M3" if precision == "nvfp4" else "BF16")
    assert table[f"{TARGET}.qweight"]["origin"] == "new"


def test_passes_and_draws_without_the_kernels(quantised):
    picture = verify(quantised("nvfp4")[0], NULL)["picture"]
    assert picture["runtime"] == "dequantised" and picture["std"] > 0


@pytest.mark.parametrize("precision", ["nvfp4", "int4"])
def test_draws_nearly_what_its_dense_twin_draws(quantised, tmp_path, precision):
    bundle, twin = quantised(precision)
    pictures = {}
    for name, folder, runtime in (
        ("twin", twin, "auto"),
        ("dequantised", bundle, "auto"),
        ("emulated", bundle, "emulated"),
    ):
        document = sample(folder, ["a fox"], tmp_path / name, NULL, runtime=runtime)
        assert document["runtime"] == {"twin": "stock"}.get(name, name)
        pictures[name] = numpy.asarray(Image.open(document["images"][0])) / 255
    for name in ("dequantised", "emulated"):
        error = numpy.square(pictures[name] - pictures["twin"]).mean()
        assert 0 < error < 1e-3, (name, error)
    assert not numpy.array_equal(pictures["dequantised"], pictures["emulated"])


def test_sampling_says_how_it_runs(quantised, tmp_path, capsys):
    sample(quantised("nvfp4")[0], ["a fox"], tmp_path, Console())
    assert "cannot run here; drawing with dequantised weights" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(ResourceError, match="no CUDA GPU"):
            choose_runtime(quantised("nvfp4")[0], "stock", torch.bfloat16)


def test_bfloat16_too(quantised):
    pipeline, runtime = load(quantised("nvfp4")[0], torch.bfloat16)
    assert runtime == "dequantised" and pipeline.transformer.dtype == torch.bfloat16


def damage(bundle, tmp_path, change) -> str:
    """What verify says of a copy whose writer had made a mistake: tensors, hashes and table agree with each other."""
    copy = shutil.copytree(bundle, tmp_path / "copy")
    tensors = load_file(copy / WEIGHTS)
    change(tensors)
    save_file(tensors, copy / WEIGHTS)
    record = read_json(copy / manifests.FILE)
    record["files"][WEIGHTS] = {"sha256": sha256(copy / WEIGHTS), "bytes": (copy / WEIGHTS).stat().st_size}
    record["tensors"] = manifests.tensor_table(copy / "transformer", copy / "transformer", NULL)
    write_json(copy / manifests.FILE, record)
    with pytest.raises(CheckFailed) as caught:
        verify(copy, NULL, probe=False)
    return caught.value.message


MISTAKES = {
    "is missing": lambda t: t.pop(f"{TARGET}.wcscales"),
    "must be F8_E4M3": lambda t: t.update({f"{TARGET}.wscales": t[f"{TARGET}.wscales"].view(torch.uint8)}),
    "must be BF16 [1]": lambda t: t.update({f"{TARGET}.wtscale": t[f"{TARGET}.wtscale"].reshape(())}),
    "negative or undefined": lambda t: t[f"{TARGET}.wscales"].view(torch.uint8)[3, 5].fill_(0x7F),
    "negative or undefined scales": lambda t: t[f"{TARGET}.wscales"].view(torch.uint8)[0, 0].fill_(0x81),
    "holds NaN": lambda t: t[f"{TARGET}.smooth_factor"][0].fill_(float("nan")),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_what_the_stock_loader_would_not_see(quantised, tmp_path, message):
    said = damage(quantised("nvfp4")[0], tmp_path, MISTAKES[message])
    assert message in said and TARGET in said


def test_a_converted_bundle_is_drawn_for_calibration_and_keeps_its_lineage(quantised, tmp_path):
    """The dense twin has the in-bundle adapter: the stock pipeline is loaded with this program's class."""
    _, twin = quantised("int4")
    asked = quantisation("int4", 16, 1, None, "diffusers", False)
    work = SourceQuantisation.of(Request(str(twin), tmp_path / "out", asked, Drawing(steps=1)), NULL)
    assert work.defaults == {**read_json(twin / manifests.FILE)["defaults"], "steps": 1}
    work.prepare()
    work.record()
    assert len(read_calls(work.request.work_folder / CALLS)) == 1
    sources = {"base": work.source.record(str(twin)), **manifests.sources_of(work.source.root)}
    conversion = {"layout": "stock", "recipe": {"adapt": {"phases": [{"resolution": 96}]}}}
    record = {**read_json(twin / manifests.FILE), "sources": sources, "conversion": conversion}
    card = render(record, family=work.source.family, layout="source", title="t")
    assert "`org/base` converted to" in card and "trust_remote_code=True" in card and "96 x 96 px" in card
    assert yaml.safe_load(card.split("---")[1])["base_model"] == ["org/base"]


def test_a_converted_bundle_is_calibrated_with_prompts_of_its_own_kind(quantised, tmp_path):
    """Prompts of another world would show the quantiser pictures that the model was not trained on."""
    twin = tmp_path / "twin"
    shutil.copytree(quantised("int4")[1], twin)
    record = read_json(twin / manifests.FILE)
    asked = quantisation("int4", 16, 1, None, "diffusers", False)

    def kind(prompts: str, own: str | None = None) -> str:
        write_json(twin / manifests.FILE, {**record, "recipe": {"data": {"prompts": prompts}}})
        return SourceQuantisation.of(Request(str(twin), tmp_path / "out", asked, Drawing(prompts=own)), NULL).kind

    assert kind("tiny-world") == "tiny-world" and kind("tiny-world", own="builtin") == "builtin"
    assert kind("gone.txt") == "builtin"  # a list of another machine
    later = {**record, "recipe": {"drawing": {"prompts": None}}, "conversion": {"recipe": {"data": {"prompts": "x"}}}}
    assert manifests.prompts_of(later) == "x"  # of the 4-bit bundle that is made of it


def test_the_work_of_another_call_is_told_and_much_of_it_is_kept(tmp_path, capsys):
    """Of a quantisation that was cut off, with other settings than today's."""
    asked = quantisation("int4", 32, 1, None, "diffusers", False)
    console = Console("human", stderr=sys.stdout)
    work = SourceQuantisation.of(Request("tiny-flux", tmp_path / "out", asked, Drawing(steps=1)), console)
    folder = work.request.work_folder
    folder.mkdir()
    for name, age in (("call.json", 5000), ("calls.safetensors", 0)):
        (folder / name).write_text("{}")
        os.utime(folder / name, (1e9 - age, 1e9 - age))
    with pytest.raises(InputError, match="holds 1 h 23 min of work of another call"):
        work.clear()
    assert (folder / "calls.safetensors").exists()
    os.utime(folder / "call.json", (1e9 - 60, 1e9 - 60))
    work.clear()
    assert not folder.exists()
    assert "the unfinished work of another call is deleted" in " ".join(capsys.readouterr().out.split())
