"""`adopt`: a folder in the layout of the DC-Gen authors becomes a bundle that draws as their code does."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from conftest import WEIGHTS
from diffusers import AutoencoderDC
from PIL import Image
from safetensors.torch import load_file, save_file

from dcgen_convert.api.order import quantisation
from dcgen_convert.bundle import loading
from dcgen_convert.bundle import manifest as manifests
from dcgen_convert.bundle.adoption import adopt, write
from dcgen_convert.bundle.authors_folder import Wish, find, understand
from dcgen_convert.bundle.autoencoder_dc_adapter import collect
from dcgen_convert.bundle.inspection import inspect
from dcgen_convert.bundle.layout import read_index
from dcgen_convert.bundle.sample import sample
from dcgen_convert.bundle.verify import verify
from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.errors import AccessError, DcgenError, InputError
from dcgen_convert.core.files import read_json, write_json
from dcgen_convert.core.journal import Run, Stage
from dcgen_convert.networks import autoencoders, models, pipelines
from dcgen_convert.quantization import Drawing, Request, quantize_source
from dcgen_convert.recipe import loading as recipes
from dcgen_convert.stages import align_embedder, align_head, source_pipeline, surgery
from dcgen_convert.stages.job import find_autoencoder, prepare

from .conftest import autoencoder_dc, flux_transformer, make_bundle

CHECKS = ["files", "code", "structure", "tensors", "table", "parts", "against", "picture"]
SIDE, STEPS, GUIDANCE = 128, 3, 3.5  # 16 tokens


def as_published(bundle: Path) -> Path:
    """Take from a bundle in the authors' layout what their folders do not have."""
    for name in ("dcgen_manifest.json", "README.md"):
        (bundle / name).unlink()
    return bundle


@pytest.fixture(scope="module")
def published(parts, tmp_path_factory) -> Path:
    """A folder as the authors publish it, with a scheduler config whose numbers their code does not read."""
    folder = as_published(make_bundle(parts("flux"), tmp_path_factory.mktemp("hub") / "Res1K", layout="official"))
    change(folder / "scheduler" / "scheduler_config.json", base_shift=0.9, max_shift=3.0, base_image_seq_len=100)
    return folder


@pytest.fixture
def copy(published, tmp_path) -> Path:
    return shutil.copytree(published, tmp_path / "copy")


def change(path: Path, **values: object) -> None:
    write_json(path, read_json(path) | values)


def made(folder: Path, output: Path, **wish: object) -> dict:
    """Adopt without the check at the end, which starts a process."""
    asked = Wish(str(folder), **wish)
    return write(understand(asked), asked, output, NULL)


