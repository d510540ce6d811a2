"""The whole plan: every shipped recipe, offline; speed-ups beside the paper's; disk, downloads and hours."""

import json
import math
import re
from pathlib import Path

import pytest
from conftest import WEIGHTS
from PIL import Image

from dcgen_convert import families
from dcgen_convert.core.errors import RecipeError
from dcgen_convert.data import given
from dcgen_convert.data.sieve import Sieve, square
from dcgen_convert.families import catalog, deep_autoencoders
from dcgen_convert.families.grid import Grid
from dcgen_convert.networks import autoencoders
from dcgen_convert.networks.autoencoder_dc_video import AutoencoderDCVideo
from dcgen_convert.planning import bill, plan
from dcgen_convert.planning.shapes import shapes_of
from dcgen_convert.ranks import machine
from dcgen_convert.recipe import drawable, loading, shelf
from dcgen_convert.recipe.identity import Identity
from dcgen_convert.recipe.settings import leaves

from .test_memory import TABLE

SMALL_FIRST = ["adapt.phases.0.data.resolution=1024", "adapt.phases.0.data.min_side=1024"]
# As many pictures of one's own as the recipe asks for: the base need not draw them.
OWN = ["data.kind=folder", "data.path=hf://datasets/org/photos"]


def document(name: str, *, sets=(), gpus=None, disk_bytes=None, **flags) -> dict:
    resolved = loading.load(name, flags=flags, sets=sets, machine=machine.Machine(offline=True, gpus=gpus))
    return plan.plan(resolved, disk_bytes=disk_bytes)


def row(doc: dict, stage: str) -> dict:
    return next(row for row in doc["time"]["stages"] if row["stage"] == stage)


@pytest.mark.parametrize("name", shelf.names())
def test_every_shipped_recipe_passes_offline(name):
    sets = OWN if name.endswith(("-2k", "-4k", "-480p", "-704p")) else ()
    doc = document(name, sets=sets)
    assert doc["status"] == "feasible"
    assert doc["tokens"][-1]["ratio"] >= 4
    assert doc["time"]["gpu_hours"] > 0
    text = plan.render(doc)
    assert text.splitlines()[-1] == "verdict: feasible"
    for key, value in leaves(loading.load(name, sets=sets).recipe.model_dump(mode="json")):
        assert doc["settings"][key]["value"] == value
        assert key in text


@pytest.mark.parametrize(
    "px, ae, tokens, paper, tolerance",
    [
        (1024, "dc-ae-f32", (4096, 1024), 4.2, 0.20),
        (2048, "dc-ae-f64", (16384, 1024), 16.9, 0.16),
        (4096, "dc-ae-f64", (65536, 4096), 52.9, 0.02),
    ],
)
def test_flops_agree_with_what_the_paper_measured(px, ae, tokens, paper, tolerance):
    doc = document("flux-krea", ae=ae, resolution=px, sets=["latents.text_length=512", *OWN])
    assert (doc["tokens"][-1]["before"], doc["tokens"][-1]["after"]) == tokens
    assert doc["speedup"]["value"] == pytest.approx(paper, rel=tolerance)
    assert doc["speedup_paper"]["value"] == paper
    assert doc["speedup"]["basis"].startswith("scaled")
    assert doc["speedup_paper"]["basis"].startswith("measured by the paper")


def test_the_memory_table_of_flux_at_4096_px_from_its_config():
    """FLUX.1 to f64c128, 4096 + 512 tokens, LoRA 256: every row within 10 % of the table that the terms come from (see
    test_memory), which counts no moving average."""
    sets = ["latents.text_length=512", *OWN, "adapt.ema=0", "adapt.objective=flow"]
    doc = document("flux-krea", ae="dc-ae-f64", resolution=4096, sets=sets)
    found = {(row["zero"], row["offload"], row["gpus"]): row for row in doc["memory"]["table"]}
    for line in TABLE:
        zero, offload, gpus, *sizes, h100, h200 = line.split()
        row = found.pop((int(zero), offload, int(gpus)))
        weights, _, _, activations, _, total, host = (float(size) for size in sizes)
        kinds = ("weights", "activations", "total", "host")
        assert [row[kind] for kind in kinds] == pytest.approx([weights, activations, total, host], rel=0.10, abs=0.06)
        assert row["max_micro_batch_H100-80"] == pytest.approx(int(h100), abs=2)
        assert row["max_micro_batch_H200-141"] == pytest.approx(int(h200), abs=2)
    assert not found
    averaged = document("flux-krea", ae="dc-ae-f64", resolution=4096, sets=[sets[0], *OWN])
    assert averaged["memory"]["table"][0]["optimizer"] == pytest.approx(15.6, abs=0.06)  # 16 B for each of 1.047e9


