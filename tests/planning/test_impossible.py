"""Linears in 4 bits as the plan counts them, and what no machine can do with a source."""

import pytest
from families.tiny_models import pixart_alpha

from dcgen_convert.core.errors import InputError
from dcgen_convert.planning import plan
from dcgen_convert.planning.impossible import require_possible
from dcgen_convert.planning.shapes import shapes_of
from dcgen_convert.ranks import machine
from dcgen_convert.recipe import loading
from dcgen_convert.svdquant.targets import plan_targets

from .test_plan import OWN, document


def test_quantised_linears_are_those_that_the_quantiser_finds_in_the_model():
    for name in ("flux-krea", "tiny-sana", "dit-xl-512"):
        resolved = loading.load(name, flags={"quantize.format": "nvfp4"}, machine=machine.Machine(offline=True))
        part = plan.plan(resolved)["quantization"]
        sizes = shapes_of(resolved.recipe, resolved.identity)
        config, family = resolved.identity.config, resolved.identity.family
        side = resolved.recipe.adapt.phases[-1].resolution
        targets = plan_targets(family, family.convert_config(config, sizes.new.f, sizes.new.c, side), None)
        assert (part["w4a4"], part["w4a16"]) == (len(targets.svdq), len(targets.awq))
        assert sum(int(kind.rpartition("(")[2][:-1]) for kind in part["dense"]) == len(targets.skipped)
        assert not part["impossible"]
    assert (part["w4a4"], part["w4a16"]) == (28 * 6, 28)  # the last: DiT-XL


@pytest.mark.parametrize(
    "name, sets, merge_lora, told",
    [
        ("wan-2.2-a14b-480p", [], False, "a wan-a14b model has 2 networks, each with a LoRA"),
        ("wan-2.2-a14b-480p", ["adapt.phases.*.consistency=0.5"], True, "2 networks, and consistency distillation"),
        (
            "dit-xl-512",
            [],
            False,
            "the stock DiTPipeline cannot load a LoRA apart: --merge-lora adds it to the weights",
        ),
    ],
)
def test_what_no_machine_can_do_with_this_source(name, sets, merge_lora, told):
    """The plan says it, as `convert` does before its first stage."""
    doc = document(name, sets=[*OWN[: 2 * name.startswith("wan")], *sets], merge_lora=merge_lora)
    assert (doc["status"], doc["exit_code"]) == ("infeasible", 2)
    assert told in doc["problems"][0]
    assert document("flux-krea", merge_lora=False)["status"] == "feasible"


def test_a_refusal_names_the_pipeline_class_of_the_source(tmp_path):
    pixart_alpha(tmp_path)
    sets = ["adapt.phases=[{mode: lora, resolution: 256, steps: 10}]"]
    resolved = loading.load(
        str(tmp_path), flags={"ae": "dc-ae-f32", "merge_lora": False}, sets=sets, machine=machine.Machine(offline=True)
    )
    with pytest.raises(InputError, match="the stock PixArtAlphaPipeline cannot load a LoRA apart"):
        require_possible(resolved.recipe, resolved.identity)


def test_linears_that_no_format_holds_are_listed_and_make_it_infeasible():
    doc = document("sana-1.6b", **{"quantize.format": "nvfp4"})
    assert (doc["status"], doc["exit_code"]) == ("infeasible", 2)
    resolved = loading.load("sana-1.6b", flags={"quantize.format": "nvfp4"}, machine=machine.Machine(offline=True))
    with pytest.raises(InputError, match="attn1.to_q .* cannot be quantised"):
        require_possible(resolved.recipe, resolved.identity)
    kinds = doc["quantization"]["impossible"]
    assert kinds["transformer_blocks.*.attn1.to_q (20)"].endswith("it has 2240 -> 2240")
    assert not any("ff.conv" in kind for kind in kinds)  # convolutions were never planned
    held = doc["quantization"]["containers"]
    assert (held["diffusers"]["w4a4"], held["diffusers"]["impossible"]) == (0, 120) and "problem" in held["nunchaku"]
    share = 6 * 20 * 2240**2 / doc["training"]["parameters"]
    assert held["bfl"] == {"w4a4": 120, "w4a16": 0, "impossible": 0, "share": pytest.approx(share)}
    assert "quantize.container=bfl (quantize: --container bfl), which holds them" in doc["problems"][0]
    text = plan.render(doc)
    assert "bfl          120      0            0                38%" in text
    fits = document("sana-1.6b", sets=["quantize.container=bfl"], **{"quantize.format": "nvfp4"})
    assert (fits["status"], fits["quantization"]["w4a4"], fits["quantization"]["rank"]) == ("feasible", 120, 0)
    small = 0.65 * 6 * 20 * 2240**2 + 2 * (doc["training"]["parameters"] - 6 * 20 * 2240**2)
    assert fits["disk"]["bytes"]["quantised"] == pytest.approx(small)
    for setting, problem in (("int4", "holds nvfp4 only"), ("nvfp4", "has no reader of one for DiT")):
        name = {"int4": "sana-1.6b", "nvfp4": "dit-xl-512"}[setting]
        refused = document(name, sets=["quantize.container=bfl"], **{"quantize.format": setting})
        assert any(problem in found for found in refused["problems"])
    assert (
        "problem: transformer_blocks.*.attn1.to_q (20) cannot be quantised" in text and "quantize.dense=REGEX" in text
    )
    kept = document("sana-1.6b", sets=["quantize.dense=.*"], **{"quantize.format": "nvfp4"})
    assert kept["quantization"]["impossible"] == {} and "no linear of this sana model" in kept["problems"][0]
    assert (
        "FLUX.1 only"
        in document("dit-xl-512", sets=["quantize.container=nunchaku"], **{"quantize.format": "int4"})["problems"][0]
    )


def test_nothing_quantised_is_nothing_planned():
    assert document("flux-krea")["quantization"] is None
