"""What an older version wrote is read, or refused in one sentence before anything of it is touched.

version_0_1_0/ was written by version 0.1.0: the recipe.json of a run (`tiny-flux --until surgery`), and a whole bundle
of a FLUX with random weights.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import run_cli

from dcgen_convert import __version__, conversion
from dcgen_convert.bundle.verify import verify
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import InputError, RecipeError
from dcgen_convert.recipe.loading import load
from dcgen_convert.recipe.settings import REMOVED, RENAMED

ROOT = Path(__file__).resolve().parents[2]
OLD = Path(__file__).parent / "version_0_1_0"


@pytest.fixture
def old_run(tmp_path) -> Path:
    """A run of 0.1.0 with a finished stage."""
    run = Path(shutil.copytree(OLD / "run", tmp_path / "run"))
    (run / "surgery").mkdir()
    (run / "surgery" / "stage.json").write_text('{"stage": "surgery"}')
    return run


def rewrite(run: Path, change) -> None:
    """Change the run's recipe.json as if this version had written it."""
    record = json.loads((run / "recipe.json").read_text())
    renew(record["recipe"])
    record["version"] = __version__
    change(record)
    (run / "recipe.json").write_text(json.dumps(record))


def renew(recipe: dict) -> None:
    """Make a recipe of 0.1.0 one of this version: without the removed keys, the renamed keys under their new names."""
    for section, key in (name.split(".") for name in REMOVED):
        del recipe[section][key]
    for old, new in RENAMED.items():
        section, key = old.split(".")
        recipe[section][new.removeprefix(f"{section}.")] = recipe[section].pop(key)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_bundle_of_0_1_0_is_verified_and_draws(tmp_path):
    bundle = shutil.copytree(OLD / "bundle", tmp_path / "bundle")
    assert verify(bundle, NULL)["ok"] is True


def test_recipe_of_0_1_0_is_read_without_removed_and_with_renamed_keys(tmp_path):
    written = json.loads((OLD / "run" / "recipe.json").read_text())["recipe"]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(written))
    with pytest.raises(RecipeError, match="unknown key 'a.*'; this version does not have it any more") as caught:
        load(str(path))
    assert "\n" not in caught.value.message
    path.write_text(yaml.safe_dump({"quantize": written["quantize"]}))
    with pytest.raises(RecipeError, match="'quantize.share'; it is called 'quantize.fuse_qkv' now") as caught:
        load(str(path))
    assert "\n" not in caught.value.message
    renew(written)
    path.write_text(yaml.safe_dump(written))
    found = load(str(path)).recipe.model_dump(mode="json")
    assert found.pop("keep") == "all" and found.pop("compile") is False  # settings that are new
    assert not any(found.pop("budget").values()) and found["align_embedder"].pop("target") is None
    assert [found["data"].pop(name) for name in ("min_side", "sources", "frames")] == [None] * 3
    assert found["adapt"]["phases"][0].pop("data") is None
    assert found["data"].pop("beyond_base") is False and found["adapt"].pop("lora_start") == "zero"
    assert found["adapt"].pop("optimizer") == "adamw"
    assert [part.pop("share") for part in (found["data"], *found["adapt"]["phases"])] == [None] * 2
    weights = ("clip", "dino", "pickscore", "inception", "detector", "reference")
    assert [found["evaluate"].pop(name) for name in weights] == [None] * 6
    assert found["watch"].pop("metrics") == "none"
    assert found == written


def test_run_of_0_1_0_is_refused_and_kept(old_run, tmp_path):
    before = contents(old_run)
    done = run_cli("resume", str(old_run), cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"is a run of dcgen-convert 0.1.0, and this is {__version__}" in done.stderr
    resolved = load("tiny-flux", flags={"ae": "tiny-dc-ae-f32"})
    with pytest.raises(InputError, match="run of dcgen-convert 0.1.0"):  # the same folder given to a new conversion
        conversion.convert(resolved, old_run, tmp_path / "bundle", NULL)
    after = contents(old_run)
    assert {name: after[name] for name in before} == before


def test_run_of_this_version_is_read(old_run):
    rewrite(old_run, lambda record: None)
    resolved, output = conversion.recorded(old_run)
    assert resolved.recipe.adapt.optimizer == "adamw"  # the only one before it was a setting
    assert resolved.recipe.ae == "tiny-dc-ae-f32" and resolved.machine.offline and output.name == "bundle"


def test_patch_versions_share_their_runs(old_run):
    rewrite(old_run, lambda record: record.update(version=__version__.rpartition(".")[0] + ".99"))
    conversion.recorded(old_run)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda r: r["recipe"]["adapt"].update(from_the_future=1), "unknown key 'adapt.from_the_future'.*recipe.json"),
        (lambda r: r["recipe"].update(future={"a": 1}), "unknown key 'future"),
        (lambda r: r["machine"].update(future=1), "unknown machine setting 'future'"),
        (lambda r: r.pop("recipe"), "recipe, machine or output is missing"),
        (lambda r: r.update(machine=[]), "recipe, machine or output is missing"),
        (lambda r: r.pop("version"), "run of dcgen-convert None"),
        (lambda r: r.update(version="99.0.0"), "run of dcgen-convert 99.0.0"),
    ],
)
def test_record_that_cannot_be_understood_is_one_sentence(old_run, change, sentence):
    rewrite(old_run, change)
    with pytest.raises(InputError, match=sentence) as caught:
        conversion.recorded(old_run)
    assert caught.value.exit_code == 2 and "\n" not in caught.value.message and caught.value.hint
    assert isinstance(caught.value, RecipeError) == ("unknown key" in sentence)


def test_newer_key_ends_the_command_with_2(old_run, tmp_path):
    rewrite(old_run, lambda record: record["recipe"]["adapt"].update(from_the_future=1))
    done = run_cli("resume", str(old_run), cwd=tmp_path)
    assert done.returncode == 2 and "unknown key 'adapt.from_the_future'" in done.stderr
    assert "Traceback" not in done.stderr


def test_damaged_record_is_one_sentence(old_run):
    (old_run / "recipe.json").write_text('{"recipe": {')
    with pytest.raises(InputError, match="is not valid JSON"):
        conversion.recorded(old_run)


def test_changelog_and_citation_name_the_versions():
    newest, *older = re.findall(r"^## \[(.+?)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest[0] == __version__
    released = newest if newest[1] != "unreleased" else older[0]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["date-released"]) == released
