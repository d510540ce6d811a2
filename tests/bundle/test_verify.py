"""verify: whole bundles pass, and every kind of damage is named."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcgen_convert.bundle import manifest as manifests
from dcgen_convert.bundle.expected import expected_tensors
from dcgen_convert.bundle.verify import verify
from dcgen_convert.checkpoint.headers import read_weights
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.errors import CheckFailed, InputError
from dcgen_convert.core.files import read_json, sha256, write_json

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def failure(bundle, against=None, probe=False, **options) -> str:
    with pytest.raises(CheckFailed) as caught:
        verify(bundle, NULL, against, probe=probe, **options)
    return caught.value.message


def rewrite(bundle, change, file=WEIGHTS) -> None:
    """Change the tensors of a file and the manifest's record of that file, as a wrong writer would have left both."""
    tensors = load_file(bundle / file)
    change(tensors)
    save_file(tensors, bundle / file)
    record = read_json(bundle / manifests.FILE)
    record["files"][file] = {"sha256": sha256(bundle / file), "bytes": (bundle / file).stat().st_size}
    write_json(bundle / manifests.FILE, record)


@pytest.mark.parametrize("name", ["flux", "sana", "dit"])
def test_a_whole_bundle_passes_in_a_fresh_process(parts, bundles, name, capsys):
    document = verify(bundles(name), Console("human", stderr=sys.stdout), parts(name).source)
    family, cell = parts(name).family, parts(name).factor // (2 if name == "flux" else 1)
    side = document["picture"]["untold"]
    assert side == family.untold_side(cell, parts(name).side) == {"flux": 128 * cell, "sana": 1024}.get(name, side)
    said = " ".join(capsys.readouterr().out.split())
    assert (f"without height and width the pipeline draws {side} x {side} px" in said) == (name != "dit")
    assert document["ok"] and document["checks"] == [
        "files",
        "code",
        "structure",
        "tensors",
        "table",
        "parts",
        "against",
        "picture",
    ]
    assert document["picture"]["runtime"] == "stock" and document["picture"]["std"] > 0
    assert document["tensors"]["identical"] == document["tensors"]["total"] - 4


def test_a_text_encoder_that_would_be_random_is_named(own_bundle):
    bundle, file = own_bundle("flux"), "text_encoder/model.safetensors"

    def rename(tensors):
        for name in list(tensors):
            tensors[f"model.{name}"] = tensors.pop(name)

    rewrite(bundle, rename, file)
    message = failure(bundle)
    assert "text_encoder lacks" in message and "which would be random" in message


def test_a_flipped_bit_is_named_with_its_tensor(own_bundle):
    bundle = own_bundle("flux")
    info = read_weights(bundle / "transformer")["context_embedder.weight"]
    data = bytearray(info.file.read_bytes())
    data[info.start + 1] ^= 4
    info.file.write_bytes(data)
    message = failure(bundle, probe=True)
    assert WEIGHTS in message and "context_embedder.weight" in message and "x_embedder" not in message


def test_missing_truncated_and_foreign_files_are_named(own_bundle):
    bundle = own_bundle("flux")
    (bundle / "tokenizer" / "tokenizer.json").unlink()
    (bundle / "README.md").write_text("shorter")
    (bundle / "vae" / "other.py").write_text("")
    (bundle / ".gitattributes").write_text("the hub adds this one")
    message = failure(bundle)
    assert (
        "tokenizer/tokenizer.json is missing" in message
        and "README.md has 7 bytes" in message
        and "vae/other.py is not in" in message
    )
    assert "gitattributes" not in message


def test_a_truncated_weight_file_does_not_stop_the_other_checks(own_bundle):
    bundle = own_bundle("dit")
    data = (bundle / WEIGHTS).read_bytes()
    (bundle / WEIGHTS).write_bytes(data[:-100])
    (bundle / "scheduler" / "scheduler_config.json").unlink()
    message = failure(bundle)
    assert "is truncated" in message and "scheduler has no config" in message


def test_nan_and_infinity_are_named(own_bundle):
    bundle = own_bundle("dit")
    rewrite(bundle, lambda tensors: tensors["proj_out_2.weight"].view(-1)[3].fill_(float("nan")))
    rewrite(
        bundle,
        lambda tensors: tensors["decoder.conv_out.bias"][0].fill_(float("inf")),
        "vae/diffusion_pytorch_model.safetensors",
    )
    message = failure(bundle)
    assert (
        "transformer: proj_out_2.weight holds NaN" in message
        and "vae: decoder.conv_out.bias holds NaN or infinity" in message
    )


def test_missing_extra_and_misshaped_tensors_are_named(own_bundle):
    def change(tensors):
        tensors["surplus"] = torch.zeros(1)
        tensors["proj_out_2.bias"] = torch.zeros(7)
        del tensors["proj_out_1.bias"]

    bundle = own_bundle("dit")
    rewrite(bundle, change)
    message = failure(bundle)
    assert "proj_out_1.bias is missing" in message and "surplus is not a tensor of the model" in message
    assert "proj_out_2.bias is F32 [7], it must be BF16 or F16 or F32 [64]" in message


