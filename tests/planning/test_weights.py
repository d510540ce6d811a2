"""Weights that the catalogue does not know: of an autoencoder and of a pipeline in a folder, counted in headers."""

import shutil

import diffusers
import pytest
import transformers
from families.tiny_videos import VIDEOS, ltx_vae

from dcgen_convert.families import catalog
from dcgen_convert.planning import plan, stage_memory, weights
from dcgen_convert.planning.shapes import shapes_of
from dcgen_convert.ranks import machine
from dcgen_convert.recipe import loading
from dcgen_convert.recipe.identity import Identity

from .test_plan import OWN, document


def numbers(model):
    return sum(value.numel() for value in model.state_dict().values())


@pytest.mark.parametrize("name, source", [("tiny-dc-ae-f32", "tiny-flux"), ("tiny-dc-ae-v", "tiny-wan")])
def test_a_folder_is_planned_as_its_alias_is(name, source):
    folder = catalog.AUTOENCODERS[name].folder
    plans = [document(source, ae=where) for where in (name, str(folder))]
    for key in ("memory", "disk", "time", "notes"):
        assert plans[0][key] == plans[1][key], key
    one = weights.of_autoencoder(str(folder / "diffusion_pytorch_model.safetensors"))
    assert one == weights.of_autoencoder(name)


def test_memory_and_disk_hold_the_autoencoder_of_ltx_2(tmp_path):
    """Against a folder of its config alone, which is planned too, and is told to be without weights."""
    vae = ltx_vae(8)
    vae.save_pretrained(tmp_path / "whole")
    (tmp_path / "config").mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "config")
    plans, loaded = [], []
    for folder in ("config", "whole"):
        flags = {"ae": str(tmp_path / folder), "sets": OWN, "gpus": 1}
        plans.append(document("wan-1.3b", **flags))
        resolved = loading.load("wan-1.3b", flags={"ae": flags["ae"]}, sets=OWN, machine=machine.Machine(offline=True))
        sizes = shapes_of(resolved.recipe, resolved.identity)
        fits = [plan.fit_phase(resolved.recipe, resolved.identity, phase) for phase in resolved.recipe.adapt.phases]
        needs = {need.stage: need for need in stage_memory.needs(resolved.recipe, sizes, fits)}
        loaded.append(needs["surgery"].loaded)
    assert loaded[1] - loaded[0] == 4 * numbers(vae) > 0
    without, held = (found["disk"]["bytes"]["bundle"] for found in plans)
    assert held - without == 4 * numbers(vae)
    told = [[note for note in found["notes"] if "are not here" in note] for found in plans]
    assert told == [[f"the weights of {tmp_path / 'config'} are not here: memory and disk are without them"], []]


def test_text_encoders_and_autoencoder_of_a_source_folder_are_counted(tmp_path):
    VIDEOS["wan-a14b"].build(tmp_path / "source")
    text = transformers.UMT5EncoderModel.from_pretrained(tmp_path / "source" / "text_encoder")
    vae = diffusers.AutoencoderKLWan.from_pretrained(tmp_path / "source" / "vae")
    counted = sum(value.numel() for model in (text, vae) for value in model.parameters())
    assert weights.beside(Identity(str(tmp_path / "source"))) == counted
