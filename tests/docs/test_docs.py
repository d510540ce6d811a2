"""The documentation names only what exists: options, recipe keys, error messages, commands; and its generated parts
are not stale.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import click
import pytest
import yaml
from conftest import run_cli

from dcgen_convert.cli.app import cli
from dcgen_convert.evaluation.words import CHECKS
from dcgen_convert.recipe import loading
from dcgen_convert.recipe.settings import schema_keys

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
each_page = pytest.mark.parametrize("name", TEXTS)

sys.path.insert(0, str(ROOT / "tools"))
import docs_reference  # noqa: E402


def code_blocks(text: str) -> list[str]:
    """Fenced and indented blocks."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return fenced + [
        "\n".join(block.split("\n    ")) for block in re.findall(r"(?<=\n\n)    .*?(?=\n\n|\Z)", rest, re.DOTALL)
    ]


def lines_with(program: str, text: str) -> list[list[str]]:
    """The words of every call of ``program`` in the code blocks and in the text, from the program's name on."""
    calls = []
    for block in [*code_blocks(text), *re.findall(rf"`({program} [^`\n]+)`", text)]:
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(rf"(?:^|[\s;&(]){program}(?=\s)(.*)", line.partition(" #")[0])
            if found and "$(" not in line and "->" not in line:
                calls.append(shlex.split(re.split(r"[>;|]|&&|2>", found[1])[0]))
    return calls


def command_of(words: list[str]) -> click.Command:
    """The verb that a command line means, `convert` by default; for groups the verb inside."""
    command = cli.commands.get(words[0], cli.commands["convert"])
    return command.commands[words[1]] if isinstance(command, click.Group) else command


def options_of(command: click.Command) -> set[str]:
    known = {"-h", "--help"}
    for parameter in command.params:
        known |= {*parameter.opts, *parameter.secondary_opts}
    return known


def every_option() -> set[str]:
    found = {"--version"}
    for _, command in docs_reference.commands(cli, ""):
        found |= options_of(command)
    return found


@each_page
def test_generated_parts_are_not_stale(name):
    assert docs_reference.renewed(TEXTS[name]) == TEXTS[name], "python tools/docs_reference.py"


@each_page
def test_the_options_of_every_command_line_exist(name):
    for words in lines_with("dcgen-convert", TEXTS[name]):
        if words and words[0] not in ("SOURCE", "-h"):
            used = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
            assert used <= options_of(command_of(words)), f"dcgen-convert {' '.join(words)}"


OTHERS = {
    "--strict",
    "--pdb",
    "-n",
    "--dist",
    "-c",
    "-m",
    "-e",
    "--gpus-per-node",
    "--gpus-per-task",
    "--no-verify",
    "--backend",
    "--diffusion-load-format",
}  # pytest, pip, git, python, srun, sglang, vllm


@each_page
def test_options_in_the_text_exist(name):
    words = re.findall(r"`(--?[a-z][a-z-]*)", TEXTS[name])
    assert {word for word in words if word not in every_option() | OTHERS} == set()


SECTIONS = "data|latents|align_embedder|align_head|adapt|quantize|bundle|evaluate|watch|lora"
FILES = ("py", "safetensors", "yaml", "json", "jsonl", "md", "txt", "html", "png")


@each_page
def test_recipe_keys_in_code_exist(name):
    known = set(schema_keys())
    text = "\n".join([*code_blocks(TEXTS[name]), *re.findall(r"`([^`\n]+)`", TEXTS[name])])
    for key in re.findall(rf"(?<![\w./-])((?:{SECTIONS})(?:\.[a-z_*0-9]+)+)", text):
        general = re.sub(r"^lora\.", "adapt.phases.*.", re.sub(r"\.\d+\.", ".*.", key))
        assert key.endswith(FILES) or general in known or any(other.startswith(f"{general}.") for other in known), key


@each_page
def test_recipes_in_yaml_blocks_are_valid(name, tmp_path):
    for block in re.findall(r"^```yaml\n(.*?)^```", TEXTS[name], re.DOTALL | re.MULTILINE):
        document = yaml.safe_load(block)
        if "extends" in document:
            path = tmp_path / "mine.yaml"
            path.write_text(block)
            assert loading.load(str(path)).recipe.name == document["name"]