@pytest.mark.parametrize(("name", "gib"), [("flux-krea", 24), ("flux-krea", 8), ("sana-1.6b", 6)])
def test_what_cannot_fit_is_refused_with_a_change_that_does(name, gib):
    def planned(gpus=None, **settings):
        sets = [f"adapt.{key}={value}" for key, value in settings.items()]
        resolved = loading.load(name, flags={}, sets=sets, machine=machine.Machine(gpus=gpus, offline=True))
        return plan.plan(resolved, gpu_bytes=gib * 2**30)

    doc = planned(zero=1)
    assert doc["status"] == "infeasible"
    change = re.search(r"use --zero (\d) --offload (\w+)(?: --gpus (\d+))? with micro_batch 1", doc["problems"][0])
    settings = {"zero": change[1], "offload": change[2], "phases.*.micro_batch": 1}
    after = planned(gpus=change[3] and int(change[3]), **settings)["problems"]
    assert not [problem for problem in after if problem.startswith("training")]


def test_other_families_beside_the_paper():
    for name, paper in (("sana-1.6b", 3.9), ("dit-xl-512", 4.7)):
        doc = document(name)
        assert doc["speedup_paper"]["value"] == paper
        assert doc["speedup"]["value"] == pytest.approx(paper, rel=0.15)
    assert document("flux-krea", ae="dc-ae-f64")["speedup_paper"] is None


def test_gated_and_missing_repositories_are_named():
    doc = document("flux-krea")
    source, ae = doc["downloads"]
    assert source["repo"] == "black-forest-labs/FLUX.1-Krea-dev"
    assert source["accept_at"] == "https://huggingface.co/black-forest-labs/FLUX.1-Krea-dev"
    assert source["bytes"] == pytest.approx(33.7e9, rel=0.01)
    assert ae["repo"] == "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers"
    notes = "\n".join(doc["notes"])
    assert "is gated" in notes
    assert "not in the cache" in notes


def test_what_is_cached_is_not_downloaded_again(tmp_path):
    before = document("flux-krea")["disk"]["bytes"]["downloads"]
    (tmp_path / "hub" / "models--black-forest-labs--FLUX.1-Krea-dev" / "snapshots").mkdir(parents=True)
    doc = document("flux-krea")
    assert doc["downloads"][0]["cached"]
    assert doc["disk"]["bytes"]["downloads"] < before / 10


def test_hours_follow_the_work():
    """The training takes twice as long for twice as many steps; every stage counts, and only what is there."""
    short, long = (
        document("flux-krea", sets=[f"adapt.phases.*.steps={steps}", "watch.evaluate_every=0", "watch.grid_every=0"])
        for steps in (1000, 2000)
    )

    def trained(doc):
        return next(part for part in row(doc, "adapt-2")["work"] if part["what"] == "train")["wall_hours"]

    assert trained(long) == pytest.approx(2 * trained(short))
    assert sum(row["wall_hours"] for row in long["time"]["stages"]) == pytest.approx(long["time"]["wall_hours"])
    stages = [row["stage"] for row in document("flux-krea", **{"quantize.format": "nvfp4"})["time"]["stages"]]
    assert stages == ["download", "start", "surgery", "data", "latents", "align-embedder", "align-head", "adapt-1",
                      "merge-1", "adapt-2", "merge-2", "quantize", "bundle", "verify"]  # fmt: skip
    assert (
        row(document("flux-krea", sets=["adapt.objective=flow"]), "adapt-2")["wall_hours"]
        < row(document("flux-krea"), "adapt-2")["wall_hours"]
    )


