"""`import dcgen_convert`: what it offers, that it is the command line's own path, and the example of its page."""

from __future__ import annotations

import inspect as introspection
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
from conftest import SHORT, STAGES, environment, run_cli

import dcgen_convert
from dcgen_convert.api import calls, command, results
from dcgen_convert.api.settings import JobSettings, Settings
from dcgen_convert.bundle.manifest import read
from dcgen_convert.cli.app import cli
from dcgen_convert.cli.options import OUTPUT, stack
from dcgen_convert.core import errors

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"
FUNCTIONS = ("plan", "convert", "resume", "quantize", "verify", "sample", "inspect", "adopt", "evaluate")
HEAVY = "{'torch', 'numpy', 'diffusers', 'transformers', 'pydantic', 'click'}"
LIGHT_CALLS = """
import sys
import dcgen_convert
assert not {HEAVY} & set(sys.modules), {HEAVY} & set(sys.modules)
assert set(dcgen_convert.__all__) <= set(dir(dcgen_convert))
dcgen_convert.plan("flux-krea", ae="dc-ae-f64", quantize="nvfp4")
dcgen_convert.inspect(sys.argv[1])
assert "torch" not in sys.modules
"""
EVERY_MODULE = """
import importlib, pkgutil
import dcgen_convert
for module in pkgutil.walk_packages(dcgen_convert.__path__, "dcgen_convert."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
homes = [vars(importlib.import_module(f"dcgen_convert.{home}")) for home in dcgen_convert._HOMES]
for name in dcgen_convert.__all__:
    if name != "__version__":
        assert any(getattr(dcgen_convert, name) is home.get(name) for home in homes), name
"""


def python(code: str, *arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, env={**environment(), **env}, capture_output=True, text=True, timeout=600)


