"""What the target of the alignment is: the one that is asked for, the one that follows, and what is refused."""

from __future__ import annotations

import pytest

from dcgen_convert.core.errors import RecipeError
from dcgen_convert.families.grid import Grid
from dcgen_convert.planning import plan
from dcgen_convert.recipe.alignment import Alignment, alignment
from dcgen_convert.recipe.identity import Identity
from dcgen_convert.recipe.loading import load

F32, F64, F16 = Grid(32, 32, 1), Grid(64, 128, 1), Grid(16, 64, 1)


def asked(source: str, new: Grid, px: int, **section: str) -> Alignment:
    recipe = load("image").recipe
    phases = (recipe.adapt.phases[0].model_copy(update={"resolution": px}),)
    changes = {
        "adapt": recipe.adapt.model_copy(update={"phases": phases}),
        "align_embedder": recipe.align_embedder.model_copy(update=section),
    }
    return alignment(recipe.model_copy(update=changes), Identity(source, offline=True), new)


@pytest.mark.parametrize(
    "source, new, px, target, side, why",
    [
        ("flux-krea", F64, 4096, "home", 1024, "the base was trained on pictures of 317 px to 1414 px"),
        ("flux-krea", F64, 2048, "home", 512, "the base was trained on"),
        ("flux-krea", F32, 1024, "home", 512, "the base was trained on"),
        ("flux-krea", F32, 512, "pooled", 512, "its home size is 256 px, and the base was trained on"),
        ("flux-krea", F32, 4096, "pooled", 4096, "trained on pictures of up to 1414 px"),
        ("flux-krea", F16, 1024, "pooled", 1024, "both grids have the same tokens already"),
        (
            "sana-1.6b",
            F64,
            1024,
            "pooled",
            1024,
            "its home size is 512 px, and the base was trained on pictures of 1024 px",
        ),
        ("sana-1.6b", F64, 2048, "home", 1024, "the base was trained on pictures of 1024 px"),
        ("sd-1.5", F32, 1024, "pooled", 1024, "it is not known"),
        ("sana-1.6b", F16, 1024, "pooled", 1024, "would be enlarged to 2048 px"),
        ("dit-xl-256", F32, 512, "home", 256, "the base knows pictures of 256 px"),
        ("dit-xl-256", F32, 256, "pooled", 256, "the base knows pictures of 256 px only"),
        ("tiny-flux", F32, 256, "home", 128, "the base was trained on pictures of 128 px"),
        ("tiny-flux", F64, 512, "home", 128, "the base was trained on"),
        ("tiny-flux", F32, 128, "pooled", 128, "its home size is 64 px"),
    ],
)
def test_what_follows_from_the_sizes(source, new, px, target, side, why):
    found = asked(source, new, px)
    assert (found.target, found.resolution, found.side) == (target, px, side) and why in found.reason
    assert found.told.startswith(f"align_embedder.target: {target}: ") and found.reason in found.told


def test_what_is_set_is_done():
    assert asked("tiny-flux", F32, 128, target="home").side == 64
    assert asked("tiny-flux", F32, 256, target="pooled").side == 256
    found = asked("tiny-flux", F32, 256, pooling="average")  # recipes from before there was a target
    assert found.target == "pooled" and "because align_embedder.pooling is set" in found.reason


@pytest.mark.parametrize(
    "source, new, px, why",
    [
        ("flux-krea", F16, 1024, "both grids have the same tokens already"),
        ("flux-krea", F32, 4096, "the home size of 4096 px is 2048 px"),
        ("dit-xl-256", F32, 256, "the base knows pictures of 256 px only, and the home size of 256 px is 128 px"),
        ("sana-1.6b", F16, 1024, "the new tokens are smaller"),
    ],
)
def test_home_that_is_none_is_refused(source, new, px, why):
    with pytest.raises(RecipeError, match=f"^align_embedder.target is home, but .*{why}") as caught:
        asked(source, new, px, target="home")
    assert caught.value.hint == "--set align_embedder.target=pooled"


def test_refused_where_recipes_are_read():
    with pytest.raises(RecipeError, match="target is home, but the base knows pictures of 128 px only"):
        load("tiny-dit", sets=["align_embedder.target=home"])
    with pytest.raises(RecipeError, match="pooling is average, but target home takes the base's tokens one by one"):
        load("tiny-flux", sets=["align_embedder.target=home", "align_embedder.pooling=average"])


def test_buckets_have_exact_home_sizes():
    found = asked("flux-krea", F64, 4096)
    assert found.size(3072, 5440) == (768, 1360) and found.size(4096, 4096) == (1024, 1024)


def test_plan_counts_the_bases_latents_once_and_says_the_target():
    """FLUX at f32, 512 and 1024 px: 16 channels at f8 for the first phase, 32 at f32 for both; four bytes each."""
    doc = plan.plan(load("flux-krea", sets=["data.count=1000", "budget.gpu_hours=0"]))
    assert doc["disk"]["bytes"]["latents"] == 1000 * 4 * (16 * 64**2 + 32 * (16**2 + 32**2))
    sets = ["data.count=1000", "budget.gpu_hours=0", "adapt.phases=[{resolution: 4096, steps: 10}]"]
    flags = {"ae": "dc-ae-f64", "data.kind": "folder", "data.path": "pictures"}
    doc = plan.plan(load("flux-krea", sets=sets, flags=flags))
    assert doc["disk"]["bytes"]["latents"] == 1000 * 4 * (16 * 128**2 + 128 * 64**2)
    assert doc["alignment"]["target"] == "home" and doc["alignment"]["side"] == 1024
    assert "align_embedder.target: home: the base's embeddings of the pictures at 1024 px" in plan.render(doc)
