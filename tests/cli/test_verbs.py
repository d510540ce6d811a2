"""recipes, completion, doctor and inspect through the real command line."""

import json
import re

import pytest
import yaml
from conftest import run_cli

from dcgen_convert.recipe import loading, shelf


def test_recipes_list_names_every_shipped_recipe(cli):
    done = cli("recipes", "list", "--json")
    rows = json.loads(done.stdout)["recipes"]
    assert [row["name"] for row in rows] == shelf.names()
    assert all(row["source"] and row["ae"] and row["about"] for row in rows)


def test_recipes_show_gives_each_value_with_its_origin(cli):
    doc = json.loads(cli("recipes", "show", "flux-krea", "--json").stdout)
    assert doc["recipe"]["adapt"]["phases"][0]["rank"] == 256
    assert doc["origins"]["source"] == "recipe flux-krea"
    assert doc["origins"]["adapt.ema"] == "recipe flux-dev"
    assert "adapt.ema" in cli("recipes", "show", "flux-krea").stdout


def test_a_copied_recipe_is_the_same_recipe(cli, tmp_path):
    assert cli("recipes", "copy", "flux-krea", "mine.yaml").stdout == "mine.yaml\n"
    copied, shipped = loading.load(str(tmp_path / "mine.yaml")), loading.load("flux-krea")
    assert copied.recipe == shipped.recipe
    again = cli("recipes", "copy", "flux-krea", "mine.yaml")
    assert again.returncode == 2
    assert "--force" in again.stderr


def test_recipes_validate(cli, tmp_path):
    assert cli("recipes", "validate", "flux-krea").returncode == 0
    broken = tmp_path / "broken.yaml"
    broken.write_text(yaml.safe_dump({"extends": "flux-krea", "adapt": {"emma": 0.9}}))
    done = cli("recipes", "validate", str(broken))
    assert done.returncode == 2
    assert "did you mean 'adapt.ema'?" in done.stderr


MISSING = {
    "data": ({"data": {"kind": "folder", "path": "missing"}}, "no pictures: missing does not exist"),
    "list": ({"data": {"kind": "folder", "path": "missing.jsonl"}}, "no pictures: missing.jsonl does not exist"),
    "shards": ({"data": {"kind": "folder", "path": ["a.tar=.5", "b.tar=.5"]}}, "no pictures: a.tar does not exist"),
    "prompts": ({"data": {"prompts": "missing.txt"}}, "prompts file missing.txt does not exist"),
    "base": ({"base": "./missing"}, "./missing does not exist"),
    "lora": ({"loras": ["missing.safetensors:0.5"]}, "missing.safetensors is no file"),
}


@pytest.mark.parametrize("verb", ["recipes validate", "plan", "convert"])
@pytest.mark.parametrize(("changes", "sentence"), MISSING.values(), ids=MISSING)
def test_an_input_that_is_not_there_is_one_sentence_in_all_three(tmp_path, verb, changes, sentence):
    recipe = {"extends": "tiny-flux", "ae": "tiny-dc-ae-f32", **changes}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    done = run_cli(*verb.split(), "mine.yaml", *(["-y"] if verb == "convert" else []), cwd=tmp_path)
    assert done.returncode == 2 and sentence in (done.stdout if verb == "plan" else done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(cli, shell):
    done = cli("completion", shell)
    assert done.returncode == 0
    assert "_DCGEN_CONVERT_COMPLETE" in done.stdout


@pytest.mark.parametrize(
    "words, offered",
    [
        ("dcgen-convert fl", "flux-krea"),
        ("dcgen-convert pl", "plan"),
        ("dcgen-convert plan sana", "sana-1.6b"),
        ("dcgen-convert convert flux-krea --ae dc-ae-f6", "dc-ae-f64"),
        ("dcgen-convert flux-krea --ae dc-ae-f6", "dc-ae-f64"),
        ("dcgen-convert recipes show tiny", "tiny-flux"),
    ],
)
def test_completion_offers_names(cli, words, offered):
    count = len(words.split()) - 1
    env = {"_DCGEN_CONVERT_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(count)}
    assert offered in [line.partition(",")[2] for line in cli(env=env).stdout.splitlines()]


def test_doctor(cli, tmp_path):
    done = cli("doctor", "--run-dir", "runs", "--json")
    checks = json.loads(done.stdout)["checks"]
    assert done.returncode == 0
    assert set(checks) >= {"torch", "gpus", "4-bit kernels", "deepspeed", "disk", "hub"}
    assert {check["state"] for check in checks.values()} <= {"ok", "limited", "missing"}
    assert checks["hub"]["offline"] is True
    assert checks["run locks"]["state"] == "ok" and not (tmp_path / "runs").exists()
    assert checks["deepspeed"]["state"] != "missing", checks["deepspeed"]["text"]


def test_plan_names_what_is_gated_and_missing(cli):
    done = cli("plan", "flux-krea", "--offline", "--disk", "2000")
    assert done.returncode == 0
    assert "https://huggingface.co/black-forest-labs/FLUX.1-Krea-dev" in done.stdout
    assert "not in the cache" in done.stdout


def test_plan_refuses_what_cannot_fit_and_names_the_change(cli):
    done = cli("plan", "flux-krea", "--gpu-memory", "48", "--set", "adapt.zero=2", "--json")
    doc = json.loads(done.stdout)
    assert done.returncode == 4
    assert doc["status"] == "infeasible"
    change = re.search(r"--zero (\d) --offload (\w+)", doc["problems"][0])
    fitting = ("--gpu-memory", "48", "--zero", change[1], "--offload", change[2], "--disk")
    assert cli("plan", "flux-krea", *fitting, "2000").returncode == 0
    done = cli("plan", "flux-krea", *fitting, "20", "--json")
    assert done.returncode == json.loads(done.stdout)["exit_code"] == 4
    assert "the disk is too small" in json.loads(done.stdout)["problems"][0]


@pytest.mark.parametrize(
    "args, code, text",
    [
        (("plan", "flux-krea", "--ae", "dc-ae-f63"), 2, "did you mean 'dc-ae-f64'?"),
        (("plan", "flux-krea", "--resolution", "1000"), 2, "f*p = 8*2 = 16"),
        (("plan", "flux-krea", "--set", "adapt.ema"), 2, "KEY=VALUE"),
        (("plan", "flux-krea", "--ae", "dc-ae-f64", "--resolution", "4096"), 2, "adapt.phases.1 (4096 px) need"),
        (("plan", "sana-1.6b", "--quantize", "nvfp4", "--disk", "2000"), 2, ""),
        (("plan", "model.ckpt"), 2, "pickle"),
        (("inspect", "nothing"), 2, "no such file"),
        (("verify", "nothing"), 2, "nothing"),
        (("sample", "nothing", "-p", "x"), 2, "nothing"),
        (("resume", "nothing"), 2, "nothing"),
    ],
)
def test_bad_input_is_one_sentence_with_the_right_code(cli, args, code, text):
    done = cli(*args)
    assert done.returncode == code
    assert text in done.stderr
    assert "Traceback" not in done.stderr
