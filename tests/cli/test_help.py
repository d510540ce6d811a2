"""Each option says its default; the options of the contract are all there."""

import click
import pytest

from dcgen_convert.cli.app import cli as group


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