def test_ranks_divide_only_what_they_share():
    """Eight GPUs make shared work eight times faster. What rank 0 does alone takes as long, and costs eight times."""
    one, eight = (document("flux-krea", gpus=gpus, **{"quantize.format": "nvfp4"})["time"] for gpus in (1, 8))
    for alone, together in zip(one["stages"], eight["stages"], strict=True):
        for part, other in zip(alone["work"], together["work"], strict=True):
            expected = 8 if part["shared"] and part["count"] >= 8 else 1
            if part["what"] == "checkpoints":  # one for ten minutes of training, which are over sooner
                expected = part["count"] / other["count"]
                assert 4 < expected <= 8
            assert part["wall_hours"] / other["wall_hours"] == pytest.approx(expected), part["what"]
            low, high = part["wall_hours_low"], part["wall_hours_high"]
            assert low < part["wall_hours"] < high
    assert eight["gpu_hours"] == pytest.approx(8 * eight["wall_hours"])
    assert one["gpu_hours"] == one["wall_hours"] < eight["gpu_hours"] < 8 * one["gpu_hours"]
    assert eight["price_usd"] == pytest.approx(2.5 * eight["gpu_hours"])
    text = plan.render(document("flux-krea", gpus=8))
    assert "time on 8 x H100: " in text and "GPU-hours, about" in text and " on one GPU" in text
    text = plan.render(document("tiny-flux", gpus=2))
    assert "time on 2 CPU cores: " in text and " in one process" in text and "GPU-hours" not in text
    assert " on one GPU" not in text


def test_the_copying_out_of_shards_is_billed(tmp_path):
    shard = tmp_path / "a.tar"
    with open(shard, "wb") as file:
        file.truncate(3_600 * 10**9)  # sparse: an hour at the disk's speed of 1 GB/s, read and written
    doc = document("flux-krea", sets=["data.kind=folder", f"data.path={shard}"])
    parts = {part["what"]: part for part in row(doc, "data")["work"]}
    assert parts["copy out of shards"]["wall_hours"] == pytest.approx(2, rel=0.01)
    plain = document("flux-krea", sets=OWN)
    assert [part["what"] for part in row(plain, "data")["work"]] == ["hash"]


def pictures(folder, sides) -> str:
    folder.mkdir()
    for number, side in enumerate(sides):
        Image.new("RGB", (side, side)).save(folder / f"{number}.png")
    return str(folder)


@pytest.mark.parametrize("where", ["data", "adapt.phases.1.data"])
def test_pictures_that_a_folder_does_not_hold_are_not_priced(tmp_path, where):
    """Five pictures, two of them too small; a plan of three costs the same."""
    mine, steps = pictures(tmp_path / "mine", (128, 64, 128, 100, 256)), "steps: 4"
    phases = f"adapt.phases=[{{resolution: 128, {steps}}}, {{resolution: 128, {steps}}}]"
    sets = ["adapt.phases.1.data.path=x", phases] if where != "data" else ["data.kind=folder"]
    sets = [*sets[::-1], f"{where}.path={mine}"]
    docs = [document("tiny-flux", sets=[*sets, f"{where}.count={count}"]) for count in (1000, 3)]
    told = f"{mine}: 3 pictures can be used, 2 are left out because they are smaller than 128 px ({where}.min_side); "
    assert f"{told}{where}.count is 1,000, and 3 are priced" in docs[0]["notes"]
    assert not [note for note in docs[1]["notes"] if "priced" in note]
    assert docs[0]["time"] == docs[1]["time"] and docs[0]["disk"] == docs[1]["disk"]
    assert docs[0]["settings"][f"{where}.count"]["value"] == 1000
    assert not any("priced" in note for note in document("tiny-flux", sets=[*sets, f"{where}.count=2"])["notes"])


def test_a_conversion_needs_the_disk_of_the_pictures_that_are_there(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(plan, "check_disk", asked.append)
    for count in (10**9, 2):
        sets = ["data.kind=folder", f"data.path={pictures(tmp_path / str(count), (128, 128))}", f"data.count={count}"]
        plan.require_disk(loading.load("tiny-flux", sets=sets), tmp_path / "run", tmp_path / "out")
    assert asked[0] == asked[1]


def test_pictures_of_several_sources_are_counted_as_they_are_taken(tmp_path):
    """With shares the smaller one makes both smaller; what is on the hub, or drawn first, is not counted."""
    few, many = pictures(tmp_path / "few", (64,) * 3), pictures(tmp_path / "many", (64,) * 9)

    def held(most: int, *texts: str) -> int | None:
        sources = given.parse_all(texts)
        found = given.held(sources, most, Sieve(32, "x", square(32)))
        if found is not None:
            for place in (few, many):
                for file in Path(place).glob("*.png"):
                    file.with_suffix(".txt").write_text("a")
            taken, _ = given.take(sources, most, tmp_path / "sources")
            assert len(taken) == found
        return found

    assert held(100, few, many) == 12 and held(5, few, many) == 5
    assert held(100, f"{few}=0.5", f"{many}=0.5") == 6 and held(4, f"{few}=0.5", f"{many}=0.5") == 4
    assert held(7, few, "tiny-world:64") == 7
    assert held(7, "hf://datasets/a/b", few) is None and held(7, str(tmp_path / "absent")) is None


def test_the_table_of_the_time_has_straight_columns():
    lines = plan.render(document("flux-krea", ae="dc-ae-f64", gpus=1)).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("  stage  "))
    place, table = lines[start].index("of which"), []
    for line in lines[start:]:
        if not line:
            break
        table.append(line)
    assert "days to " in "".join(table) and len(table) > 8
    assert all(line[place - 2 : place] == "  " and line[place] != " " for line in table)
    memory = next(number for number, line in enumerate(lines) if line.startswith("  ZeRO / offload"))
    assert max(map(len, [*table, *lines[memory : memory + 22]])) <= 100


