"""A conversion whose budget is spent before its training: the phase ends after a step, is merged, and says so."""

import json

from conftest import copy_stages, run_cli

from dcgen_convert.bundle import measured
from dcgen_convert.core.files import read_json
from dcgen_convert.core.names import RECIPE
from dcgen_convert.evaluation.report import write_report


def test_a_phase_without_time_ends_at_once_and_a_resumed_run_leaves_it_so(converted, tmp_path):
    copy_stages(converted, tmp_path, "align-head")
    run = tmp_path / "run"
    record = read_json(converted / "run" / RECIPE)
    record["recipe"]["budget"] = {"gpu_hours": 1e-6, "hours": 0}
    (run / RECIPE).write_text(json.dumps({**record, "output": str(tmp_path / "bundle")}))
    steps, rate = (record["recipe"]["adapt"]["phases"][0][key] for key in ("steps", "lr"))
    for _ in range(2):
        done = run_cli("resume", "run", "--until", "merge-1", cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
    assert "adapt-1: holds, skipped" in done.stderr
    metrics = {name: read_json(run / name / "stage.json")["metrics"] for name in ("adapt-1", "merge-1")}
    found = metrics["adapt-1"]
    assert found["steps"] == found["ended"]["step"] == 1
    assert found["ended"]["of"] == steps > 1
    assert 0 < found["ended"]["learning_rate"] <= rate
    assert metrics["merge-1"]["max_delta"] > 0
    card = dict(measured.rows({"metrics": metrics, "recipe": record["recipe"]}))
    assert f"step 1 of {steps}" in card.values()
    assert "Its part of the budget was spent: ended early, after step" in write_report(run).read_text()
