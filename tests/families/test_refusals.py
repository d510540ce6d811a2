"""A variant that cannot be converted is refused with one sentence, before anything is written."""

import json
import re
from dataclasses import replace

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from dcgen_convert import families
from dcgen_convert.bundle.inspection import inspect, render
from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.errors import InputError, RecipeError
from dcgen_convert.core.journal import Run
from dcgen_convert.families import refused
from dcgen_convert.planning import plan
from dcgen_convert.recipe.identity import Identity
from dcgen_convert.recipe.loading import load
from dcgen_convert.recipe.schema import Adapt
from dcgen_convert.stages.job import prepare
from dcgen_convert.train.phases import sampling_of

from .tiny_models import TINY


@pytest.mark.parametrize(
    "name, pipeline",
    [
        ("flux", "FluxFillPipeline"),
        ("sd3", "StableDiffusion3InpaintPipeline"),
        ("qwenimage", "QwenImageInpaintPipeline"),
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
    flags = {"source": str(tmp_path), "ae": "tiny-dc-ae-f32", "resolution": 64}
    load("image", flags=flags)
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "is_distilled": True}))
    with pytest.raises(InputError, match="distilled to a few steps") as caught:
        load("image", flags=flags)
    assert "--set adapt.phases.1.consistency=0.9" in caught.value.hint
    job = prepare(load("few-steps", flags=flags), Run(tmp_path / "run", NULL), NULL)
    assert job.recipe.adapt.phases[-1].consistency == 0.9
    # a repository is looked into where it is fetched
    found = load("few-steps", flags=flags)
    phases = tuple(phase.model_copy(update={"consistency": 0.0}) for phase in found.recipe.adapt.phases)
    plain = found.recipe.model_copy(update={"adapt": found.recipe.adapt.model_copy(update={"phases": phases})})
    with pytest.raises(InputError, match="distilled to a few steps"):
        prepare(replace(found, recipe=plain), Run(tmp_path / "again", NULL), NULL)


def test_every_sana_sprint_was_distilled(tmp_path):
    TINY["sana-sprint"].build(tmp_path)
    flags = {"source": str(tmp_path), "ae": "tiny-dc-ae-f64", "resolution": 64}
    with pytest.raises(InputError, match="distilled to a few steps"):
        load("image", flags=flags)
    assert load("few-steps", flags=flags).recipe.bundle.steps == 4


@pytest.mark.parametrize(
    "name, config, channels, text",
    [
        ("lumina2", {}, 30, "do not fit"),
        ("flux", {"in_channels": 384, "out_channels": 64}, 32, "reads 384 channels and writes 64"),
        ("hidream", {}, 24, "draws on 128 x 128 cells"),
        ("zimage", {"all_patch_size": (1, 2), "all_f_patch_size": (1, 1)}, 32, "other patch sizes"),
        ("hunyuanimage", {"use_meanflow": True}, 32, "distilled to a few steps"),
        ("prx", {"bottleneck_size": 256}, 32, "draws pixels"),
    ],
)
def test_configs_that_do_not_convert(name, config, channels, text):
    with pytest.raises(InputError, match=text):
        families.get(name).convert_config(config, 32, channels, 1024)


def test_what_may_be_z_image_turbo_is_a_warning():
    """The published schedulers: Z-Image {"shift": 6.0}, Z-Image-Turbo {"shift": 3.0}, both static."""
    zimage = families.get("zimage")
    for shift, name, says in (
        (6.0, "mine", None),
        (
            3.0,
            "mine",
            "mine may be Z-Image-Turbo .its scheduler's shift is 3, Z-Image's is 6.: it was distilled",
        ),
        (6.0, "Tongyi-MAI/Z-Image-Turbo", "its name says turbo.: it was distilled"),
    ):
        doubt = zimage.doubt(name, {"shift": shift, "use_dynamic_shifting": False})
        assert doubt is None if says is None else re.search(says, doubt)
    assert zimage.doubt("Tongyi-MAI/Z-Image", {}) is None
    assert "turbo" in zimage.doubt("z_image_turbo.safetensors", {})
    assert [name for name, family in families.FAMILIES.items() if family.doubt("some-turbo", {"shift": 3.0})] == [
        "zimage",
        "ernie-image",
    ]