def test_the_flops_of_an_autoencoder_are_those_that_torch_counts():
    """Of AutoencoderKL as FLUX has it, of DC-AE f32 and f64, and per frame of Wan's: within 20 % of the two constants;
    of DC-AE-V, within 10 % of its own.
    """
    import diffusers
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def counted(model, side, *frames):
        pixels = math.prod((*frames, side, side))
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            encoded = model.encode(torch.empty(1, 3, *frames, side, side))
        encode = counter.get_total_flops()
        latent = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
        with FlopCounterMode(display=False) as counter:
            model.decode(latent)
        return encode / pixels, counter.get_total_flops() / pixels

    def deep(channels, widths):
        types = ("ResBlock",) * 3 + ("EfficientViTBlock",) * (len(widths) - 3)
        ends = {}
        for end, layers in (("encoder", (2, 2, 2) + (3,) * (len(widths) - 3)), ("decoder", (3,) * len(widths))):
            scales = tuple((5,) if kind == "EfficientViTBlock" else () for kind in types)
            ends |= {f"{end}_block_types": types, f"{end}_block_out_channels": widths,
                     f"{end}_layers_per_block": layers, f"{end}_qkv_multiscales": scales}  # fmt: skip
        return diffusers.AutoencoderDC(latent_channels=channels, **ends)

    with torch.device("meta"):
        models = [
            diffusers.AutoencoderKL(
                block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            ),
            deep(32, (128, 256, 512, 512, 1024, 1024)),
            deep(128, (128, 256, 512, 512, 1024, 1024, 2048)),
        ]  # fmt: skip
        wan = diffusers.AutoencoderKLWan()
        config = deep_autoencoders.config_of(catalog.AUTOENCODERS["dc-ae-v-f32t4c32"])
        video = AutoencoderDCVideo.from_config(config)
        ltx = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
        ltx = diffusers.AutoencoderKLLTX2Video(decoder_causal=False, **ltx).eval()
    for model in models:
        assert counted(model, 256) == pytest.approx((bill.ENCODE, bill.DECODE), rel=0.20)
    assert counted(wan.eval(), 64, 9) == pytest.approx((bill.ENCODE, bill.DECODE), rel=0.20)
    assert counted(video, 128, 40) == pytest.approx((bill.ENCODE_VIDEO, bill.DECODE_VIDEO), rel=0.10)
    assert counted(ltx, 128, 81) == pytest.approx((bill.ENCODE_LTX, bill.DECODE_LTX), rel=0.10)


