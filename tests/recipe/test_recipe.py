"""Layering: flag > --set > environment > recipe > what it extends > default; every value knows its origin."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dcgen_convert import families
from dcgen_convert.core.errors import InputError, RecipeError
from dcgen_convert.families import grid
from dcgen_convert.ranks.machine import Machine
from dcgen_convert.recipe import geometry, loading, shelf
from dcgen_convert.recipe.settings import leaves, schema_keys

NAMES = shelf.names()
SHIPPED = {
    "image", "few-steps", "flux-krea", "flux-dev", "flux-schnell", "flux-kontext", "sana-1.6b", "sana-sprint-1.6b",
    "qwen-image-edit", "sd-1.5",
    "flux-krea-2k", "flux-krea-4k", "sana-1.6b-2k", "sana-1.6b-4k",
    "dit-xl-256", "dit-xl-512",
    "wan-1.3b-480p", "wan-14b-704p", "wan-2.2-5b-704p", "sana-video-480p",
    "wan-2.2-a14b-480p", "wan-2.2-i2v-a14b-480p",
    "tiny-flux", "tiny-flux-long", "tiny-flux-256", "tiny-flux-512",
    "tiny-sana", "tiny-sana-long", "tiny-dit", "tiny-dit-long", "tiny-kontext", "tiny-kontext-long",
    "tiny-wan", "tiny-wan-long",
    "ablations/compression", "ablations/dit-sd-vae-to-dc-ae",
    "ablations/no-alignment", "ablations/full-finetune", "ablations/plain-flow-loss",
    "ablations/published",
}  # fmt: skip


def write(path, **values) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


@given(st.sets(st.sampled_from(["flag", "set", "env", "file", "parent"])))
def test_the_strongest_layer_wins(tmp_path_factory, layers):
    folder = tmp_path_factory.mktemp("recipes")
    seeds = {"parent": 1, "file": 2, "env": 3, "set": 4, "flag": 5}
    parent = write(folder / "parent.yaml", extends="flux-krea", **({"seed": 1} if "parent" in layers else {}))
    child = write(folder / "child.yaml", extends=parent, **({"seed": 2} if "file" in layers else {}))
    resolved = loading.load(
        child,
        flags={"seed": 5 if "flag" in layers else None},
        sets=["seed=4"] if "set" in layers else [],
        env={"DCGEN_CONVERT_SEED": "3", "HOME": "/x"} if "env" in layers else {"HOME": "/x"},
    )
    origins = {"flag": "flag --seed", "set": "--set", "env": "env DCGEN_CONVERT_SEED", "file": f"recipe {child}",
               "parent": f"recipe {parent}"}  # fmt: skip
    winner = max(layers, key=seeds.get, default=None)
    assert resolved.recipe.seed == (seeds[winner] if winner else 0)
    assert resolved.origins["seed"] == (origins[winner] if winner else "default")


def test_guidance_that_is_shown_twice_is_told():
    """Of classifier-free guidance, in pictures that the base draws; not of distilled guidance or given pictures."""
    twice = "The base draws the pictures with guidance 3, and bundle.guidance is {}: the converted model shows guidance"
    told = {
        setting: load_told(*setting.split())
        for setting in (
            "tiny-sana",
            "tiny-sana bundle.guidance=4.5",
            "tiny-sana bundle.guidance=1.5",
            "tiny-sana data.guidance=1",
            "tiny-sana data.kind=folder data.path=tiny-world:128",
            "tiny-flux",
        )
    }
    assert told.pop("tiny-sana").startswith(twice.format("3"))
    assert told.pop("tiny-sana bundle.guidance=4.5").startswith(twice.format("4.5"))
    assert set(told.values()) == {""}


def load_told(name, *sets):
    return " ".join(loading.load(name, sets=sets).told)


@pytest.mark.parametrize("name", NAMES)
def test_every_leaf_of_every_shipped_recipe_has_an_origin(name):
    resolved = loading.load(name, complete=False)
    values = dict(leaves(resolved.recipe.model_dump()))
    assert set(resolved.origins) == set(values)
    assert all(resolved.origins.values())
    assert resolved.recipe.name == name.rpartition("/")[2]


def test_the_shipped_recipes_are_the_promised_ones():
    assert set(NAMES) == SHIPPED


def test_published_numbers():
    krea = loading.load("flux-krea").recipe
    assert [(p.resolution, p.rank, p.alpha, p.lr, p.warmup) for p in krea.adapt.phases] == [
        (512, 256, 256, 1e-4, 1000),
        (1024, 256, 256, 1e-4, 1000),
    ]
    assert (krea.adapt.phases[0].steps, krea.adapt.ema, krea.adapt.clip) == (10_000, 0.999, 0.1)
    assert (krea.align_head.steps, krea.align_head.batch, krea.align_head.warmup) == (0, 512, 1_000)
    xavier = loading.load("flux-krea", sets=["align_head.method=xavier"])
    assert xavier.recipe.align_head.steps == 5_000  # as published; after a closed form there are none
    assert xavier.origins["align_head.steps"] == "derived: the start of the head is no closed form"
    assert (krea.align_embedder.steps, krea.align_embedder.batch, krea.align_embedder.lr) == (20_000, 64, 1e-4)
    assert (krea.adapt.guidance_range, krea.adapt.text_drop) == ((1, 14), 0.1)


def test_ablations_differ_from_their_base_in_what_they_ablate():
    base = dict(leaves(loading.load("tiny-flux").recipe.model_dump()))
    allowed = {
        "no-alignment": {"name", "align_embedder.method", "align_head.method", "align_head.steps"},
        "plain-flow-loss": {"name", "adapt.objective"},
        "full-finetune": {
            "name",
            "adapt.phases.0.mode",
            "adapt.phases.0.lr",
            "adapt.phases.0.rank",
            "adapt.phases.0.alpha",
        },
        "published": {
            "name",
            "align_embedder.method",
            "align_head.method",
            "align_head.steps",
            "adapt.optimizer",
            "adapt.phases.0.steps",
        },
    }
    for name, keys in allowed.items():
        values = dict(leaves(loading.load(f"ablations/{name}").recipe.model_dump()))
        assert {key for key in values if values[key] != base.get(key)} <= keys, name
        assert values["align_head.steps"] + values["adapt.phases.0.steps"] == base["adapt.phases.0.steps"], name


@pytest.mark.parametrize(
    ("sets", "steps", "origin"),
    [
        ([], 0, "derived: the start of the head is a closed form"),
        (["align_head.steps=null"], 0, "derived: the start of the head is a closed form"),
        (["align_head.method=zero"], 5_000, "derived: the start of the head is no closed form"),
        (["align_head.steps=7"], 7, "--set"),
        (["align_head.method=xavier", "align_head.steps=0"], 0, "--set"),
    ],
)
def test_steps_with_frozen_blocks_follow_from_the_start_of_the_head(sets, steps, origin):
    resolved = loading.load("tiny-flux", sets=sets)
    assert (resolved.recipe.align_head.steps, resolved.origins["align_head.steps"]) == (steps, origin)


def test_lora_keys_reach_every_lora_phase_and_alpha_follows_rank():
    resolved = loading.load("flux-krea", sets=["lora.rank=64", "adapt.phases.1.lr=2e-4"])
    assert [(p.rank, p.alpha) for p in resolved.recipe.adapt.phases] == [(64, 64), (64, 64)]
    assert resolved.recipe.adapt.phases[1].lr == 2e-4
    assert resolved.origins["adapt.phases.0.rank"] == "--set"
    assert resolved.origins["adapt.phases.0.alpha"] == "derived: = rank"
    assert loading.load("flux-krea", sets=["lora.alpha=8"]).recipe.adapt.phases[0].alpha == 8


def test_resolution_sets_the_last_phase_and_caps_the_others():
    def sides(value):
        found = loading.load("flux-krea", flags={"resolution": value}, sets=["data.kind=folder", "data.path=."]).recipe
        return found.data.resolution, [phase.resolution for phase in found.adapt.phases]

    assert sides(1536) == (1536, [512, 1536])
    assert sides(256) == (256, [256, 256])


def sides(resolved) -> list[int]:
    return [phase.resolution for phase in resolved.recipe.adapt.phases]


@pytest.mark.parametrize(
    "source, side, name, phases",
    [
        ("flux-krea", 2048, "flux-krea-2k", [2048]),
        ("flux-krea", 3072, "flux-krea-2k", [3072]),
        ("flux-krea", 4096, "flux-krea-4k", [2048, 4096]),
        ("flux-krea-2k", 4096, "flux-krea-2k-4k", [2048, 4096]),
        ("flux-krea-4k", 4096, "flux-krea-4k", [2048, 4096]),
        ("flux-dev", 4096, "flux-dev-4k", [2048, 4096]),
        ("sana-1.6b", 4096, "sana-1.6b-4k", [2048, 4096]),
        ("flux-schnell", 1024, "flux-schnell", [512, 1024, 1024]),
    ],
)
def test_large_pictures_take_the_curriculum_of_their_size(source, side, name, phases, tmp_path):
    given = {"data.kind": "folder", "data.path": str(tmp_path)}
    found = loading.load(source, flags={"resolution": side, **given})
    assert (found.recipe.name, sides(found), found.recipe.source) == (
        name,
        phases,
        source.removesuffix("-2k").removesuffix("-4k"),
    )
    if source in ("flux-krea", "sana-1.6b") and side == 4096:
        same = loading.load(f"{source}-4k", flags=given)
        assert found.recipe == same.recipe and f"recipe {source}-4k" in found.told[0]
    said = loading.load(source, flags={"resolution": side, "ae": "dc-ae-f32", **given}, sets=["lora.steps=7"])
    assert said.recipe.ae == "dc-ae-f32" and {phase.steps for phase in said.recipe.adapt.phases} == {7}


def test_phases_of_ones_own_stay_under_a_larger_size(tmp_path):
    mine = [{"resolution": 1024, "steps": 3}, {"resolution": 1536, "steps": 4}]
    data = {"kind": "folder", "path": str(tmp_path)}
    path = write(tmp_path / "mine.yaml", extends="flux-krea", seed=9, data=data, adapt={"phases": mine})
    found = loading.load(path, flags={"resolution": 4096})
    assert (sides(found), found.recipe.seed, found.recipe.adapt.shift) == ([1024, 4096], 9, "model")
    with pytest.raises(RecipeError, match="larger of .* is no table of sizes"):
        loading.load(write(tmp_path / "odd.yaml", extends="flux-krea", larger={"big": "flux-krea-2k"}))


@pytest.mark.parametrize("source, flags", [("flux-krea", {"resolution": 4096}), ("flux-krea-4k", {})])
def test_phases_without_pictures_are_named(source, flags):
    wanted = r"adapt.phases.0 \(2048 px\) and adapt.phases.1 \(4096 px\) need pictures of your own"
    with pytest.raises(RecipeError, match=wanted) as caught:
        loading.load(source, flags=flags)
    assert "give --data FOLDER" in caught.value.hint and "mu 11.55" in caught.value.hint


def test_environment_reaches_nested_keys_and_phases():
    env = {"DCGEN_CONVERT_ADAPT__EMA": "0.5", "DCGEN_CONVERT_ADAPT__PHASES__0__STEPS": "7"}
    found = loading.load("tiny-flux", env=env).recipe
    assert (found.adapt.ema, found.adapt.phases[0].steps) == (0.5, 7)


WRONG = {
    "adapt.emma=1": "unknown key 'adapt.emma'; did you mean 'adapt.ema'? (from --set)",
    "adapt.phases.0.stps=1": "unknown key 'adapt.phases.0.stps'; did you mean 'adapt.phases.*.steps'? (from --set)",
    "quantise.format=int4": "unknown key 'quantise.format'; did you mean 'quantize.format'? (from --set)",
    "ema=0.9": "unknown key 'ema'; did you mean 'adapt.ema'? (from --set)",
    "zzz=1": "unknown key 'zzz' (from --set)",
    "adapt.null_pass=separate": "unknown key 'adapt.null_pass'; this version does not have it any more, so delete it "
    "(from --set)",
    "quantize.share=true": "unknown key 'quantize.share'; it is called 'quantize.fuse_qkv' now (from --set)",
    "seed.x=1": "unknown key 'seed.x'; did you mean 'seed'?",
    "adapt.phases.5.steps=1": "adapt.phases.5.steps: there is no phase '5' (the recipe has 1, counted from 0)",
    "adapt.ema=abc": "adapt.ema must be a number, not 'abc' (from --set)",
    "adapt.ema=1": "adapt.ema must be less than 1, not 1 (from --set)",
    "seed=1.5": "seed must be a whole number, not 1.5 (from --set)",
    "adapt.zero=7": "adapt.zero must be one of 'auto', 0, 1, 2, 3, not 7 (from --set)",
    "adapt.shift=x": "adapt.shift must be one of 'model', 'flux2' or a number, not 'x' (from --set)",
    "adapt.guidance_range=[3, 1]": "guidance_range must be [lo, hi] with 0 < lo <= hi, not [3, 1]",
    "adapt.checkpointing=perhaps": "adapt.checkpointing must be true or false, not 'perhaps' (from --set)",
    "data=3": "data must be a group of settings, not 3 (from --set)",
    "evaluate.prompts=1": "prompts is 1, and metrics tiny-world compares at least 2 pictures: give 2, or 0 for none",
    "data.kind=folder": "data.kind is folder but data.path is empty: adapt.phases.0 (128 px) needs pictures of your "
    "own",
    "seed=1" + "0" * 22: f"seed must be at most 9,223,372,036,854,775,807, not 1{'0' * 22} (from --set)",
    "data.count=1000000000000": "data.count must be at most 1,000,000,000, not 1000000000000 (from --set)",
    "data.count=-3": "data.count must be at least 1, not -3 (from --set)",
    "data.batch=2000000": "data.batch must be at most 1,000,000, not 2000000 (from --set)",
    "evaluate.prompts=1000000": "evaluate.prompts must be at most 100,000, not 1000000 (from --set)",
    "data.resolution=99999": "data.resolution must be at most 65,536, not 99999 (from --set)",
    "lora.rank=99999": "adapt.phases.0.rank must be at most 16,384, not 99999 (from --set)",
    "lora.lr=1e400": "adapt.phases.0.lr must be a finite number, not inf (from --set)",
    "lora.lr=1e-320": "adapt.phases.0.lr must be at least 1e-12, not 1e-320 (from --set)",
    "adapt.guidance_range=[1, 1e30]": "adapt.guidance_range.1 must be at most 1e+09, not 1e+30",
    "data.steps=1"
    + "0" * 399: f"data.steps must be at most 1,000,000,000, not 1{'0' * 59}... (400 characters) (from --set)",
    "data.steps=1" + "0" * 5000: f"--set data.steps: '1{'0' * 58}... (5,003 characters) is not valid YAML: "
    f"'1{'0' * 39}' is no whole number",
    r'source="\0"': r"source holds the character '\x00': '\x00' (from --set)",
    r'data.path="a\nb"': r"data.path holds the character '\n': 'a\nb' (from --set)",
    r'ae="\ud800"': r"ae holds the character '\ud800': '\ud800' (from --set)",
    'base="  "': "base is empty (from --set)",
    "data.prompts=" + "x" * 5000: "data.prompts has 5,000 bytes, and at most 4,096 can be used (from --set)",
    'loras=[""]': "loras.0 is empty",
    'name="  "': "name is '  ', which is no name of a folder; write a short one without / and \\",
    "quantize.dense=(": "quantize.dense is no regular expression: missing ), unterminated subpattern at position 0 "
    "(from --set)",
    "adapt.lr=.nan": "unknown key 'adapt.lr'; did you mean 'adapt.phases.*.lr'? (from --set)",
}


@pytest.mark.parametrize("text", WRONG)
def test_one_sentence_for_each_mistake(text):
    with pytest.raises(RecipeError) as caught:
        loading.load("tiny-flux", sets=[text])
    assert caught.value.message == WRONG[text]
    assert caught.value.hint


@pytest.mark.parametrize(
    "sets, words",
    [
        (["dtype=bf16", "adapt.zero=0"], "adapt.zero 0 with dtype bf16"),
        (["quantize.format=nvfp4", "merge_lora=false"], "quantize needs merged weights"),
        (["adapt.phases.0.mode=full", "merge_lora=false"], "no LoRA to keep apart"),
        (["lora.rank=8", "adapt.phases.0.mode=full"], ""),
        (["watch.metrics=[clip]", "watch.pictures=1"], "metrics clip compares at least 2"),
        (["watch.metrics=[clip]", "watch.grid_every=0"], "judges the pictures of the grids: give both or neither"),
        (["watch.metrics=none", "watch.grid_every=0", "watch.pictures=1"], ""),
    ],
)
def test_combinations(sets, words):
    if not words:
        loading.load("tiny-flux", sets=sets)
        return
    with pytest.raises(RecipeError, match=words):
        loading.load("tiny-flux", sets=sets)


@pytest.mark.parametrize("text", ["adapt.ema", "=3", "adapt.ema=[1"])
def test_malformed_sets(text):
    with pytest.raises(RecipeError):
        loading.load("tiny-flux", sets=[text])


def test_extends_in_a_circle(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    write(first, extends=str(second))
    write(second, extends=str(first))
    with pytest.raises(RecipeError, match="extends itself"):
        loading.load(str(first))


def test_extends_an_unknown_recipe(tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'flux-krea'"):
        loading.load(write(tmp_path / "a.yaml", extends="flux-kraa"))


@pytest.mark.parametrize("content", ["- 1\n", "a: [", ""])
def test_a_file_that_is_no_recipe(tmp_path, content):
    path = tmp_path / "a.yaml"
    path.write_text(content)
    with pytest.raises((RecipeError, yaml.YAMLError)):
        loading.load(str(path))


def test_recipes_are_immutable_and_round_trip():
    found = loading.load("flux-krea").recipe
    with pytest.raises(ValueError, match="frozen"):
        found.adapt.ema = 0.5
    assert loading.Recipe.model_validate(found.model_dump(mode="json")) == found


def test_schema_keys_name_every_leaf():
    known = set(schema_keys())
    for key, _ in leaves(loading.load("flux-krea").recipe.model_dump()):
        assert ".".join("*" if part.isdigit() else part for part in key.split(".")) in known


@pytest.mark.parametrize("side, good", [(100, False), (96, False), (128, True), (0, False), (16, False)])
def test_sizes_must_be_multiples_of_both_grids(side, good):
    sets = [f"data.resolution={side}", f"adapt.phases.*.resolution={side}"]
    if good:
        loading.load("tiny-flux", sets=sets, flags={"ae": "tiny-dc-ae-f64"})
        return
    with pytest.raises(InputError, match=r"multiple of|at least 1"):
        loading.load("tiny-flux", sets=sets, flags={"ae": "tiny-dc-ae-f64"})


@pytest.mark.parametrize(
    "source, sets, words",
    [
        ("tiny-dit", [], "dit models draw one shape of pictures only"),
        ("tiny-flux", ["adapt.shift=flux2"], "adapt.shift flux2 is a shift per size"),
        ("tiny-flux", ["data.kind=synthetic"], "data.buckets keeps the shapes of your own pictures"),
        (
            "tiny-flux",
            ["adapt.phases.0.resolution=32"],
            "at 32 px only the square is left, because sides are multiples of 32 px",
        ),
    ],
)
def test_buckets_that_cannot_be(source, sets, words):
    sets = ["data.kind=folder", "data.path=x", "data.buckets=on", *sets]
    with pytest.raises(RecipeError, match=words):
        loading.load(source, sets=sets)


def test_buckets_end_where_a_position_table_ends():
    """SD3's 96 tokens of 16 px are 1536 px; without a table the long side is four times the short one."""
    config = {"pos_embed_max_size": 96}
    sizes = geometry.bucket_sizes(families.get("sd3"), config, grid.Grid(8, 16, 2), grid.Grid(32, 32, 1), 1024)
    assert max(map(max, sizes)) == 1536
    sizes = geometry.bucket_sizes(families.get("flux"), {}, grid.Grid(8, 16, 2), grid.Grid(64, 128, 1), 1024)
    assert max(map(max, sizes)) == 2048 and all(h % 64 == w % 64 == 0 and h * w <= 1024**2 for h, w in sizes)
    sizes = geometry.bucket_sizes(families.get("flux"), {}, grid.Grid(16, 16, 3), grid.Grid(32, 32, 1), 960)
    assert all(h % 96 == w % 96 == 0 for h, w in sizes)  # both grids meet


@pytest.mark.parametrize("name", NAMES)
def test_the_first_line_of_a_recipe_is_a_whole_sentence(name):
    """`recipes list` shows it alone."""
    first = shelf.find(name).read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ") and first.endswith(".")


@pytest.mark.parametrize(
    "name, side, words",
    [
        (
            "image",
            2048,
            "the recipe image has no curriculum for it. Only its last phase is trained at 2048 px",
        ),
        ("sana-sprint-1.6b", 4096, "Only its last phase is trained at 4096 px, after 512 px and 1024 px."),
        ("image", 1024, None),
        ("image", 768, None),
        ("tiny-flux", 256, None),  # it has one phase
        ("flux-krea", 4096, "takes the settings of the recipe flux-krea-4k: phases at 2048 px, then 4096 px."),
    ],
)
def test_a_size_without_a_curriculum_is_told(name, side, words):
    own = {"data.kind": "folder", "data.path": "x"}
    told = loading.load(name, flags={"resolution": side, **own}, machine=Machine(offline=True)).told
    assert told == () if words is None else words in told[0] and len(told) == 1