def test_the_import_and_the_light_calls_need_no_torch(tmp_path, weights):
    done = python(LIGHT_CALLS.replace("{HEAVY}", HEAVY), str(weights / "tiny-flux"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_no_module_hides_a_name_of_the_api(tmp_path):
    done = python(EVERY_MODULE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'convertt'"):
        _ = dcgen_convert.convertt


def test_every_function_is_typed_and_documented():
    for name in FUNCTIONS:
        function = getattr(dcgen_convert, name)
        assert function.__doc__ and issubclass(get_type_hints(function)["return"], results.Result)
        assert all(
            known.annotation is not known.empty for known in introspection.signature(function).parameters.values()
        )


def test_every_keyword_is_described():
    for known in (Settings, JobSettings):
        described = set(re.findall(r"(\w+):", known.__doc__))
        own = known.__annotations__.keys() - (set() if known is Settings else Settings.__annotations__.keys())
        assert own <= described


NO_KEYWORD = {
    "convert": {"source", "dry_run", "yes", "push_to", "private"},
    "plan": {"source"},
    "resume": {"run"},
    "quantize": {"source"},
    "verify": {"bundle"},
    "sample": {"bundle", "prompts"},
    "inspect": {"path"},
    "adopt": {"source", "output"},
    "evaluate": {"bundle"},
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_keywords_are_the_options_of_the_verb(name):
    shown = {parameter.name for parameter in stack(OUTPUT)(lambda: None).__click_params__}
    options = {parameter.name for parameter in cli.commands[name].params} - shown - NO_KEYWORD[name]
    keywords = {
        key: known
        for key, known in introspection.signature(getattr(dcgen_convert, name)).parameters.items()
        if known.kind in (known.KEYWORD_ONLY, known.VAR_KEYWORD) and key not in ("quiet", "console")
    }
    settings = {"convert": JobSettings, "plan": Settings}.get(name)
    if settings:
        assert keywords.pop("settings").kind is introspection.Parameter.VAR_KEYWORD
        keywords |= settings.__annotations__
    assert keywords.keys() == options


def test_keywords_become_the_options_that_mean_the_same():
    values = {
        "ae": "dc-ae-f64",
        "ae_channels": 32,
        "loras": ["a.safetensors", "b.safetensors:0.5"],
        "sets": ("adapt.ema=0",),
        "merge_lora": False,
        "zero": 3,
        "gpus": 2,
        "offline": True,
        "start": "latents",
        "run_dir": Path("run"),
        "force": False,
        "until": None,
        "rank_timeout": 5.0,
    }
    parsed = cli.commands["convert"].make_context("convert", ["x", *command.options(values)]).params
    wanted = {**values, "loras": tuple(values["loras"]), "zero": "3", "run_dir": "run"}
    assert {key: parsed[key] for key in values} == wanted
    assert (
        cli.commands["convert"]
        .make_context("convert", ["x", *command.options({"merge_lora": True})])
        .params["merge_lora"]
    )


DOCUMENTS = {  # frozen: scripts read these keys
    "plan": "schema status problems exit_code notes source licences autoencoder tokens alignment speedup speedup_paper "
    "training memory quantization disk downloads time budget settings",
    "convert": "schema status bundle run stages metrics",
    "stopped": "schema status run stages",
    "quantize": "schema status bundle metrics checks layers",
    "verify": "schema status ok bundle signed_by checks files tensors picture",
    "sample": "schema status images prompts seeds runtime height width steps guidance seconds",
}


def test_plan_and_inspect_give_the_documents_of_the_verbs(tmp_path, weights, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planned = dcgen_convert.plan("tiny-flux", quantize="nvfp4", sets=["adapt.ema=0"], gpu_memory=24)
    printed = run_cli(
        "plan", "tiny-flux", "--quantize", "nvfp4", "--set", "adapt.ema=0", "--gpu-memory", "24", "--json", cwd=tmp_path
    )
    assert json.loads(printed.stdout) == planned.document()
    assert [*planned.document()] == DOCUMENTS["plan"].split() and planned.feasible
    assert planned.settings["adapt.ema"] == {"value": 0.0, "origin": "--set"}
    found = dcgen_convert.inspect(weights / "tiny-flux")
    assert json.loads(run_cli("inspect", str(weights / "tiny-flux"), "--json", cwd=tmp_path).stdout) == found.document()
    assert (found.kind, found.family, found.document()["tensors"]) == ("pipeline", "flux", 140)


def test_wrong_arguments_are_refused_in_one_sentence():
    with pytest.raises(TypeError, match="unexpected keyword argument 'quantise'"):
        dcgen_convert.convert("tiny-flux", quantise="nvfp4")
    with pytest.raises(errors.RecipeError, match="quantize.format must be one of"):
        dcgen_convert.plan("tiny-flux", quantize="nvfp5")
    with pytest.raises(errors.RecipeError, match="rank must be a multiple of 16, not 17"):
        dcgen_convert.quantize("tiny-flux", rank=17)
    with pytest.raises(errors.InputError, match="gpus is 0"):
        dcgen_convert.plan("tiny-flux", gpus=0)
    with pytest.raises(errors.InputError, match="not a run folder"):
        dcgen_convert.resume("nothing")


def test_known_exceptions_of_libraries_become_ours_and_others_stay(tmp_path):
    with pytest.raises(errors.InputError, match="a JSON file is damaged") as caught, calls.explained():
        json.loads("{")
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(ZeroDivisionError), calls.explained():
        _ = 1 / 0


def test_the_command_answers_for_several_ranks_with_the_same_errors(tmp_path):
    with pytest.raises(errors.InputError) as told:
        command.run("inspect", str(tmp_path / "nothing"), {})
    with pytest.raises(errors.InputError) as known:
        dcgen_convert.inspect(tmp_path / "nothing")
    assert (told.value.message, told.value.hint) == (known.value.message, known.value.hint)


def test_a_rank_of_a_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(errors.InputError, match="one of several ranks"):
        dcgen_convert.convert("tiny-flux")


def test_two_ranks_are_started_by_the_command(tmp_path):
    done = dcgen_convert.convert(
        "tiny-flux", gpus=2, run_dir=tmp_path / "run", output=tmp_path / "bundle", until="surgery", quiet=True
    )
    assert (done.status, done.bundle, done.metrics, done.run) == ("stopped", None, None, tmp_path / "run")
    assert [*done.document()] == DOCUMENTS["stopped"].split()
    assert [stage["name"] for stage in done.stages] == ["surgery"]
    assert (tmp_path / "run" / "surgery" / "stage.json").is_file()
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["machine"]["gpus"] == 2


def example() -> str:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)[0]


RECORD = """
import json
results = {"plan": plan, "convert": made, "verify": checked, "sample": pictures}
documents = {name: result.document() for name, result in results.items()}
open("documents.json", "w").write(json.dumps(documents))
"""


def test_the_example_of_the_page_runs_and_makes_what_the_command_makes(converted, tmp_path):
    """With the tests' short settings in the environment, else as it stands on the page.

    The command's stages up to the last merge hold: these are the same settings. What follows is made anew.
    """
    run = tmp_path / "runs" / "tiny-flux-tiny-dc-ae-f32-nvfp4"
    for stage in STAGES[: STAGES.index("quantize")]:
        shutil.copytree(converted / "run" / stage, run / stage)
    assert len(example().strip().splitlines()) == 7  # six lines and an empty one
    short = {f"DCGEN_CONVERT_{key.replace('.', '__').upper()}": str(value) for key, value in SHORT.items()}
    done = python(example() + RECORD, cwd=tmp_path, **short)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("holds, skipped") == STAGES.index("quantize")
    (line,) = done.stdout.splitlines()
    assert "0000-seed-0.png" in line and "picture" in line
    assert "verify picture: ok" in done.stderr and (tmp_path / "pictures" / "0000-seed-0.png").is_file()
    documents = json.loads((tmp_path / "documents.json").read_text())
    for name, document in documents.items():
        assert [*document] == DOCUMENTS[name].split(), name
    made, theirs = read(tmp_path / "bundle"), read(converted / "bundle")
    assert made["files"].keys() == theirs["files"].keys()
    different = [name for name in made["files"] if made["files"][name] != theirs["files"][name]]
    assert different == [] and made["metrics"] == theirs["metrics"]
    assert documents["convert"]["run"] == str(run)
    assert os.path.exists(f"{documents['convert']['run']}/log.txt")


def test_quiet_says_nothing_and_a_difference_is_raised(converted, tmp_path, capfd):
    broken = tmp_path / "bundle"
    subprocess.run(["cp", "-r", str(converted / "bundle"), str(broken)], check=True)
    (broken / "README.md").write_text("other")
    with pytest.raises(errors.CheckFailed, match="README.md has"):
        dcgen_convert.verify(broken, quiet=True)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_quantize_gives_the_document_of_the_verb(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    done = dcgen_convert.quantize("tiny-flux", calibration=None, quiet=True)
    assert done.bundle == tmp_path / "tiny-flux-nvfp4" and len(done.layers) == 52
    assert [*done.document()] == DOCUMENTS["quantize"].split()
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: dcgen_convert.sample("b", "x", seed=10**22), "seed is 10000000000000000000000"),
        (lambda: dcgen_convert.sample("b", "x", guidance=float("nan")), "guidance is nan"),
        (lambda: dcgen_convert.sample("b", "x", height=-8), "height is -8"),
        (lambda: dcgen_convert.sample("b", "x", output=""), "output is empty"),
        (lambda: dcgen_convert.quantize("tiny-flux", steps=10**12), "steps is 1000000000000"),
        (lambda: dcgen_convert.quantize("tiny-flux", output="a\0"), r"output holds the character '\\x00'"),
        (lambda: dcgen_convert.convert("tiny-flux", ae="tiny-dc-ae-f32", run_dir=" "), "run_dir is empty"),
        (
            lambda: dcgen_convert.convert("tiny-flux", ae="tiny-dc-ae-f32", rank_timeout=float("inf")),
            "rank_timeout is inf",
        ),
        (lambda: dcgen_convert.plan("tiny-flux", gpu_memory=float("nan")), "gpu_memory is nan"),
        (lambda: dcgen_convert.plan("\n"), "SOURCE is empty"),
        (lambda: dcgen_convert.plan("a/b\n"), r"SOURCE holds the character '\\n'"),
        (lambda: dcgen_convert.plan("x" * 5000), "SOURCE has 5,000 bytes"),
    ],
)
def test_hostile_numbers_and_names_are_refused_first(call, words):
    with pytest.raises(errors.InputError, match=words):
        call()
