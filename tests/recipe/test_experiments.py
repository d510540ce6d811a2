"""The shipped experiments: every row is a conversion that the recipes and settings of today allow."""

import importlib.util
import sys
from pathlib import Path

import pytest

from dcgen_convert.recipe import loading, shelf

SCRIPT = Path(__file__).parents[2] / "tools" / "experiments.py"  # no part of the package
SPEC = importlib.util.spec_from_file_location("experiments", SCRIPT)
experiments = sys.modules[SPEC.name] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(experiments)
FOUND = experiments.experiments()


def test_experiments_are_no_recipes():
    assert len(FOUND) >= 6
    assert not any(name.startswith(shelf.EXPERIMENTS) for name in shelf.names())


@pytest.mark.parametrize("name", [*FOUND])
def test_every_row_can_be_resolved(name):
    """Nothing but --set and the source of pictures differs from a shipped recipe; no two rows are the same."""
    rows = FOUND[name].rows
    assert len(set(map(tuple, rows.values()))) == len(rows)
    for recipe, *options in rows.values():
        kinds = [option.removeprefix("--").partition("=")[::2] for option in options]
        assert {kind for kind, _ in kinds} <= {"set", "prompts", "data"}
        resolved = loading.load(recipe, sets=[value for kind, value in kinds if kind == "set"])
        assert resolved.recipe.evaluate.metrics == "tiny-world"


def test_folders_tell_rows_and_seeds_apart(tmp_path):
    folders = {experiments.folder_of(tmp_path, row, seed) for one in FOUND.values() for row in one.rows.values()
               for seed in (0, 1)}  # fmt: skip
    assert len(folders) == 2 * len({tuple(row) for one in FOUND.values() for row in one.rows.values()})
    assert all(folder.parent == tmp_path for folder in folders)


def test_a_conversion_with_other_settings_has_its_own_folder(tmp_path, monkeypatch):
    """A second call with another number of steps would otherwise be answered with the first one's result."""
    calls = []
    monkeypatch.setattr(experiments.subprocess, "run", lambda command, **_: calls.append(command) or 1 / 0)
    for settings in (["adapt.phases.0.steps=600"], ["adapt.phases.0.steps=300"]):
        with pytest.raises(ZeroDivisionError):
            experiments.converted(tmp_path, ["tiny-flux"], 0, settings)
    first, second = ({command[command.index("--run-dir") + 1], command[command.index("-o") + 1]} for command in calls)
    assert not first & second


def test_means_show_what_each_seed_gave():
    assert experiments.shown([0.5, 0.7], ".1%") == "60.0% (50.0%, 70.0%)"
    assert experiments.shown([0.5], ".1%") == "50.0%"
    assert experiments.mean_curve([[(0, 1.0), (50, 3.0)], [(0, 2.0), (50, 5.0)]]) == [(0, 1.5), (50, 4.0)]
