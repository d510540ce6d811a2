"""Bundles of all families: what lies in the folder, and that stock diffusers runs it and draws what the parts draw by
hand.
"""

import json
import re
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import (
    AutoencoderDC,
    DiffusionPipeline,
    DiTPipeline,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaPipeline,
)
from einops import rearrange

from dcgen_convert.bundle import autoencoder_dc_adapter as adapter
from dcgen_convert.bundle import layout, sbom
from dcgen_convert.bundle.loading import load
from dcgen_convert.bundle.manifest import FILE
from dcgen_convert.bundle.verify import verify
from dcgen_convert.core import names
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import InputError, ResourceError
from dcgen_convert.core.files import sha256

from .conftest import make_bundle, manifest_of

COMMON = {"README.md", "LICENSE.md", "model_index.json", FILE, sbom.FILE, "scheduler/scheduler_config.json"}
MODEL = {"config.json", "diffusion_pytorch_model.safetensors"}
PARTS = {f"{folder}/{name}" for folder in ("transformer", "vae") for name in MODEL}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
ENCODER = {"config.json", "model.safetensors"}
LISTING = {
    "flux": COMMON
    | PARTS
    | {f"vae/{adapter.MODULE_NAME}.py"}
    | {f"{folder}/{name}" for folder in ("tokenizer", "tokenizer_2") for name in TOKENIZER}
    | {f"{folder}/{name}" for folder in ("text_encoder", "text_encoder_2") for name in ENCODER},
    "sana": COMMON | PARTS | {f"tokenizer/{name}" for name in TOKENIZER} | {f"text_encoder/{name}" for name in ENCODER},
    "dit": COMMON | PARTS,
}
PIPELINES = {"flux": FluxPipeline, "sana": SanaPipeline, "dit": DiTPipeline}


def listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def flux_call(parts, **changes) -> dict:
    call = dict(
        prompt="a fox",
        height=parts.side,
        width=parts.side,
        num_inference_steps=2,
        guidance_scale=3.5,
        max_sequence_length=16,
    )
    return call | dict(generator=torch.Generator().manual_seed(0), output_type="pt") | changes


@pytest.mark.parametrize("name", LISTING)
def test_exact_listing(bundles, name):
    assert listing(bundles(name)) - {"tokenizer/chat_template.jinja"} == LISTING[name]


@pytest.mark.parametrize("name", LISTING)
def test_copies_are_equal_and_not_links(parts, bundles, name):
    bundle, source = bundles(name), parts(name).source
    kept = [
        p for p in listing(bundle) if p.split("/")[0] in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    ]
    for path in [*kept, "LICENSE.md"]:
        assert sha256(bundle / path) == sha256(source / path)
        assert (bundle / path).stat().st_ino != (source / path).stat().st_ino and not (bundle / path).is_symlink()


@pytest.mark.parametrize("name", LISTING)
def test_loads_as_the_stock_pipeline_with_one_line(parts, bundles, name):
    pipe = DiffusionPipeline.from_pretrained(bundles(name), trust_remote_code=name == "flux")
    assert type(pipe) is PIPELINES[name]
    assert type(pipe.vae).__name__ == ("AutoencoderDCAdapter" if name == "flux" else "AutoencoderDC")


def test_the_readme_line_is_the_line_that_runs(parts, bundles, monkeypatch):
    bundle = bundles("flux")
    code = re.search(r"```python\n(.*?)```", (bundle / "README.md").read_text(), re.S)[1]
    scope: dict = {}
    monkeypatch.chdir(bundle.parent)
    exec(code.replace('"cuda"', '"cpu"'), scope)
    assert scope["image"].size == (parts("flux").side,) * 2


def test_without_trust_the_error_is_diffusers_own(bundles):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(bundles("flux"))