def test_against_finds_a_tensor_that_was_to_be_left_alone(parts, own_bundle, tmp_path):
    bundle, name = own_bundle("dit"), "transformer_blocks.0.ff.net.2.weight"
    record = read_json(bundle / manifests.FILE)
    assert record["tensors"][name]["origin"] == "identical"
    other = tmp_path / "other" / "transformer"
    other.mkdir(parents=True)
    tensors = load_file(parts("dit").source / WEIGHTS)
    tensors[name][0, 0] += 1
    save_file(tensors, other / "diffusion_pytorch_model.safetensors")
    assert verify(bundle, NULL, parts("dit").source, probe=False)["ok"]
    with pytest.raises(InputError, match="does not exist"):
        verify(bundle, NULL, tmp_path / "nothing", probe=False)
    message = failure(bundle, tmp_path / "other")
    assert f"tensor {name} should be the source's and differs" in message and message.count("should be") == 1


def test_a_bundle_that_cannot_load_fails_although_all_hashes_agree(own_bundle):
    bundle = own_bundle("flux")
    code = next((bundle / "vae").glob("*.py"))
    code.write_text(code.read_text() + "\nraise RuntimeError('broken adapter')\n")
    record = read_json(bundle / manifests.FILE)
    name = code.relative_to(bundle).as_posix()
    record["files"][name] = {"sha256": sha256(code), "bytes": code.stat().st_size}
    write_json(bundle / manifests.FILE, record)
    assert verify(bundle, NULL, probe=False, trust_remote_code=True)["ok"]
    message = failure(bundle, probe=True, trust_remote_code=True)
    assert "a fresh process could not draw a picture" in message and "broken adapter" in message


def test_what_is_no_bundle(bundles, own_bundle, tmp_path):
    with pytest.raises(InputError, match="model_index.json"):
        verify(tmp_path, NULL)
    bundle = own_bundle("dit")
    record = json.loads((bundle / manifests.FILE).read_text())
    write_json(bundle / manifests.FILE, record | {"schema": "dcgen.manifest/9"})
    assert "schema" in failure(bundle)
    (bundle / manifests.FILE).unlink()
    assert "not a finished bundle" in failure(bundle)


def test_expected_tensors_of_4_bit_linears(parts, tmp_path):
    """The table of nunchaku's file format for linears of width 128."""
    from .conftest import flux_transformer

    model = flux_transformer(32, width=128)
    config = json.loads(model.to_json_string())
    svdq = {"precision": "nvfp4", "group_size": 16, "rank": 32, "targets": ["transformer_blocks.0.attn.to_q"]}
    awq = {
        "precision": "int4",
        "group_size": 64,
        "targets": ["transformer_blocks.0.norm1.linear", "transformer_blocks.0.attn"],
    }
    config["quantization_config"] = {"quant_method": "nunchaku_lite", "svdq_w4a4": svdq, "awq_w4a16": awq}
    write_json(tmp_path / "config.json", config)
    table, problems = expected_tensors(tmp_path)
    q = {
        name.removeprefix("transformer_blocks.0.attn.to_q."): value
        for name, value in table.items()
        if ".attn.to_q." in name and name[:4] == "tran"
    }
    assert {name: (value.dtypes[0], value.shape) for name, value in q.items()} == {
        "qweight": ("I8", (128, 64)),
        "wscales": ("F8_E4M3", (8, 128)),
        "smooth_factor": ("BF16", (128,)),
        "proj_down": ("BF16", (128, 32)),
        "proj_up": ("BF16", (128, 32)),
        "wcscales": ("BF16", (128,)),
        "wtscale": ("BF16", (1,)),
        "bias": ("BF16", (128,)),
    }
    assert table["transformer_blocks.0.norm1.linear.qweight"] == (("I32",), (768 // 4, 64))
    assert table["transformer_blocks.0.norm1.linear.wzeros"].shape == (2, 768)
    assert problems == [
        "the folder holds transformer_blocks.0.attn as a 4-bit linear, and it is no linear of the model"
    ]


@pytest.mark.parametrize(
    "name", [".DS_Store", "vae/._config.json", "vae/Thumbs.db", "__MACOSX/x", "tokenizer/.ipynb_checkpoints/a.json"]
)
def test_what_a_file_manager_leaves_is_no_difference(own_bundle, name):
    bundle = own_bundle("dit")
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_bytes(b"x")
    assert verify(bundle, NULL, probe=False)["ok"]
    (bundle / name).with_name("other.json").write_bytes(b"x")
    if not name.startswith(("__", "tokenizer")):
        with pytest.raises(CheckFailed, match="other.json is not in the manifest"):
            verify(bundle, NULL, probe=False)


def test_another_model_as_base_is_an_input_that_cannot_work(parts, bundles):
    with pytest.raises(InputError, match="is another model"):
        verify(bundles("flux"), NULL, parts("sana").source, probe=False)
