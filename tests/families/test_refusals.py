"""A variant that cannot be converted is refused with one sentence, before anything is written."""

import json

import pytest

from dcgen_convert import families
from dcgen_convert.checkpoint.source import load_source
from dcgen_convert.errors import InputError, RecipeError
from dcgen_convert.recipe import load
from dcgen_convert.schema import Adapt
from dcgen_convert.train.adapt import sampling_of

from .tiny_models import TINY


@pytest.mark.parametrize(
    "name, pipeline",
    [
        ("flux", "FluxFillPipeline"),
        ("flux", "FluxKontextPipeline"),
        ("sana", "SanaSprintPipeline"),
        ("sd3", "StableDiffusion3InpaintPipeline"),
        ("qwenimage", "QwenImageEditPipeline"),
    ],
)
def test_pipelines_whose_inputs_are_not_trained(name, pipeline, tmp_path):
    TINY[name].build(tmp_path)
    assert load_source(name, str(tmp_path)).family.name == name
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": pipeline}))
    with pytest.raises(InputError, match=f"{pipeline}, only .* can be converted"):
        load_source(name, str(tmp_path))


def test_models_that_say_they_are_distilled(tmp_path):
    TINY["flux2-klein"].build(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["is_distilled"] is False and load_source("klein", str(tmp_path)).family.name == "flux2"
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "is_distilled": True}))
    with pytest.raises(InputError, match="distilled to a few steps"):
        load_source("klein", str(tmp_path))


@pytest.mark.parametrize(
    "name, config, channels, text",
    [
        ("lumina2", {}, 30, "do not fit"),
        ("flux", {"in_channels": 384, "out_channels": 64}, 32, "reads 384 channels and writes 64"),
        ("sana", {"guidance_embeds": True}, 32, "SANA-Sprint"),
        ("hidream", {}, 24, "draws on 128 x 128 cells"),
        ("zimage", {"all_patch_size": (1, 2), "all_f_patch_size": (1, 1)}, 32, "more patch sizes"),
        ("hunyuanimage", {"use_meanflow": True}, 32, "distilled to a few steps"),
    ],
)
def test_configs_that_do_not_convert(name, config, channels, text):
    with pytest.raises(InputError, match=text):
        families.get(name).convert_config(config, 32, channels, 1024)


def test_a_shift_that_the_network_leans_on_cannot_be_changed():
    cogview = families.get("cogview4")
    own = {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 0.25, "max_shift": 0.75}
    assert cogview.shift(1024, own) == 1.75
    with pytest.raises(InputError, match="must stay"):
        cogview.shift(1024, {**own, "max_shift": 1.15})
    with pytest.raises(RecipeError, match="would break it"):
        sampling_of(cogview, Adapt(shift=3.0, phases=[{"resolution": 64, "steps": 1}]), (32, 2, 2), {}, own)


def test_pictures_of_a_size_that_the_base_cannot_draw():
    """DiT's pipeline draws the size that it was trained on, whatever is asked."""
    assert load("tiny-dit").recipe.data.resolution == 128
    with pytest.raises(RecipeError, match="draws 128 px only"):
        load("tiny-dit", sets=["data.resolution=256"])
