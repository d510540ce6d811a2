"""Each option says its default; the options of the contract are all there."""

from pathlib import Path

import click
import click.testing
import pytest

from dcgen_convert.cli.app import cli as group
from dcgen_convert.core.errors import explain


def commands(command: click.Command, path: str = ""):
    yield path, command
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from commands(inner, f"{path} {name}".strip())


@pytest.mark.parametrize("path, command", [item for item in commands(group) if item[0]])
def test_every_help_line_gives_its_default(path, command):
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name not in ("help", "version"):
            assert parameter.help, f"{path} {parameter.opts}"
            stated = "Default: " in parameter.help or parameter.show_default or parameter.required
            assert stated, f"{path} {parameter.opts}: no default in {parameter.help!r}"


@pytest.mark.parametrize("path, command", [item for item in commands(group) if isinstance(item[1], click.Group)])
def test_the_list_of_verbs_has_whole_sentences(path, command):
    shown = click.testing.CliRunner().invoke(command, ["--help"], terminal_width=80).output
    lines = shown.partition("Commands:")[2].strip().splitlines()
    assert len(lines) == len(command.commands)
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)


def test_no_option_shows_the_name_of_a_type_for_its_value():
    for path, command in commands(group):
        shown = command.get_help(click.Context(command, info_name=path))
        assert "RANGE" not in shown and "INTEGER" not in shown, path


def test_the_reference_of_run_dir_is_that_of_each_verb():
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    for verb in ("convert", "rehearse", "doctor"):
        part = page.partition(f"\n### {verb}\n")[2].partition("\n### ")[0]
        option = next(option for option in group.commands[verb].params if option.name == "run_dir")
        assert option.help in part, verb


def test_the_contract_of_convert():
    wanted = {
        "--ae", "-o", "--output", "--run-dir", "--recipe", "--set", "--quantize", "--merge-lora", "--no-merge-lora",
        "--data", "--prompts", "--resolution", "--dtype", "--seed", "--gpus", "--hostfile", "--zero", "--offload",
        "--revision", "--offline", "--push-to", "--private", "--from", "--until", "--force", "-y", "--yes", "--dry-run",
        "--json", "--events", "--log-file", "-q", "-v",
    }  # fmt: skip
    options = [parameter for parameter in group.commands["convert"].params if isinstance(parameter, click.Option)]
    known = {name for option in options for name in (*option.opts, *option.secondary_opts)}
    assert wanted <= known


TEXTS = [
    (path, command, parameter)
    for path, command in commands(group)
    for parameter in command.params
    if isinstance(parameter.type, click.Path | click.types.StringParamType)
]


def given(parameter: click.Parameter, value: str) -> list[str]:
    return [parameter.opts[0], value] if isinstance(parameter, click.Option) else [value]


@pytest.mark.parametrize("empty", ["", " "])
@pytest.mark.parametrize(("path", "command", "parameter"), TEXTS, ids=[f"{p} {q.name}" for p, _, q in TEXTS])
def test_an_empty_text_is_refused_by_every_option_and_argument(path, command, parameter, empty):
    """--hostfile "$HOSTS" with a variable that is not set ran on this host alone. A prompt may be empty."""
    wanted = [one for one in command.params if one is parameter or one.required]
    arguments = [word for one in wanted for word in given(one, empty if one is parameter else ".")]
    if (path, parameter.name) == ("sample", "prompts"):
        assert command.make_context(path, arguments).params["prompts"] == (empty,)
        return
    with pytest.raises(click.BadParameter, match="it is empty") as caught:
        command.make_context(path, arguments)
    assert explain(caught.value).exit_code == 2
