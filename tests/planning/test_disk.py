"""The disk that a conversion takes: what the plan says of it, and what is refused before the first byte."""

import shutil

import pytest
from conftest import WEIGHTS

from dcgen_convert import conversion
from dcgen_convert.core import disk
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import ResourceError
from dcgen_convert.planning import costs, plan
from dcgen_convert.planning.shapes import shapes_of
from dcgen_convert.recipe import loading

from .test_plan import document


def test_disk_follows_the_data():
    assert document("flux-krea", sets=["data.count=10"])["disk"]["peak"] < document("flux-krea")["disk"]["peak"]
    doc = document("flux-krea")
    assert sum(doc["disk"]["bytes"].values()) == pytest.approx(doc["disk"]["peak"])


@pytest.mark.parametrize("alone", [False, True], ids=["folder", "single file"])
def test_surgery_takes_the_disk_that_the_plan_says(alone, tmp_path):
    """Against what a real surgery (and import) leaves, a linked shard counted once; within 2 %: headers, embedder
    and head.
    """
    file = WEIGHTS / "tiny-flux" / "transformer" / "diffusion_pytorch_model.safetensors"
    resolved = loading.load("tiny-flux", flags={"source": str(file), "base": "tiny-flux"} if alone else {})
    conversion.convert(resolved, tmp_path / "run", tmp_path / "out", NULL, until="surgery")
    written = [path.stat() for path in (tmp_path / "run").glob("*/transformer/*.safetensors")]
    kinds = plan.plan(resolved)["disk"]["bytes"]
    assert (kinds["import"] > 0) == alone
    assert kinds["import"] + kinds["surgery"] == pytest.approx(
        sum({s.st_ino: s.st_size for s in written}.values()), rel=0.02
    )


def test_a_job_that_stops_early_needs_only_the_disk_until_there():
    resolved = loading.load("tiny-flux")
    recipe, sizes = resolved.recipe, shapes_of(resolved.recipe, resolved.identity)
    kinds = costs.disk(recipe, sizes)["bytes"]
    whole = sum(kinds.values()) - kinds["downloads"] - kinds["bundle"]
    ends = [costs.run_peak(recipe, sizes, stage) for stage in (None, "verify", "bundle")]
    assert ends == pytest.approx([whole] * 3)
    found = [costs.run_peak(recipe, sizes, stage) for stage in ("surgery", "data", "latents", "adapt-1", "merge-1")]
    assert found == sorted(found) and len({*found}) == len(found)
    assert found[0] == kinds["surgery"] and found[1] == kinds["surgery"] + kinds["pictures"]


def test_what_is_removed_on_the_way_lowers_the_peak():
    """Counted by hand for two phases without quantisation."""
    peaks = {}
    for keep in ("all", "resume", "bundle"):
        doc = document("flux-krea", sets=[f"keep={keep}", "quantize.format=none"])["disk"]
        kinds, peaks[keep] = doc["bytes"], doc["peak"]
    read = kinds["downloads"] + kinds["latents"] + kinds["text"]  # until the last merge
    steps, dense, bundle = kinds["checkpoints"] / 2, kinds["merged"] / 2, kinds["bundle"]  # both LoRAs are as large
    all_weights = kinds["surgery"] + kinds["merged"]
    assert peaks["all"] == pytest.approx(sum(kinds.values()))
    assert peaks["resume"] == pytest.approx(
        read + kinds["pictures"] + max(all_weights - dense + steps, all_weights + bundle)
    )
    first, second = kinds["surgery"] + max(kinds["pictures"], steps, dense), dense + max(steps, dense)
    end = kinds["downloads"] + dense + bundle
    assert peaks["bundle"] == pytest.approx(max(read + first, read + second, end))


def test_hub_cache_obeys_the_environment():
    assert str(costs.hub_cache({"HF_HUB_CACHE": "/a"})) == "/a"
    assert str(costs.hub_cache({"HF_HOME": "/b"})) == "/b/hub"
    assert str(costs.hub_cache({"XDG_CACHE_HOME": "/c"})) == "/c/huggingface/hub"


def test_a_full_disk_is_refused_before_the_first_byte(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    disk.check_disk([(tmp_path / "not" / "yet" / "there", free / 2)])
    with pytest.raises(ResourceError, match="GB needed") as caught:
        disk.check_disk([(tmp_path / "run", free * 0.6), (tmp_path / "out", free * 0.6)])  # one disk: they add up
    assert caught.value.exit_code == 4


def test_a_conversion_too_large_for_the_disk_is_refused(tmp_path):
    huge = loading.load("flux-krea", sets=["data.count=1000000000"])
    with pytest.raises(ResourceError, match="disk under"):
        plan.require_disk(huge, tmp_path / "run", tmp_path / "out")
    # what the run folder holds already is not needed again: a sparse file stands for terabytes of pictures
    small = loading.load("dit-xl-256", sets=["data.count=1"])
    plan.require_disk(small, tmp_path / "run", tmp_path / "out")
    large = loading.load("dit-xl-256", sets=["data.count=50000000"])
    with pytest.raises(ResourceError, match="disk under"):
        plan.require_disk(large, tmp_path / "run", tmp_path / "out")
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / "pictures", "wb") as file:
        file.truncate(10**13)
    plan.require_disk(large, tmp_path / "run", tmp_path / "out")
