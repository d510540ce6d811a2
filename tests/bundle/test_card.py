"""The model card and the inheritance of licences."""

import json
import re
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from PIL import Image

from dcgen_convert.bundle import layout, lineage
from dcgen_convert.bundle.card import render
from dcgen_convert.bundle.verify import verify
from dcgen_convert.checkpoint.licence import licence_of
from dcgen_convert.checkpoint.record import source_record
from dcgen_convert.core.console import NULL
from dcgen_convert.core.files import read_json, write_json
from dcgen_convert.families import catalog

from .conftest import make_bundle, manifest_of


def header(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_licence_fields_are_the_source_s(parts):
    card = render(manifest_of(parts("flux")), family=parts("flux").family, title="t")
    fields = header(card)
    stated = {"license": "other", "license_name": "tiny-licence", "license_link": "LICENSE.md", "files": ["LICENSE.md"]}
    assert licence_of(parts("flux").source) == stated
    assert (fields["license"], fields["license_name"], fields["license_link"]) == (
        "other",
        "tiny-licence",
        "LICENSE.md",
    )
    assert (
        fields["base_model"] == ["org/base"]
        and fields["base_model_relation"] == "finetune"
        and fields["pipeline_tag"] == "text-to-image"
    )
    assert "autoencoder: unknown" in card and "ask its authors" in card


def test_no_licence_is_invented(parts, tmp_path):
    assert licence_of(tmp_path) == {"license": "unknown", "files": []}
    (tmp_path / "NOTICE").write_text("x")
    assert licence_of(tmp_path) == {"license": "unknown", "files": ["NOTICE"]}
    card = render(
        manifest_of(parts("dit"), licence={"base": licence_of(tmp_path)}), family=parts("dit").family, title="t"
    )
    assert "license" not in header(card) and "pipeline_tag" not in header(card)


@pytest.mark.parametrize(
    "readme", ["no front matter", "---\nlicense: mit", "---\n- a list\n---\n", "---\nkey: [\n---\n", ""]
)
def test_readmes_without_front_matter(tmp_path, readme):
    (tmp_path / "README.md").write_text(readme)
    assert licence_of(tmp_path)["license"] == "unknown"


def test_card_says_what_runs_where(parts):
    flux, sana = parts("flux"), parts("sana")
    quantised = manifest_of(flux, recipe={"quantize": {"format": "nvfp4"}})
    card = render(quantised, family=flux.family, title="t")
    assert header(card)["base_model_relation"] == "quantized" and "NVFP4" in card and "trust_remote_code=True" in card
    assert "height=64, width=64, num_inference_steps=2, guidance_scale=3.5, max_sequence_length=16" in card
    assert "use_resolution_binning=False" in render(manifest_of(sana), family=sana.family, title="t")
    assert "trust_remote_code" not in render(manifest_of(sana), family=sana.family, title="t")
    assert "class_labels=" in render(manifest_of(parts("dit")), family=parts("dit").family, title="t")
    official = render(manifest_of(flux), family=flux.family, layout="official", title="t")
    code = official.partition("```python")[2].partition("```")[0]
    assert "import DCGen_FluxPipeline" in code and "https://github.com/" in code


def test_code_loads_the_folder_or_the_repository(parts):
    flux = parts("flux")
    assert 'from_pretrained("t", ' in render(manifest_of(flux), family=flux.family, title="t")
    card = render(manifest_of(flux), family=flux.family, title="t", lora=True, place="org/t")
    assert 'from_pretrained("org/t", ' in card and 'load_lora_weights("org/t")' in card


def test_card_names_versions_sizes_and_limits(parts):
    flux = parts("flux")
    recipe = {
        "adapt": {"phases": [{"resolution": 64}, {"resolution": 96, "data": {"path": "p"}}]},
        "data": {"buckets": True},
    }
    card = render(manifest_of(flux, recipe=recipe), family=flux.family, title="t")
    assert "diffusers>=0.42" in card and f"diffusers {version('diffusers')}" in card
    assert "Trained at 64 x 64, 96 x 96 px (pictures of several shapes" in card
    assert "Phase 2 had pictures of its own (`adapt.phases.1.data` in" in card and "Phase 1 had" not in card
    assert "multiples of 32 px" in card and "edges of a mask on multiples of 32 px" in card
    assert "`x_embedder`" in card and "Give height and width" in card
    assert f"draws {64 * flux.factor} x {64 * flux.factor} px, whatever" in card  # 128 cells of half a factor
    sana = render(manifest_of(parts("sana")), family=parts("sana").family, title="t")
    assert "draws 1024 x 1024 px, whatever" in sana and "Give `use_resolution_binning=False`" in sana
    dit = render(manifest_of(parts("dit")), family=parts("dit").family, title="t")
    assert "Give height" not in dit and "resolution_binning" not in dit


def test_card_promises_comfyui_only_what_its_latents_allow(parts):
    flux = parts("flux")
    single = manifest_of(flux, recipe={"quantize": {"format": "nvfp4", "container": "nunchaku"}})
    card = render(single, family=flux.family, title="t", layout="source")
    assert "ComfyUI-nunchaku" in card and "latent format" in card and "not tried" in card
    converted = render(single, family=flux.family, title="t", layout="stock")
    assert "ComfyUI cannot draw" in converted and "ComfyUI-nunchaku" not in converted
    dense, sana = manifest_of(flux), parts("sana")
    assert "export BUNDLE --to comfyui" in render(dense, family=flux.family, title="t")
    apart = render(dense, family=flux.family, title="t", lora=True)
    assert "ComfyUI cannot draw" in apart and "--to comfyui" not in apart
    assert "ComfyUI cannot draw" in render(manifest_of(sana), family=sana.family, title="t")


def test_a_quantised_source_is_no_conversion(parts):
    flux = parts("flux")
    quantised = manifest_of(flux, recipe={"quantize": {"format": "int4"}})
    card = render(quantised, family=flux.family, title="t", layout="source")
    assert header(card)["tags"] == ["dcgen-convert", "flux", "svdquant"] and "mask" not in card
    assert header(render(quantised, family=flux.family, title="t"))["tags"][1] == "dc-ae"


def test_what_was_measured_is_said_in_words(parts):
    metrics = {
        "latents": {"roundtrip_psnr_db": 30.25},
        "adapt-1": {"evaluation": {"before": {"mean": 1.25}, "after": {"mean": 0.5}}},
        "merge-1": {"gap": [0.5, 0.125]},
        "quantize": {"svdq": 5, "awq": 1, "layers": [{"module": "a", "error": 0.125}, {"module": "b", "error": 0.5}]},
        "verify": {"psnr_quantised_db": 25.5, "accuracy_source": 0.875, "accuracy_nvfp4": 0.75, "checks": ["files"]},
        "unheard of": {"strange_key": 1.5},
    }
    flux = parts("flux")
    card = render(manifest_of(flux, metrics=metrics), family=flux.family, title="t")
    values = [
        line.split(" | ")[1].rstrip(" |") for line in card.splitlines() if line.startswith("| ") and line != "| | |"
    ]
    assert values == [
        "30.2 dB",
        "1.25 and 0.5",
        "12.5%",
        "6, 1",
        "50.00% and 50.00%",
        "25.5 dB",
        "base model 87.5%, NVFP4 75.0%",
    ]
    assert not any(word in card for word in ("roundtrip_psnr_db", "strange_key", "accuracy_"))
    assert "## Measured" not in render(manifest_of(flux, metrics={}), family=flux.family, title="t")


@pytest.mark.parametrize(
    "name,repo",
    [
        ("flux-krea", "black-forest-labs/FLUX.1-Krea-dev"),
        ("org/model", "org/model"),
        ("tiny-flux", None),
        ("/home/alice/model", None),
        ("/x/hub/models--org--model/snapshots/0a1b", "org/model"),
        ("dc-ae-f64", catalog.AUTOENCODERS["dc-ae-f64"].repo),
        ("a/b/c", None),
        ("org/name with spaces", None),
    ],
)
def test_lineage_is_a_real_repository(parts, name, repo):
    assert lineage.repository(name) == repo
    flux = parts("flux")
    manifest = manifest_of(flux, sources={"base": source_record(name, flux.source)})
    assert manifest["sources"]["base"]["repo"] == repo
    fields = header(render(manifest, family=flux.family, title="t"))
    assert fields.get("base_model") == (None if repo is None else [repo])
    if repo is None:
        assert "base_model_relation" not in fields


def test_the_repository_of_a_completing_base_is_lineage_too(parts):
    flux = parts("flux")
    base = {"name": "flux-dev", "revision": None, "files": {}}
    record = {**source_record("/home/alice/tune.safetensors", flux.source), "base": base}
    card = render(manifest_of(flux, sources={"base": record}), family=flux.family, title="t")
    assert header(card)["base_model"] == ["black-forest-labs/FLUX.1-dev"] and "alice" not in card
    assert "tune.safetensors" in card


def test_no_path_of_this_machine_is_told(parts, tmp_path):
    secret = tmp_path / "alice"
    secret.mkdir()
    recipe = {
        "source": str(secret),
        "loras": [f"{secret}/style.safetensors:0.8"],
        "data": {"path": "../alice/pictures", "prompts": "~/alice/prompts.txt"},
        "quantize": {"format": "none", "dense": r"blocks\.0\..*|a/b"},
        "ae": "org/autoencoder",
    }
    flux = parts("flux")
    manifest = manifest_of(flux, recipe=recipe, sources={"base": source_record(str(secret / "m"), flux.source)})
    card = render(manifest, family=flux.family, title="t")
    for text in (card, json.dumps(manifest)):
        assert str(tmp_path) not in text and "../" not in text and "~/" not in text
    assert manifest["recipe"]["loras"] == ["style.safetensors:0.8"]
    assert manifest["recipe"]["quantize"] == recipe["quantize"] and manifest["recipe"]["ae"] == "org/autoencoder"


def test_configs_of_a_bundle_do_not_tell_where_their_part_lay(parts, tmp_path):
    flux = parts("flux")
    source = Path(shutil.copytree(flux.source, tmp_path / "source"))
    for file, text in (("text_encoder", "/home/alice/clip"), ("text_encoder_2", "google/t5-v1_1-xxl")):
        config = read_json(source / file / "config.json")
        write_json(source / file / "config.json", config | {"_name_or_path": text, "inner": {"name_or_path": text}})
    bundle = make_bundle(replace(flux, source=source), tmp_path / "bundle")
    assert read_json(bundle / "text_encoder" / "config.json")["inner"] == {}
    assert "_name_or_path" not in read_json(bundle / "text_encoder_2" / "config.json")
    files = [path for path in bundle.rglob("*") if path.is_file()]
    assert not any(b"alice" in path.read_bytes() for path in files)
    assert verify(bundle, NULL, probe=False)["ok"]


def test_words_of_strangers_cannot_format_the_card(parts):
    evil = "x\n# Heading\n<script>alert(1)</script> | `a` ![p](http://x) \x1b[31m```\n\u202eend"
    flux = parts("flux")
    licence = {"license": evil, "license_name": evil, "files": [evil]}
    shown = {"columns": [evil], "prompts": [evil]}
    sources = {"base": source_record(evil, flux.source)}
    manifest = manifest_of(flux, licence={"base": licence}, recipe={"source": evil}, sources=sources)
    card = render({**manifest, "pictures": shown}, family=flux.family, title=evil)
    assert header(card)["license"] == evil
    body = card.split("\n---\n", 1)[1]
    prose = re.sub(r"(`{3,})\w*\n.*?\n\1(?!`)", "", body, flags=re.DOTALL)
    prose = re.sub(r"`[^`\n]*`", "", prose)
    assert sum(line.lstrip().startswith("# ") for line in prose.splitlines()) == 1
    assert "<script" not in prose.replace("\\<", "") and "![p]" not in prose.replace("\\!", "")
    assert not any(not char.isprintable() for char in body.replace("\n", ""))


def test_the_card_shows_the_pictures_that_the_bundle_holds(own_bundle, parts, tmp_path):
    bundle, family = own_bundle("flux"), parts("flux").family
    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")
    layout.add_metrics(bundle, family, "verify", {}, layout.PictureGrid(tmp_path / "grid.png", ["a", "b"], ["a <fox>"]))
    card = (bundle / "README.md").read_text()
    assert "](pictures.png)" in card and "1. a \\<fox\\>" in card and "Columns: a, b." in card
    assert (bundle / "pictures.png").read_bytes() == (tmp_path / "grid.png").read_bytes()
    assert verify(bundle, NULL, probe=False)["ok"]
    layout.add_metrics(bundle, family, "verify", {})
    assert "](pictures.png)" in (bundle / "README.md").read_text() and verify(bundle, NULL, probe=False)["ok"]


def test_pictures_of_a_run_that_was_cut_off_are_taken_back(own_bundle, parts):
    bundle = own_bundle("flux")
    (bundle / "pictures.png").write_bytes(b"x")
    layout.add_metrics(bundle, parts("flux").family, "verify", {})
    assert verify(bundle, NULL, probe=False)["ok"]