@torch.no_grad()
def drawn_by_their_rules(folder: Path, pipeline, shift: str) -> torch.Tensor:
    """A picture (1, 3, H, W) in [0, 1] as the authors' code computes it: patch 1, whole tokens, their noise levels."""
    vae = AutoencoderDC.from_pretrained(folder / "vae")
    cells, channels = SIDE // 32, 32
    noise = torch.randn(1, channels // 4, 2 * cells, 2 * cells, generator=torch.Generator().manual_seed(0))
    z = collect(noise, 2, "c_first").flatten(2).transpose(1, 2)  # (1, N, C)
    levels = torch.linspace(1, 1 / STEPS, STEPS, dtype=torch.float64)
    if shift == "flux2":
        r = math.sqrt(cells**2 * channels / 4096)
    else:
        r = math.exp(0.5 + (1.15 - 0.5) * (cells**2 - 256) / (4096 - 256))
    levels = torch.cat([r * levels / (1 + (r - 1) * levels), torch.zeros(1, dtype=torch.float64)])
    rows, columns = torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij")
    ids = torch.stack([torch.zeros(cells**2), rows.flatten(), columns.flatten()], 1)
    text, pooled, text_ids = pipeline.encode_prompt(prompt="a fox", prompt_2=None, max_sequence_length=512)
    for level, following in itertools.pairwise(levels):
        velocity = pipeline.transformer(
            hidden_states=z,
            timestep=level.float()[None],
            guidance=torch.tensor([GUIDANCE]),
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=text_ids,
            img_ids=ids,
        ).sample
        z = z + (following - level).float() * velocity
    deep = z.transpose(1, 2).unflatten(2, (cells, cells)) / vae.config.scaling_factor
    return (vae.decode(deep).sample / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("shift", ["flux2", "flux"])
def test_the_bundle_draws_what_the_authors_code_draws(published, tmp_path, shift):
    made(published, tmp_path / "bundle", resolution=SIDE, shift=shift)
    reference = drawn_by_their_rules(published, loading.load(tmp_path / "bundle", torch.float32)[0], shift)
    options = dict(steps=STEPS, guidance=GUIDANCE, dtype=torch.float32)
    done = sample(tmp_path / "bundle", ["a fox"], tmp_path / "pictures", NULL, **options)
    picture = torch.from_numpy(numpy.asarray(Image.open(done["images"][0])) / 255).permute(2, 0, 1)
    assert done["height"] == SIDE and picture.std() > 0.01
    assert (picture - reference[0]).abs().max() < 1.5 / 255


def test_the_result_is_a_verified_stock_bundle(published, tmp_path):
    """Size and shift are those of the authors' program for an f32 model: 1024 px, r = sqrt(1024 * 32 / 4096)."""
    done = adopt(Wish(str(published)), tmp_path / "bundle", NULL)
    bundle, index = tmp_path / "bundle", read_index(tmp_path / "bundle")
    assert done["checks"] == CHECKS and index["_class_name"] == "FluxPipeline"
    record, scheduler = read_json(bundle / "dcgen_manifest.json"), read_json(bundle / "scheduler/scheduler_config.json")
    assert scheduler["shift"] == pytest.approx(math.sqrt(8)) and not scheduler["use_dynamic_shifting"]
    assert {row["origin"] for row in record["tensors"].values()} == {"identical"} and record["layout"] == "stock"
    known = dict(
        side=1024, shift="flux2", factor=32, channels=32, scaling_factor=0.4, origin="the authors' code for Res1K"
    )
    assert done["adopted"] == record["adopted"] and known.items() <= record["adopted"].items()
    assert record["defaults"] == dict(height=1024, width=1024, steps=20, guidance=3.5, text_length=512)
    assert read_json(bundle / "vae" / "config.json")["scaling_factor"] == 0.4
    card = (bundle / "README.md").read_text()
    for words in ("the DC-Gen authors converted", "1024 px, flux2 (r = 2.828)", "Not known here: the training data"):
        assert words in card
    assert "finetune" not in card and str(tmp_path) not in card + json.dumps(record)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]
    with pytest.raises(InputError, match="bundle of this program already"):
        understand(Wish(str(bundle)))


def test_the_4k_model_has_the_line_of_flux(published, tmp_path):
    """4096 px with f64 are 4096 tokens: mu = 1.15, whatever the scheduler's config says."""
    shutil.copytree(published, tmp_path / "Res4K")
    autoencoder, transformer = tmp_path / "Res4K" / "vae", tmp_path / "Res4K" / "transformer"
    for folder in (autoencoder, transformer):
        shutil.rmtree(folder)
    autoencoder_dc(64, 128).save_pretrained(autoencoder)
    flux_transformer(128).save_pretrained(transformer)
    facts = made(tmp_path / "Res4K", tmp_path / "bundle")
    assert (facts["side"], facts["shift"], facts["r"]) == (4096, "flux", pytest.approx(math.exp(1.15)))
    line = dict(base_image_seq_len=256, max_image_seq_len=4096, base_shift=0.5, max_shift=1.15)
    assert line.items() <= read_json(tmp_path / "bundle/scheduler/scheduler_config.json").items()


def test_code_in_the_folder_is_named_and_neither_run_nor_taken(copy, tmp_path):
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    for name in ("pipeline_dcgen_flux.py", "vae/their_autoencoder.py", "transformer/modeling.py"):
        (copy / name).write_text(code)
    index = {
        "_class_name": ["pipeline_dcgen_flux", "DCGen_FluxPipeline"],
        "vae": ["their_autoencoder", "AutoencoderDC"],
    }
    change(copy / "model_index.json", **index)
    change(
        copy / "vae" / "config.json", auto_map={"AutoModel": "their_autoencoder.AutoencoderDC"}, inner={"auto_map": 1}
    )
    left = " ".join(made(copy, tmp_path / "bundle")["left_out"])
    verify(tmp_path / "bundle", NULL, str(copy), probe=False)
    drawn = sample(tmp_path / "bundle", ["a fox"], tmp_path / "pictures", NULL, height=64, width=64, steps=1)
    assert drawn["images"] and not (tmp_path / "ran").exists()
    assert "pipeline_dcgen_flux.py is code" in left and "their_autoencoder.AutoencoderDC is code" in left
    found = {path.name for path in (tmp_path / "bundle").rglob("*.py")}
    assert found == {"autoencoder_dc_adapter_v4.py"}


def test_what_the_folder_lacks_comes_from_base_and_autoencoder(parts, published, tmp_path):
    """A transformer alone, and a folder without text encoders: both are refused with the option that completes them."""
    with pytest.raises(InputError, match="no scheduler and no text_encoder .*no vae") as refused:
        understand(Wish(str(published / "transformer")))
    assert "--ae dc-ae-f32" in refused.value.hint and "--base flux-krea" in refused.value.hint
    given = dict(base=str(parts("flux").source), ae=str(parts("flux").autoencoder))
    facts = made(published / "transformer", tmp_path / "alone", **given)
    assert facts["pipeline"] is None and facts["side"] == 1024
    whole = shutil.copytree(published, tmp_path / "whole")
    shutil.rmtree(whole / "text_encoder_2")
    with pytest.raises(InputError, match="has no text_encoder_2") as refused:
        understand(Wish(str(whole)))
    assert "--ae" not in refused.value.hint and "--base flux-krea" in refused.value.hint
    made(whole, tmp_path / "completed", base=given["base"])
    for bundle in (tmp_path / "alone", tmp_path / "completed"):
        assert "picture" not in verify(bundle, NULL, str(published), probe=False)["checks"]
    record = read_json(tmp_path / "completed" / "dcgen_manifest.json")
    names = {name.split("/")[0] for name in record["sources"]["base"]["base"]["files"]}
    assert names == {"text_encoder_2"} and "completed by" in record["licence"]
    with pytest.raises(InputError, match="the base .* is a SanaPipeline"):
        understand(Wish(str(whole), base=str(WEIGHTS / "tiny-sana")))


def lose(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def index_says(**values: object) -> Callable[[Path], None]:
    return lambda folder: change(folder / "model_index.json", **values)


def config_says(part: str, **values: object) -> Callable[[Path], None]:
    return lambda folder: change(folder / part, **values)


def pickled(part: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = next((folder / part).glob("*.safetensors"))
        file.rename(file.with_suffix(".bin"))

    return change


def nested(folder: Path) -> None:
    inside = [path for path in folder.iterdir()]
    (folder / "Res4K").mkdir()
    for path in inside:
        path.rename(folder / "Res4K" / path.name)


def hooked(folder: Path) -> None:
    (folder / "text_encoder" / "transformers.py").write_text("raise SystemExit")


def gone(part: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / part)


VAE, NETWORK = "vae/config.json", "transformer/config.json"


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (index_says(_class_name="DCGen_OtherPipeline"), "class DCGen_OtherPipeline, which this program does not"),
        (index_says(_class_name=[]), r"pipeline class \[\], which"),
        (index_says(_class_name=7), "pipeline class 7, which"),
        (index_says(_class_name="DCVideoGenWanTextToVideoPipeline"), "which draws videos"),
        (index_says(_class_name="DCQwenImageEditPipeline"), "which edits pictures"),
        (index_says(vae=["dc_gen", "DCAE_HF"]), r"the vae of .* is a dc_gen\.DCAE_HF, and not a AutoencoderDC"),
        (index_says(transformer=["diffusers", "SD3Transformer2DModel"]), "is a diffusers.SD3Transformer2DModel"),
        (index_says(vae=None), "has no vae"),
        (lose("model_index.json"), "holds no model_index.json"),
        (nested, "its folders Res4K do"),
        (gone("transformer"), "has no transformer"),
        (pickled("transformer"), "is a pickle"),
        (pickled("vae"), "is a pickle"),
        (pickled("text_encoder"), "is a pickle"),
        (lose(NETWORK), "config.json does not exist"),
        (config_says(NETWORK, in_channels=64), r"x_embedder.weight is \[32, 32\] in .*asks for \[32, 64\]"),
        (config_says(NETWORK, num_layers=2), "lacks .* tensors for a FluxTransformer2DModel"),
        (config_says(NETWORK, num_attention_heads="two"), "describes no FluxTransformer2DModel"),
        (config_says(NETWORK, quantization_config={"quant_method": "x"}), "already quantised"),
        (config_says(NETWORK, _class_name="Other"), "names Other, and not FluxTransformer2DModel"),
        (config_says(VAE, scaling_factor=None), "no usable scaling_factor"),
        (config_says(VAE, scaling_factor="0.3"), "no usable scaling_factor"),
        (config_says(VAE, latent_channels=16), "its config asks for|lacks|has too many"),
        (config_says(VAE, encoder_block_out_channels=7), "lacks block_out_channels|describes no AutoencoderDC"),
        (config_says("scheduler/scheduler_config.json", _class_name="DDIMScheduler"), "scheduler of .*DDIMScheduler"),
        (config_says("text_encoder/config.json", vocab_size=65), "text_encoder"),
        (hooked, "code that this program"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "model_index.json"),
    ],
)  # fmt: skip
def test_what_cannot_be_adopted_is_one_sentence_and_leaves_nothing(copy, tmp_path, damage, sentence):
    damage(copy)
    with pytest.raises(DcgenError, match=sentence) as refused:
        made(copy, tmp_path / "bundle")
    assert refused.value.exit_code in (1, 2) and refused.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


@pytest.mark.parametrize(
    "wish, sentence",
    [
        (dict(resolution=100), "100 px is not a multiple"),
        (dict(shift="steep"), "shift is 'steep'"),
        (dict(base="no/such-base"), "no/such-base is not in the local cache"),
        (dict(ae="tiny-dc-ae-f64"), "reads 32 numbers per token, its autoencoder has 128 channels"),
    ],
)
def test_wishes_that_cannot_be(published, tmp_path, wish, sentence):
    with pytest.raises(DcgenError, match=sentence):
        made(published, tmp_path / "bundle", **wish)
    assert list(tmp_path.iterdir()) == []


def test_stock_folders_and_folders_in_a_repository(tmp_path):
    with pytest.raises(InputError, match="is a FluxPipeline of stock diffusers: there is nothing to adopt"):
        understand(Wish(str(WEIGHTS / "tiny-flux")))
    with pytest.raises(InputError, match="is a sana transformer"):
        understand(Wish(str(WEIGHTS / "tiny-sana" / "transformer")))
    with pytest.raises(AccessError, match="^org/name is not in the local cache"):
        find("org/name/folder")


@pytest.mark.parametrize("name", ["DCGen_FluxPipeline", "FluxPipeline"])
def test_the_other_verbs_name_adopt(copy, tmp_path, name):
    """Also where the class was only renamed: a stock pipeline cannot draw with a plain AutoencoderDC."""
    change(copy / "model_index.json", _class_name=name)
    section = quantisation("int4", 16, None, None, "diffusers", False)
    with pytest.raises(InputError) as quantising:
        quantize_source(Request(str(copy), tmp_path / "out", section, Drawing(True)), NULL)
    with pytest.raises(InputError) as loading_it:
        load_source(str(copy), str(copy))
    with pytest.raises(InputError) as planning:
        recipes.load(str(copy), env={})
    for error in (quantising, loading_it, planning):
        assert f"({name} with a plain AutoencoderDC)" in error.value.message
        assert f"dcgen-convert adopt {copy} -o BUNDLE" in error.value.hint
    assert "dcgen-convert adopt" in inspect(copy)["notes"][0] and inspect(copy)["pipeline"] == name
    assert made(copy, tmp_path / "bundle")["pipeline"] == name


def test_a_bundle_of_this_program_in_their_layout_keeps_its_size_and_shift(parts, tmp_path):
    official = make_bundle(parts("flux"), tmp_path / "official", layout="official", shift=1.7)
    facts = made(official, tmp_path / "bundle")
    assert (facts["side"], facts["shift"], facts["r"], facts["origin"]) == (64, "model", 1.7, "its manifest")
    record = read_json(tmp_path / "bundle" / "dcgen_manifest.json")
    assert record["conversion"]["recipe"]["name"] == "tiny" and "adopted" not in record
    assert "base of the source" in record["sources"]
    assert "with the DC-Gen method" in (tmp_path / "bundle" / "README.md").read_text()
    change(official / "dcgen_manifest.json", lora="pytorch_lora_weights.safetensors")
    with pytest.raises(InputError, match="keeps its LoRA"):
        understand(Wish(str(official)))


def test_an_adopted_bundle_is_quantised_by_one_more_command(parts, tmp_path):
    """The pictures are drawn through the adapter; the result is verified and keeps the lineage."""
    transformer = tmp_path / "transformer"
    flux_transformer(32, width=128).save_pretrained(transformer)
    folder = as_published(make_bundle(parts("flux"), tmp_path / "hub", layout="official", transformer=transformer))
    made(folder, tmp_path / "bundle", resolution=64)
    section = quantisation("nvfp4", 16, 1, None, "diffusers", False)
    done = quantize_source(Request(str(tmp_path / "bundle"), tmp_path / "out", section, Drawing(steps=1)), NULL)
    assert done["checks"] == CHECKS and done["metrics"]["svdq"] > 0
    record = read_json(tmp_path / "out" / "dcgen_manifest.json")
    assert record["adopted"]["shift"] == "flux2" and record["defaults"]["height"] == 64
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the DC-Gen authors converted" in card and "SVDQuant W4A4 NVFP4" in card and "trust_remote_code=True" in card


def test_a_bundle_is_the_source_of_another_conversion(published, tmp_path, capfd):
    """Pictures and latents of the source are those of its own autoencoder; only embedder and head get new shapes."""
    bundle = tmp_path / "bundle"
    made(published, bundle, resolution=SIDE)
    asked = recipes.load(str(bundle), flags={"ae": "tiny-dc-ae-f64", "resolution": 128}, sets=["dtype=fp32"], env={})
    job = prepare(asked, Run(tmp_path / "run", NULL), Console())
    assert "SOURCE is a bundle: its pictures and its latents (f32, 32 channels)" in capfd.readouterr().err
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    own, plain = (autoencoders.load(folder) for folder in (job.source.vae, published / "vae"))
    assert torch.equal(own.encode(pixels), plain.encode(pixels)) and own.channels == 32
    drawn = [
        pipelines.draw(job.family, pipeline, ["a fox"], [0], side=64, steps=1, guidance=3.5, length=16)
        for pipeline in (source_pipeline.load(job.source, job.dtype), loading.load(bundle, torch.float32)[0])
    ]
    assert torch.equal(*drawn) and drawn[0].std() > 0.01
    assert source_pipeline.text_encoders(job.source, job.dtype).vae is None
    shapes = surgery.new_shapes(job, job.converted_config)
    assert shapes == {
        "x_embedder.weight": (32, 128), "x_embedder.bias": (32,), "proj_out.weight": (128, 32), "proj_out.bias": (128,)
    }  # fmt: skip
    assert manifests.sources_of(bundle).keys() == {"base of the source"}
    with pytest.raises(InputError, match="AutoencoderDCAdapter, a conversion needs an AutoencoderDC"):
        find_autoencoder(str(bundle / "vae"), tmp_path)
    (bundle / "pytorch_lora_weights.safetensors").touch()
    with pytest.raises(InputError, match="keeps its LoRA in a file of its own"):
        load_source("bundle", str(bundle))


def test_a_bundle_keeps_embedder_and_head_with_the_autoencoder_that_it_has(published, tmp_path, capfd):
    """Nothing is made anew then; with one other weight in the autoencoder it is."""
    bundle, other = tmp_path / "bundle", tmp_path / "other"
    made(published, bundle, resolution=SIDE)
    shutil.copytree(published / "vae", other)
    weights = load_file(other / "diffusion_pytorch_model.safetensors")
    weights[max(weights)][0] += 1
    save_file(weights, other / "diffusion_pytorch_model.safetensors", {"format": "pt"})

    def job_for(target):
        asked = recipes.load(str(bundle), flags={"ae": str(target), "resolution": 128}, sets=["dtype=fp32"], env={})
        return prepare(asked, Run(tmp_path / f"run-{target.name}", NULL), Console())

    assert not job_for(other).keeps_latents
    job = job_for(published / "vae")
    assert job.keeps_latents
    stage = Stage(job.folders.surgery)
    stage.folder.mkdir(parents=True)
    surgery.run(job, stage)
    assert stage.metrics["replaced"] == [] and "stay as they are" in capfd.readouterr().err
    source, result = (models.load(folder / "transformer", torch.float32) for folder in (bundle, stage.folder))
    before, after = source.state_dict(), result.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    aligned = Stage(job.folders.align_embedder)
    aligned.folder.mkdir()
    align_embedder.run(job, aligned)
    kept = load_file(aligned.folder / "modules.safetensors")
    assert kept.keys() == {"x_embedder.weight", "x_embedder.bias"} and aligned.metrics["method"] == "kept"
    assert all(torch.equal(kept[name], before[name].float()) for name in kept)
    head = source.proj_out.weight.clone()
    assert align_head.start_head(job, SimpleNamespace(model=source), None, tmp_path) == {}
    assert torch.equal(source.proj_out.weight, head) and head.any()