def test_what_was_distilled_by_its_name_is_a_warning():
    assert "baidu/ERNIE-Image is" in families.get("ernie-image").doubt("baidu/ERNIE-Image-Turbo", {"shift": 4.0})
    assert "8 steps" in families.get("prx").doubt("Photoroom/prx-512-t2i-sft-distilled", {})
    assert families.get("prx").doubt("Photoroom/prx-512-t2i-sft", {}) is None


MODULAR = ("Flux3Transformer2DModel",)  # no DiffusionPipeline draws with it
NETWORKS = {"PRXPixelPipeline": "PRXTransformer2DModel"}


@pytest.mark.parametrize("kind", refused.REFUSED)
def test_models_of_diffusers_that_do_not_fit_are_refused_with_the_reason(kind, tmp_path):
    """By the class of the network or of its pipeline, from JSON alone: `inspect` tells, and `convert` stops."""
    pipeline, network = (kind, NETWORKS[kind]) if kind in NETWORKS else ("SomePipeline", kind)
    assert hasattr(diffusers, network) and hasattr(diffusers, kind)
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": network, "in_channels": 4}))
    save_file({"x": torch.zeros(1)}, folder / "diffusion_pytorch_model.safetensors")
    index = "modular_model_index.json" if kind in MODULAR else "model_index.json"
    (tmp_path / index).write_text(json.dumps({"_class_name": pipeline}))
    found = inspect(tmp_path)
    assert (found["kind"], found["class"], found["pipeline"]) == ("pipeline", network, pipeline)
    assert refused.REFUSED[kind].why in render(found)
    with pytest.raises(InputError, match=re.escape(f"cannot be converted: {refused.REFUSED[kind].why}")):
        _ = Identity(str(tmp_path)).family
    if kind not in MODULAR:
        with pytest.raises(InputError, match=f"is a {re.escape(refused.REFUSED[kind].name)} model"):
            load_source("x", str(tmp_path))


def test_a_second_network_makes_it_another_family(tmp_path):
    """As the published Wan 2.2 TI2V says that there is none, and A14B that there is one."""
    config = {"_class_name": "WanTransformer3DModel", "in_channels": 48, "out_channels": 48}
    index = {"_class_name": "WanPipeline", "transformer_2": [None, None], "boundary_ratio": None}
    assert families.family_of(config, tmp_path, index).name == "wan"
    assert families.family_of(config, tmp_path).name == "wan"
    index |= {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875}
    two = families.family_of(config, tmp_path, index)
    assert (two.name, two.components) == ("wan-a14b", ("transformer", "transformer_2"))
    high, low = two.experts(index)
    assert (high.component, high.within, low.component, low.within) == (
        "transformer", (0.875, 1.0), "transformer_2", (0.0, 0.875),
    )  # fmt: skip
    for broken in (None, 1, 0.0, 1.5, "0.875"):
        with pytest.raises(InputError, match="boundary_ratio"):
            two.experts({**index, "boundary_ratio": broken})
    pictured = {**config, "in_channels": 36, "out_channels": 16}  # without an image encoder
    index["_class_name"] = "WanImageToVideoPipeline"
    assert families.family_of(pictured, tmp_path, index).name == "wan-image-a14b"
    with pytest.raises(InputError, match="has no family"):  # one that is given a picture, and has no second network
        families.family_of(pictured, tmp_path, {**index, "transformer_2": [None, None]})
    with pytest.raises(InputError, match="has no family"):  # an image encoder, and a second network
        families.family_of({**pictured, "image_dim": 1280}, tmp_path, index)


def test_a_conversion_of_what_may_be_z_image_turbo_says_so(tmp_path, capsys):
    TINY["zimage"].build(tmp_path / "model")
    config = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    for shift, warned in ((3.0, True), (6.0, False)):
        config.write_text(json.dumps({**json.loads(config.read_text()), "shift": shift}))
        resolved = load("image", flags={"source": str(tmp_path / "model"), "ae": "tiny-dc-ae-f32", "resolution": 64})
        prepare(resolved, Run(tmp_path / "run", NULL), Console("human"))
        assert ("may be Z-Image-Turbo" in capsys.readouterr().err) == warned
        assert any("may be Z-Image-Turbo" in note for note in plan.plan(resolved)["notes"]) == warned


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