@each_page
def test_json_blocks_are_json(name):
    for block in re.findall(r"^```json\n(.*?)^```", TEXTS[name], re.DOTALL | re.MULTILINE):
        assert yaml.safe_load(block)  # JSON is YAML, and ... stands for anything


@each_page
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if not target.startswith(("http", "#")):
            page = ROOT / ("docs" if name not in ("README.md", "CONTRIBUTING.md") else "") / target.partition("#")[0]
            assert page.exists(), target


@each_page
def test_files_of_the_repository_exist(name):
    """Paths in code: from the root, or (`stages/latents.py`) from the package; a script's name alone, anywhere."""
    scripts = {path.name for part in ("dcgen_convert", "tests", "tools") for path in (ROOT / part).rglob("*.py")}
    assert set(re.findall(r"`(\w+\.py)`", TEXTS[name])) <= scripts
    for path in re.findall(r"`((?:[\w.]+/)+[\w.-]*)`", TEXTS[name]):
        if "NAME" not in path and ((ROOT / path.split("/")[0]).is_dir() or path.endswith(".py")):
            assert (ROOT / path).exists() or (ROOT / "dcgen_convert" / path).exists(), path


def test_the_lines_of_code_on_the_code_page_are_lines_of_the_package():
    lines = {line.strip() for path in (ROOT / "dcgen_convert").rglob("*.py") for line in path.read_text().splitlines()}
    shown = "".join(re.findall(r"^```python\n(.*?)^```", TEXTS["code.md"], re.DOTALL | re.MULTILINE)).splitlines()
    assert shown and {line.strip() for line in shown} <= lines


def templates() -> list[str]:
    """Every text of the package, with … where a value is filled in."""
    found = []
    for path in (ROOT / "dcgen_convert").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_message_of_the_errors_page_is_in_the_code():
    known = templates()
    rows = re.findall(r"^\| `([^`]+)` \|", TEXTS["errors.md"].partition("## Recipe and settings")[2], re.MULTILINE)
    assert len(rows) > 30
    for message in rows:
        pieces = [piece for piece in message.split("…") if piece.strip(" ;:?'")]
        assert any(all(piece in text for piece in pieces) for text in known), message


def test_the_readme_is_short_and_names_the_command_of_the_tests():
    assert len(TEXTS["README.md"].splitlines()) <= 120
    assert "pytest -n 2 --dist loadfile" in TEXTS["README.md"]
    assert "pytest -q -n 2 --dist loadfile" in (ROOT / ".ci" / "run").read_text()


def test_the_commands_of_the_start_page_run(converted, tmp_path):
    """All but the conversion itself, on what a short one has made; then `plan` and `doctor`."""
    name = "tiny-flux-tiny-dc-ae-f32-nvfp4"
    shutil.copytree(converted / "bundle", tmp_path / name, copy_function=os.link)
    shutil.copytree(converted / "run", tmp_path / "runs" / name)
    calls = lines_with("dcgen-convert", TEXTS["index.md"])
    lines = [words for words in calls if not {"--quantize", "RUN"} & set(words)]
    assert [words[0] for words in lines] == ["inspect", "verify", "sample", "report", "plan", "doctor"]
    for words in lines:
        done = run_cli(*words, cwd=tmp_path)
        assert done.returncode == 0, f"{words}: {done.stderr[-500:]}"
    assert list((tmp_path / "samples").glob("*.png")) and list((tmp_path / "runs").rglob("*.html"))


def test_the_steps_of_verify_are_those_of_the_code():
    """Names and words, in the order of the code: what `verify` says, and what the report says of it."""
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", TEXTS["bundle.md"].partition("## Check a bundle")[2], re.MULTILINE)
    code = (ROOT / "dcgen_convert" / "bundle" / "verify.py").read_text()
    named = re.findall(r'"(\w+)": lambda: checks\.', code) + re.findall(r'steps\["(\w+)"\] = lambda', code)
    assert [name for name, _ in rows] == [*CHECKS] == ["signature", *named, "picture"]
    assert all(text in shown for (_, shown), text in zip(rows, CHECKS.values(), strict=True))
