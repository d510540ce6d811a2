"""The release pipelines of integrations/ and .github/: their one script runs step by step, and tools read the rest."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from bundle.test_push import Hub, hub  # noqa: F401  a fixture, and the class of its server
from bundle.test_signature import write_pair
from conftest import short_settings
from cryptography.hazmat.primitives.asymmetric import ec
from warm import environment

from dcgen_convert.cli.app import cli

ROOT = Path(__file__).resolve().parents[2]
SCRIPT, SLURM = ROOT / "integrations" / "ci" / "release.sh", ROOT / "integrations" / "slurm" / "convert.sbatch"
WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"
STEPS = ["plan", "convert", "evaluate", "sign", "verify", "push"]
VARIABLES = re.findall(r"^# ([A-Z_]{2,}) ", SCRIPT.read_text(), re.MULTILINE)


def program(folder: Path, name: str, *lines: str) -> None:
    """An executable script in the folder."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(["#!/usr/bin/env bash", *lines, ""]))
    (folder / name).chmod(0o755)


def run(script: Path, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    """A script, with the programs of ``cwd``/bin before all others."""
    env = {**environment(), "PATH": f"{cwd / 'bin'}{os.pathsep}{os.environ['PATH']}", "PAUSE": "0", **variables}
    call = [str(script), *arguments]
    return subprocess.run(call, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def test_the_steps_release_a_bundle_that_arrives_signed(converted, hub, tmp_path):  # noqa: F811
    """Each step is the real command; what it needs of the one before is there, and the hub is a server of this test."""
    program(tmp_path / "bin", "dcgen-convert", f'exec {sys.executable} -m dcgen_convert.cli "$@"')
    write_pair(tmp_path, "release", ec.generate_private_key(ec.SECP256R1()))
    options = " ".join(["--ae", "tiny-dc-ae-f32", "--quantize", "nvfp4", *short_settings()])
    given = {"RECIPE": "tiny-flux", "OPTIONS": options, "REPO": "me/out"}
    held = {"BUNDLE": str(converted / "bundle"), "RUN_DIR": str(converted / "run")}  # all stages hold
    shutil.copytree(converted / "bundle", tmp_path / "bundle")  # what the next steps write into
    own = {
        "plan": held,
        "convert": held,
        "evaluate": {"GATES": "--prompts tiny-world -n 2 --steps 1 --metrics accuracy --min accuracy=0"},
        "sign": {"SIGNING_KEY": "release.pem"},
        "verify": {"PUBLIC_KEY": "release.pub"},
        "push": {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"},
    }
    for step in STEPS:
        done = run(SCRIPT, step, cwd=tmp_path, **given, **own[step])
        assert done.returncode == 0 and done.stdout == "", done.stderr[-2000:]
    results = {step: json.loads((tmp_path / "release" / f"{step}.json").read_text()) for step in STEPS}
    assert results["plan"]["status"] == "feasible" and results["convert"]["bundle"] == held["BUNDLE"]
    assert results["evaluate"]["gates"][0]["passed"] and results["verify"]["checks"][0] == "signature"
    assert results["push"]["url"].endswith("me/out")
    assert hub.files == {name: (tmp_path / "bundle" / name).read_bytes() for name in hub.files}
    assert {"model.sig", "sbom.cdx.json", "dcgen_manifest.json"} <= hub.files.keys()
    assert 'from_pretrained("me/out"' in hub.files["README.md"].decode()


@pytest.fixture
def recorded(tmp_path):
    """`recorded(codes)`: a dcgen-convert that notes its arguments, and ends with the next code of the list, then 0."""

    def make(*codes: int) -> Path:
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        (tmp_path / "bundle").mkdir(exist_ok=True)
        (tmp_path / "calls").unlink(missing_ok=True)
        lines = ['printf "%s\\0" "$@" >> calls', "echo >> calls", "code=$(head -n 1 codes)", "sed -i 1d codes"]
        program(tmp_path / "bin", "dcgen-convert", *lines, 'exit "${code:-0}"')
        return tmp_path

    return make


def calls(folder: Path) -> list[list[str]]:
    """The recorded arguments of every call; each is one that the real command takes."""
    lines = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    found = [line.split("\0")[:-1] for line in lines]
    here = Path.cwd()
    os.chdir(folder)
    try:
        for verb, *rest in found:
            cli.commands[verb].make_context(verb, list(rest))  # click says what it does not take
    finally:
        os.chdir(here)
    return found


EVERY = {
    "RECIPE": "tiny-flux", "RUN_DIR": "run dir", "OPTIONS": "--gpus 8", "PLAN_OPTIONS": "--disk 2000",
    "GATES": "--max cmmd-ratio=1.2", "SIGNING_KEY": "a key.pem", "PUBLIC_KEY": "a key.pub", "REPO": "me/out",
    "PUSH_OPTIONS": "--private",
}  # fmt: skip


def test_each_step_is_a_call_that_the_command_takes(recorded):
    folder = recorded()
    assert run(SCRIPT, *STEPS, cwd=folder, **EVERY).returncode == 0
    assert calls(folder) == [
        ["plan", "tiny-flux", "--gpus", "8", "--disk", "2000", "--json"],
        ["convert", "tiny-flux", "--gpus", "8", "-y", "-o", "bundle", "--run-dir", "run dir", "--json"],
        ["evaluate", "bundle", "--max", "cmmd-ratio=1.2", "--json"],
        ["sign", "bundle", "--key", "a key.pem", "--repo", "me/out", "--json"],
        ["verify", "bundle", "--signed-by", "a key.pub", "--json"],
        ["push", "bundle", "me/out", "--private", "--json"],
    ]


def test_without_options_it_signs_keyless_and_pushes_nothing(recorded):
    folder = recorded()
    done = run(SCRIPT, *STEPS, cwd=folder, RECIPE="tiny-flux")
    assert done.returncode == 0 and "REPO is empty: nothing is pushed" in done.stderr
    assert [call[0] for call in calls(folder)] == STEPS[:-1] and ["sign", "bundle", "--json"] in calls(folder)


def test_the_first_step_that_fails_ends_the_rest(recorded):
    for codes, made in (([4], 1), ([0, 2], 2), ([0, 0, 1], 3), ([0, 0, 0, 0, 1], 5)):
        folder = recorded(*codes)
        assert run(SCRIPT, *STEPS, cwd=folder, RECIPE="tiny-flux").returncode == codes[-1]
        assert [call[0] for call in calls(folder)] == STEPS[:made]
    assert run(SCRIPT, "publish", cwd=recorded(), RECIPE="tiny-flux").returncode == 2
    assert run(SCRIPT, "plan", cwd=recorded()).returncode != 0  # no RECIPE


def test_a_conversion_goes_on_when_resources_were_lost_or_the_machine_was_taken(recorded):
    folder = recorded(4, 143)
    assert run(SCRIPT, "convert", cwd=folder, RECIPE="tiny-flux").returncode == 0 and len(calls(folder)) == 3
    folder = recorded(4, 4, 4)
    assert run(SCRIPT, "convert", cwd=folder, RECIPE="tiny-flux", ATTEMPTS="2").returncode == 4
    assert len(calls(folder)) == 2


@pytest.mark.parametrize(("code", "again"), [(0, False), (143, True), (1, False)])
def test_the_slurm_script_starts_the_ranks_and_queues_itself_again(recorded, code, again):
    folder = recorded(code)
    program(folder / "bin", "srun", 'test "$1" = --kill-on-bad-exit=1 && shift && exec "$@"')
    program(folder / "bin", "scontrol", 'echo "$*" >> requeued')
    given = {"RECIPE": "flux-krea", "OPTIONS": "--quantize nvfp4", "SLURM_JOB_ID": "7"}
    assert run(SLURM, cwd=folder, **given).returncode == code
    assert calls(folder) == [["convert", "flux-krea", "--quantize", "nvfp4", "-y", "-o", "bundle", "--run-dir", "run"]]
    assert (folder / "requeued").exists() == again
    assert not again or (folder / "requeued").read_text() == "requeue 7\n"


@pytest.mark.parametrize("linter, file", [
    ("shellcheck", SCRIPT), ("shellcheck", SLURM), ("hadolint", ROOT / "integrations" / "container" / "Containerfile"),
])  # fmt: skip
def test_linters_have_nothing_to_say(linter, file):
    place = shutil.which(linter, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert place, f"{linter} comes with the extra `test`"
    done = subprocess.run([place, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_workflow_passes_actionlint():
    if (place := shutil.which("actionlint")) is None:
        pytest.skip("actionlint is not on this machine")
    done = subprocess.run([place, str(WORKFLOW)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def document(path: Path) -> dict:
    return yaml.load(path.read_text(), yaml.BaseLoader)  # "on" stays a word


def test_the_action_hands_every_variable_to_the_script():
    action = document(ROOT / "integrations" / "ci" / "action.yml")
    (step,) = action["runs"]["steps"]
    handed = {**step["env"]}
    assert handed.pop("STEPS") == "${{ inputs.steps }}" and "$GITHUB_ACTION_PATH/release.sh" in step["run"]
    assert handed == {name: f"${{{{ inputs.{name.lower().replace('_', '-')} }}}}" for name in handed}
    assert {*handed, "ATTEMPTS", "RESULTS"} == {*VARIABLES}
    assert {*action["inputs"]} == {name.lower().replace("_", "-") for name in [*handed, "STEPS"]}
    assert action["inputs"]["steps"]["default"].split() == STEPS
    assert not re.search(r"\$\{\{", step["run"])  # an input in a script would be code


def test_the_template_of_gitlab_calls_all_steps_in_order():
    template = document(ROOT / "integrations" / "ci" / "gitlab.yml")
    jobs = [template[stage] for stage in template["stages"]]
    lines = [line.partition("release.sh ")[2].split() for job in jobs for line in job["script"]]
    assert [word for line in lines for word in line] == STEPS
    assert [job["stage"] for job in jobs] == template["stages"] and {job["extends"] for job in jobs} == {".release"}
    assert jobs[-1]["id_tokens"] == {"SIGSTORE_ID_TOKEN": {"aud": "sigstore"}}


def test_the_workflow_may_sign_and_hands_the_action_what_it_takes():
    workflow = document(WORKFLOW)
    assert workflow["permissions"] == {"contents": "read"}  # what a job needs beyond, the job says
    for job in workflow["jobs"].values():
        assert job["permissions"] == {"contents": "read", "id-token": "write", "attestations": "write"}
        for step in job["steps"]:
            assert not re.search(r"\$\{\{", step.get("run", ""))
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+|\./integrations/ci", step.get("uses", "a/b@v1"))
    (step,) = [step for step in workflow["jobs"]["bundle"]["steps"] if step.get("uses") == "./integrations/ci"]
    action = document(ROOT / "integrations" / "ci" / "action.yml")
    assert step["with"].keys() <= action["inputs"].keys() and {*step["with"]["steps"].split()} <= {*STEPS}
    cli.commands["convert"].make_context("convert", [step["with"]["recipe"], *step["with"]["options"].split()])


def test_what_was_not_run_says_so():
    never = [SLURM, WORKFLOW, *(ROOT / "integrations" / "ci").glob("*.yml"), *ROOT.glob("integrations/*/Containerfile")]
    assert len(never) == 5
    for path in never:
        assert re.search(r"^# Not (run|built)", path.read_text(), re.MULTILINE), path
