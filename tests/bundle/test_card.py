"""The model card and the inheritance of licences."""

import pytest
import yaml

from dcgen_convert.bundle.card import render
from dcgen_convert.checkpoint.licence import licence_of

from .conftest import manifest_of


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
    assert "DCGen_FluxPipeline" in render(manifest_of(flux), family=flux.family, layout="official", title="t")
    assert "| flow_loss.after | 0.5 |" in card


def test_card_promises_comfyui_only_what_its_latents_allow(parts):
    flux = parts("flux")
    single = manifest_of(flux, recipe={"quantize": {"format": "nvfp4", "container": "nunchaku"}})
    assert "and ComfyUI-nunchaku." in render(single, family=flux.family, title="t", layout="source")
    converted = render(single, family=flux.family, title="t", layout="stock")
    assert "ComfyUI cannot draw" in converted and "ComfyUI-nunchaku" not in converted
