"""`convert` is meant when the first word is a source or an option; any other word is refused with the nearest one."""

import json

import pytest


def test_an_option_may_come_first(cli):
    done = cli("--ae", "dc-ae-f64", "--dry-run", "--json", "tiny-flux")
    doc = json.loads(done.stdout)
    assert done.returncode == 0
    assert (doc["schema"], doc["autoencoder"]["name"]) == ("dcgen.plan/2", "dc-ae-f64")


def test_a_source_may_come_first_and_equals_the_canonical_form(cli):
    short = cli("tiny-flux", "--dry-run", "--json", "--ae", "dc-ae-f64", "--quantize", "nvfp4")
    long = cli("convert", "tiny-flux", "--ae", "dc-ae-f64", "--quantize", "nvfp4", "--json", "--dry-run")
    assert json.loads(short.stdout) == json.loads(long.stdout)


def test_dry_run_is_plan(cli):
    options = ("tiny-flux", "--set", "lora.rank=64", "--json")
    assert json.loads(cli("convert", *options, "--dry-run").stdout) == json.loads(cli("plan", *options).stdout)


def test_help_after_a_source_is_the_help_of_convert(cli):
    done = cli("flux-krea", "-h")
    assert done.returncode == 0
    assert done.stdout == cli("convert", "--help").stdout
    assert "--until" in done.stdout


@pytest.mark.parametrize(
    "word, meant", [("qantize", "quantize"), ("flux-kreaa", "flux-krea"), ("tiny-flx", "tiny-flux")]
)
def test_a_wrong_word_gets_the_nearest_one(cli, word, meant):
    done = cli(word)
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"Did you mean '{meant}'?" in done.stderr


@pytest.mark.parametrize("word", ["./nothing-here", "missing.safetensors", "missing.yaml"])
def test_paths_are_sources_even_when_they_do_not_exist(cli, word):
    done = cli(word)
    assert done.returncode == 2
    assert word in done.stderr
    assert "neither a verb" not in done.stderr


def test_a_hub_id_is_a_source(cli):
    done = cli("somebody/some-model", "--offline")
    assert done.returncode == 3
    assert "somebody/some-model" in done.stderr


def test_no_arguments_show_the_verbs(cli):
    done = cli()
    text = done.stdout + done.stderr
    for verb in (
        "convert",
        "plan",
        "quantize",
        "resume",
        "inspect",
        "verify",
        "sample",
        "report",
        "push",
        "recipes",
        "doctor",
    ):
        assert f"\n  {verb} " in text