def test_flux_draws_exactly_what_patch_1_draws_by_hand(parts, bundles):
    """The stock pipeline with the adapter against a loop over deep tokens with stock AutoencoderDC and no packing at
    all.
    """
    bundle, side = bundles("flux"), parts("flux").side
    pipe = DiffusionPipeline.from_pretrained(bundle, trust_remote_code=True)
    drawn = pipe(**flux_call(parts("flux"))).images

    grid = side // 32
    # The pipeline draws its noise in the exposed shape and packs it; from there on the loop sees deep tokens only.
    noise = torch.randn(1, 8, 2 * grid, 2 * grid, generator=torch.Generator().manual_seed(0))
    tokens = rearrange(noise, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
    model = FluxTransformer2DModel.from_pretrained(bundle, subfolder="transformer")
    vae = AutoencoderDC.from_pretrained(bundle, subfolder="vae")
    ids = torch.stack(
        torch.meshgrid(torch.zeros(1), torch.arange(float(grid)), torch.arange(float(grid)), indexing="ij"), -1
    ).reshape(-1, 3)
    with torch.no_grad():
        embeds, pooled, text_ids = pipe.encode_prompt("a fox", None, max_sequence_length=16)
        mu = 0.5 + (1.15 - 0.5) * (grid**2 - 256) / (4096 - 256)
        sigmas = numpy.exp(mu) / (numpy.exp(mu) + (1 / numpy.array([1.0, 0.5]) - 1))
        for sigma, following in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
            velocity = model(
                tokens,
                embeds,
                pooled,
                torch.tensor([sigma], dtype=torch.float32),
                ids,
                text_ids,
                torch.tensor([3.5]),
                return_dict=False,
            )[0]
            tokens = tokens + (following - sigma) * velocity
        deep = rearrange(tokens, "b (h w) c -> b c h w", h=grid) / 0.4
        expected = (vae.decode(deep.float()).sample / 2 + 0.5).clamp(0, 1)
    assert (drawn - expected).abs().max() < 1e-5


def test_image_to_image_and_saving_again(parts, bundles, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(bundles("flux"), trust_remote_code=True)
    call = flux_call(parts("flux"))
    first = pipe(**call).images
    pipe.save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(again(**flux_call(parts("flux"))).images, first)
    image_pipe = FluxImg2ImgPipeline(**again.components)
    changed = image_pipe(**flux_call(parts("flux"), image=first, strength=0.9)).images
    assert changed.shape == first.shape and torch.isfinite(changed).all()


def test_official_layout_differs_in_two_configs_and_the_code_only(parts, bundles, tmp_path):
    stock, official = bundles("flux"), make_bundle(parts("flux"), tmp_path / "tiny-flux", layout="official")
    index = json.loads((official / "model_index.json").read_text())
    assert (index["_class_name"], index["vae"]) == ("DCGen_FluxPipeline", ["diffusers", "AutoencoderDC"])
    assert listing(stock) - listing(official) == {f"vae/{adapter.MODULE_NAME}.py"}
    different = {name for name in listing(official) if sha256(official / name) != sha256(stock / name)}
    assert different == {"model_index.json", "vae/config.json", "README.md", FILE}
    assert json.loads((official / "vae/config.json").read_text())["_class_name"] == "AutoencoderDC"


def test_official_layout_exists_for_flux_only(parts, tmp_path):
    with pytest.raises(InputError, match="no pipeline class for sana"):
        make_bundle(parts("sana"), tmp_path / "out", layout="official")
    with pytest.raises(InputError, match="'classic' does not exist"):
        make_bundle(parts("flux"), tmp_path / "out", layout="classic")
    assert not list(tmp_path.iterdir())


def test_scheduler_and_scale_are_the_bundle_s_own(parts, tmp_path):
    flux = parts("flux")
    bundle = make_bundle(flux, tmp_path / "out", shift="flux2", scaling_factor=0.77)
    pipe = DiffusionPipeline.from_pretrained(bundle, trust_remote_code=True)
    assert (
        pipe.scheduler.config.shift == pytest.approx((32 * 4 / 4096) ** 0.5)
        and not pipe.scheduler.config.use_dynamic_shifting
    )
    assert pipe.vae.config.scaling_factor == 0.77


def test_lora_beside_the_weights_loads_with_stock_diffusers(parts, tmp_path):
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    flux = parts("flux")
    model = FluxTransformer2DModel.from_pretrained(flux.transformer)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))
    FluxPipeline.save_lora_weights(tmp_path / "lora", convert_state_dict_to_diffusers(get_peft_model_state_dict(model)))
    bundle = make_bundle(flux, tmp_path / "out", lora=tmp_path / "lora" / names.LORA)
    pipe = DiffusionPipeline.from_pretrained(bundle, trust_remote_code=True)
    before = pipe(**flux_call(flux)).images
    pipe.load_lora_weights(bundle)
    after = pipe(**flux_call(flux)).images
    assert not torch.equal(after, before)
    assert torch.equal(load(bundle)[0](**flux_call(flux)).images, after)
    assert 'pipe.load_lora_weights("out")' in (bundle / "README.md").read_text()


