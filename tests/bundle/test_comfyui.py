"""export --to comfyui: the files mean the bundle, and draw its pictures; what cannot be exported is refused."""

import importlib.util
import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import numpy
import pytest
import torch
from conftest import run_cli
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from svdquant.comfyui_reader import meaning

import dcgen_convert
from dcgen_convert.bundle.loading import load
from dcgen_convert.checkpoint.single import read_single
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import sha256
from dcgen_convert.families import FAMILIES
from dcgen_convert.families import get as family_named

from .plain_flux import forward

NODES = Path(__file__).resolve().parents[2] / "integrations" / "comfyui"


@pytest.fixture(scope="module")
def nodes():
    """The node package, imported as ComfyUI does it, but without ComfyUI."""
    spec = importlib.util.spec_from_file_location(
        "dcgen_nodes", NODES / "__init__.py", submodule_search_locations=[str(NODES)]
    )
    package = sys.modules["dcgen_nodes"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    yield package
    for name in [name for name in sys.modules if name.split(".")[0] == "dcgen_nodes"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def files(bundles, tmp_path_factory):
    """`files(weights)`: the result of an export of the FLUX bundle."""
    folder, cache = tmp_path_factory.mktemp("comfyui"), {}

    def get(weights: str) -> dcgen_convert.Exported:
        if weights not in cache:
            cache[weights] = dcgen_convert.export(bundles("flux"), output=folder, weights=weights, quiet=True)
        return cache[weights]

    return get


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def dense_of(bundle: Path) -> dict[str, torch.Tensor]:
    return load_file(bundle / "transformer" / "diffusion_pytorch_model.safetensors")


def test_bf16_read_back_is_the_bundle_bit_by_bit(bundles, files):
    made, dense = files("bf16"), dense_of(bundles("flux"))
    single = read_single(made.transformer)
    assert (single.family.name, single.layout, single.unused) == ("flux", "bfl", [])
    assert set(single.stacks) == set(dense)
    for name, weight in dense.items():
        data = bytearray(b"".join(bytes(chunk) for chunk in single.item(name).chunks()))
        assert torch.equal(torch.frombuffer(data, dtype=torch.bfloat16).view(weight.shape), weight.bfloat16()), name
    assert made.notes == ["the bundle's weights are F32: they are rounded to bfloat16"]
    vae = load_file(bundles("flux") / "vae" / "diffusion_pytorch_model.safetensors")
    copied = load_file(made.autoencoder)
    assert copied.keys() == vae.keys() and all(torch.equal(copied[name], vae[name]) for name in vae)


@pytest.mark.parametrize("weights", ["fp8", "nvfp4"])
def test_the_rounded_linears_are_those_of_the_blocks(files, weights):
    dense = {name: value.double().numpy() for name, value in load_file(files("bf16").transformer).items()}
    found, made = load_file(files(weights).transformer), files(weights)
    marked = {name.removesuffix(".comfy_quant") for name in found if name.endswith(".comfy_quant")}
    wanted = {
        f"double_blocks.0.{side}_{leaf}"
        for side in ("img", "txt")
        for leaf in ("mod.lin", "attn.qkv", "attn.proj", "mlp.0", "mlp.2")
    } | {f"single_blocks.0.{leaf}" for leaf in ("modulation.lin", "linear1", "linear2")}
    assert marked == wanted and sum(made.linears.values()) == len(wanted)
    lost = {}
    for name in marked:
        conf, true = json.loads(found[f"{name}.comfy_quant"].numpy().tobytes()), dense[f"{name}.weight"]
        modulation = name.endswith(("mod.lin", "modulation.lin"))
        assert conf["format"] == ("float8_e4m3fn" if modulation else made.weights.replace("fp8", "float8_e4m3fn"))
        assert conf.get("full_precision_matrix_mult", False) == (conf["format"] == "float8_e4m3fn")
        sums = lost.setdefault(conf["format"], [0, 0])
        sums[0] += ((meaning(found, name)[0] - true) ** 2).sum()
        sums[1] += (true**2).sum()
    assert made.weight_error == pytest.approx({k: (a / b) ** 0.5 for k, (a, b) in lost.items()}, rel=0.05)
    assert all(value < {"nvfp4": 0.11, "float8_e4m3fn": 0.03}[kind] for kind, value in made.weight_error.items())
    plain = [name for name in dense if name.removesuffix(".weight") not in marked]
    assert all((found[name].double().numpy() == dense[name]).all() for name in plain)
    assert any("low-rank branch" in note for note in made.notes) == (weights == "nvfp4")


def test_formulas_on_the_authors_names_are_the_network(own_bundle, tmp_path):
    """With weights that leave nothing out: norms are no ones, and attention is far from even."""
    path = (bundle := own_bundle("flux")) / "transformer" / "diffusion_pytorch_model.safetensors"
    draws = torch.Generator().manual_seed(6)
    dense = {name: torch.randn(x.shape, generator=draws).mul(0.3).bfloat16() for name, x in load_file(path).items()}
    save_file(dense, path)
    made = dcgen_convert.export(bundle, output=tmp_path, quiet=True)
    weights = {name: value.float() for name, value in load_file(made.transformer).items()}
    network = json.loads(metadata(made.transformer)["dcgen"])["network"]
    z, t, guidance = torch.randn(2, 32, 2, 3, generator=draws), torch.tensor([0.7, 0.3]), torch.tensor([3.5, 2.0])
    text = {
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=draws),
        "pooled_projections": torch.randn(2, 16, generator=draws),
    }
    with torch.no_grad():
        model = load(bundle, torch.float32)[0].transformer
        wanted = family_named("flux").predict(model, z, t, text, guidance)
    found = forward(weights, network, z, t, *text.values(), guidance)
    assert torch.allclose(found, wanted, atol=1e-4 * wanted.abs().max())


def test_the_files_draw_the_picture_of_sample(bundles, files, nodes):
    """From the same noise, through formulas on the authors' names, the DC-AE of the nodes and the shift of the file."""
    pipeline, _ = load(bundles("flux"))
    text = family_named("flux").encode_text(pipeline, ["a fox"], 16)
    steps, height, width = 4, 96, 128
    noise = torch.randn(1, 32, height // 32, width // 32, generator=torch.Generator().manual_seed(4))
    call = dict(height=height, width=width, num_inference_steps=steps, guidance_scale=3.5, output_type="pt")
    call |= {"prompt_embeds": text["encoder_hidden_states"], "pooled_prompt_embeds": text["pooled_projections"]}
    wanted = pipeline(**call, latents=noise.flatten(2).transpose(1, 2)).images.double()
    made, facts_module = files("bf16"), sys.modules["dcgen_nodes.facts"]
    facts = facts_module.facts_of(metadata(made.transformer), "the file", "network")
    mu = facts_module.shift(facts["shift"], 12)
    times = torch.tensor([1 - step / steps for step in range(steps)] + [1e-9], dtype=torch.float64)
    sigmas = (numpy.exp(mu) / (numpy.exp(mu) + 1 / times - 1)).float()  # ComfyUI: ModelSamplingFlux, scheduler simple
    assert torch.allclose(sigmas, pipeline.scheduler.sigmas, atol=1e-6)
    weights = {name: value.float() for name, value in load_file(made.transformer).items()}
    z, guidance = noise, torch.tensor([3.5])
    for now, later in pairwise(sigmas):
        z = z + (later - now) * forward(weights, facts["network"], z, now[None], *text.values(), guidance)
    deep = nodes.nodes.DeepAutoencoder(
        facts_module.facts_of(metadata(made.autoencoder), "the file", "config"), load_file(made.autoencoder)
    )
    drawn = deep.decode(z / facts["latent"]["scaling_factor"]).movedim(-1, 1).double()
    assert wanted.std() > 0.02  # a picture, and not one grey
    assert 10 * torch.log10(1 / (drawn - wanted).square().mean()) > 40


def test_the_nodes_encode_and_decode_as_diffusers_does(bundles, files, nodes):
    made = files("bf16")
    facts = nodes.nodes.facts_of(metadata(made.autoencoder), "the file", "config")
    deep, vae = nodes.nodes.DeepAutoencoder(facts, load_file(made.autoencoder)), load(bundles("flux"))[0].vae
    picture = torch.rand(2, 70, 64, 3, generator=torch.Generator().manual_seed(0))
    inside = picture[:, 3:67].movedim(-1, 1)  # 70 px are cut to 64, evenly
    with torch.no_grad():
        latent = torch.nn.functional.pixel_unshuffle(vae.encode(2 * inside - 1).latent, 2)
        back = (vae.decode(latent).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    assert torch.allclose(deep.encode(picture), latent, atol=1e-5)
    assert torch.allclose(deep.decode(latent), back, atol=1e-5)
    assert deep.side(2048, 2048, "auto") is None and deep.side(2080, 64, "auto") == 1024
    large = torch.randn(1, 32, 2, 36, generator=torch.Generator().manual_seed(1))
    assert deep.decode(large, "always").shape == (1, 64, 1152, 3)
    assert not torch.equal(deep.decode(large, "always"), deep.decode(large, "never"))
    with pytest.raises(ValueError, match="has 16 channels, this DC-AE decodes 32"):
        deep.decode(torch.randn(1, 16, 2, 2))


def test_the_nodes_say_what_is_wrong_with_a_file(files, nodes):
    made, facts = files("bf16"), sys.modules["dcgen_nodes.facts"]
    transformer, autoencoder = metadata(made.transformer), metadata(made.autoencoder)
    with pytest.raises(ValueError, match="flux.safetensors was not written by"):
        facts.facts_of(None, "flux.safetensors", "network")
    with pytest.raises(ValueError, match="is the other file of the pair"):
        facts.facts_of(autoencoder, "flux.safetensors", "network")
    with pytest.raises(ValueError, match="update them"):
        facts.facts_of({"dcgen": '{"schema": "dcgen.comfyui/9"}'}, "flux.safetensors", "network")
    one, other = facts.facts_of(transformer, "a", "network"), facts.facts_of(autoencoder, "b", "config")
    facts.require_pair(one, other)
    with pytest.raises(ValueError, match="does not belong"):
        facts.require_pair({**one, "latent": {**one["latent"], "channels": 128}}, other)
    with pytest.raises(ValueError, match="multiples of 64 px"):
        facts.cells(128, 96, 64)
    assert set(nodes.NODE_CLASS_MAPPINGS) == set(nodes.NODE_DISPLAY_NAME_MAPPINGS)


def test_an_export_is_whole_and_takes_no_other_file_s_place(bundles, files, own_bundle, tmp_path):
    before = sha256(files("bf16").autoencoder)
    assert files("fp8").autoencoder == files("bf16").autoencoder and sha256(files("fp8").autoencoder) == before
    with pytest.raises(InputError, match="is there already"):
        dcgen_convert.export(bundles("flux"), output=files("bf16").transformer.parent, quiet=True)
    bundle = own_bundle("flux")
    again = dcgen_convert.export(bundle, output=tmp_path / "one", quiet=True)
    save_file({"a": torch.zeros(1)}, again.autoencoder)
    again.transformer.unlink()
    with pytest.raises(InputError, match=r"-dc-ae\.safetensors is there already"):
        dcgen_convert.export(bundle, output=tmp_path / "one", quiet=True)
    path = bundle / "transformer" / "diffusion_pytorch_model.safetensors"
    dense = load_file(path)
    dense["single_transformer_blocks.0.proj_out.weight"][5, 5] = float("nan")
    save_file(dense, path)
    for weights in ("bf16", "fp8"):
        with pytest.raises(InputError, match=r"NaN or infinite values in single_blocks\.0\.linear2"):
            dcgen_convert.export(bundle, output=tmp_path / weights, weights=weights, quiet=True)
        assert [file.name for file in (tmp_path / weights).iterdir()] == ["bundle-dc-ae.safetensors"]


def test_what_comfyui_cannot_be_given(bundles, quantised, own_bundle, tmp_path):
    able = [family.name for family in FAMILIES.values() if family.comfyui]
    assert able == ["flux"]
    shutil.copytree(quantised("nvfp4")[0], four := tmp_path / "four")
    lora = own_bundle("flux")
    (lora / "pytorch_lora_weights.safetensors").touch()
    for bundle, message in (
        (bundles("sana"), "is a sana model, and ComfyUI can be given bundles of flux only"),
        (four, "is quantised to 4 bits"),
        (lora, "keeps its LoRA apart"),
    ):
        with pytest.raises(InputError, match=message):
            dcgen_convert.export(bundle, output=tmp_path / "out", quiet=True)
    with pytest.raises(InputError, match="weights 'int4' do not exist"):
        dcgen_convert.export(bundles("flux"), output=tmp_path / "out", weights="int4", quiet=True)
    assert not (tmp_path / "out").exists()


def test_the_command(bundles, tmp_path):
    done = run_cli(
        "export", str(bundles("flux")), "--to", "comfyui", "-o", "out", "--weights", "fp8", "--json", cwd=tmp_path
    )
    document = json.loads(done.stdout)
    assert done.returncode == 0 and document["schema"] == "dcgen.export/1" and document["status"] == "done"
    assert sorted(map(str, (tmp_path / "out").iterdir())) == sorted([document["transformer"], document["autoencoder"]])
    done = run_cli("export", str(bundles("sana")), "-o", "out", cwd=tmp_path)
    assert done.returncode == 2 and "is a sana model" in done.stderr and done.stdout == ""