@pytest.mark.parametrize("folder, frames", [
    ("tiny-flux/vae", ()), ("tiny-dit/vae", ()), ("tiny-dc-ae-f32", ()), ("tiny-dc-ae-f64", ()),
    ("tiny-wan/vae", (13,)), ("tiny-dc-ae-v", (16,)),
])  # fmt: skip
def test_the_flops_of_the_embedded_autoencoders_are_about_those_that_torch_counts(folder, frames):
    """Within a factor of two of the constants: a plan of a miniature is a few minutes."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    codec = autoencoders.load(WEIGHTS / folder)
    pixels, count = torch.zeros(1, 3, *frames, 128, 128), math.prod(frames) * 128**2
    with FlopCounterMode(display=False) as counter:
        latents = codec.encode(pixels)
    encode = counter.get_total_flops() / count
    with FlopCounterMode(display=False) as counter:
        codec.decode(latents)
    assert 0.5 < encode / bill.ENCODE_TINY < 2 and 0.5 < counter.get_total_flops() / count / bill.DECODE_TINY < 2


def test_a_plan_says_no_where_the_disk_is_too_small():
    doc = document("flux-krea", disk_bytes=1e11)
    assert (doc["status"], doc["exit_code"]) == ("infeasible", 4)
    assert "the disk is too small, 6" in doc["problems"][0] and "plan --disk GB" in doc["problems"][0]


@pytest.mark.parametrize(
    "name, side, words",
    [
        ("flux-krea", 1536, "for 9,216 its scheduler would use mu 2.02, after at most 1.15"),
        ("flux-krea-4k", 4096, "up to 1414 px, 7,812 image tokens: for 65,536 its scheduler would use mu 11.55"),
        (
            "tiny-flux",
            256,
            "up to 128 px, 64 image tokens: for 256 its scheduler would use mu 0.63, after at most 0.50",
        ),
        ("sana-1.6b", 1536, "up to 1024 px, 1,024 image tokens: larger ones, of 2,304"),
        ("tiny-sana", 256, "up to 128 px, 16 image tokens"),
        ("sd-1.5", 1024, "up to 512 px"),
    ],
)
def test_sizes_that_the_base_cannot_draw_are_refused_by_every_verb(name, side, words):
    machines, flags = machine.Machine(offline=True), {"resolution": side}
    drawn = ["data.kind=synthetic", *(SMALL_FIRST if "4k" in name else [])]
    with pytest.raises(RecipeError, match=f"data.resolution is {side} px.*{words}") as caught:
        loading.load(name, flags=flags, sets=drawn, machine=machines)
    assert "--data" in caught.value.hint and "beyond_base=true" in caught.value.hint
    loading.load(name, flags={"data.kind": "folder", "data.path": ".", **flags}, machine=machines)
    said = loading.load(name, flags=flags, sets=[*drawn, "data.beyond_base=true"], machine=machines)
    assert any(f"draws pictures of {side} px" in note for note in plan.plan(said)["notes"])


def test_the_4k_curriculum_costs_what_its_pictures_and_phases_cost():
    flags = {"ae": "dc-ae-f64", "resolution": 4096, "quantize.format": "nvfp4"}
    doc = document("flux-krea", gpus=8, sets=OWN, **flags)
    assert (doc["status"], doc["alignment"]["side"]) == ("feasible", 512)
    assert doc["time"]["gpu_hours"] <= 240 and doc["disk"]["peak"] <= 1e12
    assert max(stage["gpu_gib"] for stage in doc["memory"]["stages"]) <= 80e9 / 2**30
    found = {row["stage"]: {part["what"]: part["count"] for part in row["work"]} for row in doc["time"]["stages"]}
    assert "draw" not in found["data"] and found["latents-2"]["check"] == found["latents-2"]["read"] == 20_000
    assert found["latents"]["encode"] == 50_000 * 2048**2 and found["latents-2"]["encode"] == 20_000 * 4096**2
    assert found["latents"]["encode for the base"] == 2048 * 512**2  # of the first phase's pictures as many as it needs
    assert found["latents"]["read"] == 50_000 + 2048 and "encode for the base" not in found["latents-2"]
    assert any(
        "encodes 2,048 of 50,000 pictures: " in note and "128 inputs, 1,024 tok" in note for note in doc["notes"]
    )
    assert found["verify"]["draw with the source"] == 16 * 20
    draws = {part["what"]: part["wall_hours"] for part in row(doc, "verify")["work"]}
    assert draws["draw with the source"] == pytest.approx(draws["draw in 16 bits"], rel=0.1)  # both have 4,096 tokens
    grown = document("flux-krea", gpus=8, sets=[*OWN, "adapt.phases.1.data.count=40000"], **flags)
    assert row(grown, "latents-2")["wall_hours"] > 1.9 * row(doc, "latents-2")["wall_hours"]
    cached = 4 * (50_000 * 32**2 * 128 + 2048 * 64**2 * 16 + 20_000 * 64**2 * 128)
    assert doc["disk"]["bytes"]["latents"] == cached


def test_mu_beyond_the_training_is_capped_where_it_is_dynamic():
    dev = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "max_image_seq_len": 4096}
    found = drawable.capped_shift(families.get("flux"), dev, 65_536, 7_812)
    assert found["mu"] == pytest.approx(0.5 + 0.65 * (65_536 - 256) / 3_840)
    assert (found["capped"], found["shift"]) == (1.15, pytest.approx(math.exp(1.15)))
    assert drawable.capped_shift(families.get("flux"), {"use_dynamic_shifting": False}, 65_536, 7_812) is None
    assert drawable.capped_shift(families.get("cogview4"), dev, 65_536, 7_812) is None  # its network knows the shift


@pytest.mark.parametrize("side, own", [(4096, 1024), (2048, 512), (1024, 1024), (3072, 768), (8192, 1408)])
def test_the_base_draws_beside_the_bundle_at_a_size_that_it_knows(side, own):
    assert drawable.own_side(Identity("flux-krea"), Grid(64, 128, 1), side) == own


def test_a_shift_that_no_config_can_hold_is_refused_by_every_verb():
    phases = [{"resolution": side, "steps": 1} for side in (512, 768, 1024)]
    sets = [f"adapt.phases={json.dumps(phases)}"]
    with pytest.raises(RecipeError, match="flux2, which cannot be written for the 3 sizes 512, 768, 1024 px"):
        loading.load("flux-krea", sets=sets, machine=machine.Machine(offline=True))
    loading.load("flux-krea", sets=[*sets, "adapt.shift=model"], machine=machine.Machine(offline=True))


def test_each_phase_is_fitted():
    krea = loading.load("flux-krea")
    low, high = (plan.fit_phase(krea.recipe, krea.identity, phase) for phase in krea.recipe.adapt.phases)
    assert (low.zero, high.zero) == (1, 1)
    assert low.limit > high.limit
    assert 256 % low.micro_batch == 0 == 256 % high.micro_batch


def test_the_training_of_the_head_is_fitted_too():
    """FLUX at 512 px: 512 pictures at once would need 131 GiB of activations; embedder and head are all that trains."""
    resolved = loading.load("flux-krea")
    krea, source = resolved.recipe, resolved.identity
    phase = plan.head_phase(krea)
    head, lora = plan.fit_phase(krea, source, phase), plan.fit_phase(krea, source, krea.adapt.phases[0])
    assert shapes_of(krea, source).trainable(phase).trained == 32 * 3072 + 3072 + 3072 * 32 + 32
    assert lora.micro_batch < head.micro_batch == 128 <= head.limit < phase.batch == 512
    assert head.memory.activations / 2**30 == pytest.approx(131 / 4, rel=0.01)
    assert plan.fit_phase(krea, source, phase, gpus=8).micro_batch == 64  # a rank's share


def test_a_folder_of_ones_own_is_planned_from_its_configs(tmp_path):
    config = {
        "_class_name": "FluxTransformer2DModel", "num_layers": 2, "num_single_layers": 4, "num_attention_heads": 4,
        "attention_head_dim": 32, "in_channels": 64, "joint_attention_dim": 48, "pooled_projection_dim": 24,
        "guidance_embeds": True, "patch_size": 1,
    }  # fmt: skip
    vae = {"_class_name": "AutoencoderKL", "block_out_channels": [8, 8, 8, 8], "latent_channels": 16}
    deep = {"_class_name": "AutoencoderDC", "encoder_block_out_channels": [8] * 6, "latent_channels": 24}
    for part, content in (("transformer", config), ("vae", vae), ("deep", deep)):
        (tmp_path / "mine" / part).mkdir(parents=True)
        (tmp_path / "mine" / part / "config.json").write_text(json.dumps(content))
    resolved = loading.load(str(tmp_path / "mine"), recipe="tiny-flux", flags={"ae": str(tmp_path / "mine" / "deep")})
    doc = plan.plan(resolved)
    assert (doc["source"]["family"], doc["autoencoder"]["f"], doc["autoencoder"]["c"]) == ("flux", 32, 24)
    assert doc["tokens"] == [{"resolution": 128, "before": 64, "after": 16, "ratio": 4.0}]
    assert doc["downloads"] == []
    assert (doc["time"]["device"], doc["time"]["price_usd"]) == ("2 CPU cores", 0)


def test_plan_counts_the_tokens_of_every_bucket():
    doc = document("tiny-flux", sets=["data.kind=folder", "data.path=x", "data.buckets=on"])
    (row,) = doc["tokens"]
    assert {"height": 96, "width": 160, "before": 6 * 10, "after": 3 * 5} in row["buckets"] and len(row["buckets"]) == 9
    assert "96x160=15" in plan.render(doc)
    assert "buckets" not in document("tiny-flux")["tokens"][0]