def test_a_taken_output_is_refused_or_replaced(parts, bundles, own_bundle, tmp_path):
    dit, bundle = parts("dit"), own_bundle("dit")
    with pytest.raises(InputError, match="not empty"):
        make_bundle(dit, bundle)
    (bundle / "README.md").write_text("old")
    make_bundle(dit, bundle, force=True)
    assert listing(bundle) == LISTING["dit"] and (bundle / "README.md").read_text() != "old"
    other = tmp_path / "home"
    other.mkdir()
    (other / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match="not a bundle"):
        make_bundle(dit, other, force=True)
    assert (other / "letter.txt").read_text() == "mine"
    with pytest.raises(InputError, match="is a file"):
        make_bundle(dit, other / "letter.txt", force=True)


def test_a_failure_leaves_nothing(parts, bundles, own_bundle, tmp_path, monkeypatch):
    dit, old = parts("dit"), own_bundle("dit")
    before = {name: sha256(old / name) for name in listing(old)}

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(layout.manifests, "tensor_table", stop)
    for output, force in ((tmp_path / "new", False), (old, True)):
        with pytest.raises(KeyboardInterrupt):
            make_bundle(dit, output, force=force)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert {name: sha256(old / name) for name in listing(old)} == before


def test_a_small_disk_is_an_error_before_anything_is_written(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(layout.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**4))
    with pytest.raises(ResourceError, match="free"):
        make_bundle(parts("dit"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_two_bundles_of_one_run_are_equal_but_for_times(parts, tmp_path):
    one, two = (make_bundle(parts("dit"), tmp_path / name / "same") for name in "ab")
    assert {n for n in listing(one) if sha256(one / n) != sha256(two / n)} <= {FILE}
    records = [json.loads((path / FILE).read_text()) for path in (one, two)]
    for record in records:
        del record["times"], record["hardware"]
    assert records[0] == records[1]


def test_later_measurements_enter_manifest_and_card(parts, own_bundle):
    bundle = own_bundle("dit")
    layout.add_metrics(
        bundle, parts("dit").family, "verify", {"accuracy_source": 0.975, "draw_seconds": 3.0, "gap": [1.0, 2.0]}
    )
    record = json.loads((bundle / FILE).read_text())
    assert record["metrics"]["verify"] == {"accuracy_source": 0.975, "gap": [1.0, 2.0]}
    assert record["times"]["verify.draw_seconds"] == 3.0 and record["metrics"]["flow_loss"] == {
        "before": 1.25,
        "after": 0.5,
    }
    card = (bundle / "README.md").read_text()
    assert "base model 97.5% |" in card and "seconds" not in card and "gap" not in card
    assert verify(bundle, NULL, probe=False)["ok"]


def test_manifest_says_what_became_of_every_tensor(parts, bundles):
    record = json.loads((bundles("flux") / FILE).read_text())
    fresh = {name for name, entry in record["tensors"].items() if entry["origin"] != "identical"}
    assert fresh == {f"{module}.{part}" for module in ("x_embedder", "proj_out") for part in ("weight", "bias")}
    assert record["tensors"]["x_embedder.weight"] | {"sha256": ""} == {
        "dtype": "F32",
        "shape": [32, 32],
        "format": "dense",
        "origin": "changed",
        "sha256": "",
    }
    assert set(record["files"]) == listing(bundles("flux")) - {FILE}
    assert record["sources"]["base"]["files"]["transformer/config.json"] == sha256(
        parts("flux").source / "transformer/config.json"
    )
    assert (
        record["versions"]["torch"] == torch.__version__.split("+")[0]
        or record["versions"]["torch"] == torch.__version__
    )
    assert manifest_of(parts("flux"))["recipe"] == record["recipe"]
