"""The plan of models that draw videos: frames, networks, and videos that the base draws."""

import math

import pytest

from dcgen_convert.core.errors import InputError
from dcgen_convert.data import given
from dcgen_convert.planning import bill, costs, plan, stage_memory
from dcgen_convert.planning.arithmetic import forward_flops
from dcgen_convert.planning.fit import decide
from dcgen_convert.planning.shapes import shapes_of
from dcgen_convert.ranks import machine
from dcgen_convert.recipe import loading

from .test_plan import OWN, document, row


def test_videos_are_counted_in_all_their_frames():
    """Wan 14B in 10 H100-days, as its authors say: within a factor of 2; 20 latent frames of 80 frames."""
    doc = document("wan-14b", sets=OWN, gpus=8)
    first, last = doc["tokens"]
    assert (first["frames"], first["latent_frames"], first["before"], first["after"]) == (80, 20, 32_000, 8_000)
    shapes = [{(each["height"], each["width"]): each["after"] for each in row["buckets"]} for row in (first, last)]
    assert (shapes[0][480, 832], shapes[1][704, 1280]) == (7_800, 17_600)
    assert 0.5 < doc["time"]["gpu_hours"] / 240 < 2
    text = plan.render(doc)
    assert "tokens at 640 px and 80 frames (20 latent frames): 32,000 -> 8,000" in text
    half = document("wan-14b", sets=[*OWN, "data.frames=40"], gpus=8)
    linear = [row(each, "latents")["work"] for each in (half, doc)]
    encode = [next(part["wall_hours"] for part in works if part["what"] == "encode") for works in linear]
    assert encode[1] == pytest.approx(2 * encode[0])
    assert (
        half["tokens"][0]["after"] == 4_000 and half["disk"]["bytes"]["latents"] * 2 == doc["disk"]["bytes"]["latents"]
    )
    (five,) = document("wan-2.2-5b", sets=OWN, gpus=8)["tokens"]
    shapes = {(each["height"], each["width"]): (each["before"], each["after"]) for each in five["buckets"]}
    assert (five["frames"], five["latent_frames"], shapes[704, 1280]) == (120, 30, (26_400, 6_600))
    infeasible = document("wan-14b", sets=[*OWN, "quantize.format=nvfp4"], gpus=8)
    assert "no linear of this wan model can be quantised to 4 bits: `nunchaku_lite`" in infeasible["problems"][0]


def test_both_networks_of_a_model_are_counted_and_one_is_trained_at_a_time():
    """Wan 2.2 A14B against Wan 2.1 14B with the same numbers: twice the training, once the pictures and latents."""
    sets = OWN
    two = document("wan-2.2-a14b-480p", sets=sets, gpus=8)
    one = document("wan-2.2-a14b-480p", sets=sets, gpus=8, source="wan-14b")
    assert (one["source"]["networks"], two["source"]["networks"]) == (1, 2)
    assert "(wan-a14b, 2 networks of 14,288,491,584 parameters" in plan.render(two)
    for stage in ("surgery", "align-embedder", "align-head", "adapt-1", "merge-1"):
        for name in (f"{stage}-high", f"{stage}-low"):
            assert row(two, name)["gpu_hours"] == pytest.approx(row(one, stage)["gpu_hours"])
    for stage in ("data", "latents"):
        assert row(two, stage)["gpu_hours"] == pytest.approx(row(one, stage)["gpu_hours"])
    assert two["memory"]["chosen"] == one["memory"]["chosen"]
    stages = {found["stage"]: found["gpu_gib"] for found in two["memory"]["stages"]}
    single = {found["stage"]: found["gpu_gib"] for found in one["memory"]["stages"]}
    assert stages["adapt-1-high"] == stages["adapt-1-low"] == single["adapt-1"]
    assert stages["verify"] == single["verify"]  # the other network waits on the host
    on_host = [
        next(found["host_gib"] for found in doc["memory"]["stages"] if found["stage"] == "verify") for doc in (one, two)
    ]
    assert on_host[1] - on_host[0] == pytest.approx(2 * 14_288_491_584 / 2**30, rel=0.01)
    both, kinds = two["disk"]["bytes"], one["disk"]["bytes"]
    assert [both[kind] / kinds[kind] for kind in ("surgery", "merged", "checkpoints", "latents", "text")] == [
        2, 2, 2, 1, 1,
    ]  # fmt: skip
    assert both["bundle"] - kinds["bundle"] == kinds["surgery"]
    assert both["downloads"] - kinds["downloads"] == 2 * two["source"]["parameters"]


@pytest.mark.parametrize("name, frames", [("tiny-wan", 13), ("tiny-flux", 0)])
def test_a_folder_without_any_is_told_as_a_conversion_tells_it(name, frames, tmp_path):
    (tmp_path / "notes.md").write_text("nothing")
    doc = document(name, sets=["data.kind=folder", f"data.path={tmp_path}"])
    with pytest.raises(InputError, match=f"holds no {'videos' if frames else 'images'} ") as told:
        given.take(given.parse_all([str(tmp_path)], frames, 8), 1, tmp_path / "work")
    assert (doc["status"], doc["exit_code"]) == ("infeasible", 2)
    assert doc["problems"] == [f"{told.value.message}: {told.value.hint}"]


@pytest.mark.parametrize("buckets, size", [("true", (480, 832)), ("false", (640, 640))])
def test_videos_that_the_base_draws_are_priced_in_the_shape_and_the_frames_that_are_drawn(buckets, size):
    """Of 80 frames the base draws 81, which are 21 latent frames; base and bundle are compared on 77, which are 20."""
    sets = ["data.kind=synthetic", f"data.buckets={buckets}"]
    resolved = loading.load("wan-1.3b", sets=sets, machine=machine.Machine(offline=True))
    recipe, sizes = resolved.recipe, shapes_of(resolved.recipe, resolved.identity)
    pixels, base, new = math.prod(size), math.prod(side // 16 for side in size), math.prod(side // 32 for side in size)
    works = {(work.stage, work.what): work for work in bill.works(recipe, sizes)}
    for stage, what, times, tokens, model in (
        ("data", "draw", 21, base, sizes.base),
        ("verify", "draw with the source", 20, base, sizes.base),
        ("verify", "draw with the bundle", 20, new, sizes.converted),
    ):
        assert works[stage, what].each == 2 * forward_flops(model, times * tokens, 512), (stage, what)
    assert works["data", "decode"].each == 81 * pixels * bill.DECODE
    assert works["data", "write"].each == works["latents", "read"].each == 80 * pixels
    assert costs.picture_bytes(recipe, sizes, 0) == pytest.approx(10_000 * 80 * pixels * 1.6)
    fits = [decide(recipe, phase, sizes, 1, 80 * 2**30) for phase in recipe.adapt.phases]
    needs = {need.stage: need for need in stage_memory.needs(recipe, sizes, fits)}
    assert needs["data"].pixels == stage_memory.DRAWN * 81 * pixels
    assert needs["verify"].pixels == stage_memory.DRAWN * 80 * pixels
