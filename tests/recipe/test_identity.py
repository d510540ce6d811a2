"""What a source is gets asked once: `plan SOURCE` opens each file of the source once, and nobody changes what was
read.
"""

import copy
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from conftest import WEIGHTS

from dcgen_convert.core.errors import AccessError, InputError
from dcgen_convert.families import catalog
from dcgen_convert.planning.plan import plan
from dcgen_convert.recipe import loading, shelf
from dcgen_convert.recipe.identity import Identity

FLUX = WEIGHTS / "tiny-flux"
FILE = FLUX / "transformer" / "diffusion_pytorch_model.safetensors"
SMALL = ["--ae", "tiny-dc-ae-f32", "--recipe", "tiny-flux", "--json"]
PROBE = """
import json, sys
from dcgen_convert.cli.app import main
place, opened = sys.argv[1], []

def note(event, values):
    if event == "open" and str(values[0]).startswith(place):
        opened.append(str(values[0])[len(place) + 1:])

sys.addaudithook(note)
try:
    main(sys.argv[2:])
finally:
    print(json.dumps(opened), file=sys.stderr)
"""


def opened(place, *arguments) -> Counter:
    """How often `dcgen-convert ARGUMENTS` opens each file under ``place``."""
    command = [sys.executable, "-c", PROBE, str(place), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "feasible"
    return Counter(json.loads(done.stderr.splitlines()[-1]))


def test_plan_opens_each_file_of_a_folder_once():
    found = opened(FLUX, "plan", FLUX, *SMALL)
    names = ("transformer/config.json", "vae/config.json", "model_index.json", "scheduler/scheduler_config.json")
    counted = ("vae/diffusion_pytorch_model", "text_encoder/model", "text_encoder_2/model")  # their headers
    files = (*names, "README.md", *(f"{name}.safetensors" for name in counted))  # README.md states the licence
    assert found == dict.fromkeys(files, 1)


def test_plan_opens_a_single_file_and_each_file_of_its_base_once():
    found = opened(FLUX, "plan", FILE, "--base", FLUX, *SMALL)
    assert found["transformer/diffusion_pytorch_model.safetensors"] == 1
    assert found["transformer/config.json"] == 1
    assert set(found.values()) == {1}


@pytest.mark.parametrize("name", [name for name in shelf.names() if "/" not in name and "long" not in name])
def test_a_plan_leaves_the_config_as_it_was(name):
    resolved = loading.load(name, complete=False)
    before = copy.deepcopy(resolved.identity.config)
    plan(resolved)
    assert resolved.identity.config == before


def test_the_source_of_a_changed_recipe_is_asked_anew():
    resolved = loading.load("tiny-flux")
    other = replace(resolved, recipe=resolved.recipe.model_copy(update={"source": "tiny-dit"}))
    assert (resolved.identity.family.name, other.identity.family.name) == ("flux", "dit")


def test_without_the_network_a_hub_id_is_left_to_later(monkeypatch, tmp_path):
    """Neither its config nor its autoencoder is here: no size can be checked, and that is no error yet."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    resolved = loading.load("somebody/some-model", recipe="tiny-flux")
    assert (resolved.identity.where, resolved.identity.hub_id) == ("somebody/some-model", "somebody/some-model")
    with pytest.raises(AccessError, match="not in the cache"):
        _ = resolved.identity.config


def test_where_a_source_lies(tmp_path):
    shipped, krea = Identity("tiny-flux"), Identity("flux-krea")
    installed = catalog.find_source("tiny-flux").folder  # of the package, wherever it is installed
    assert (shipped.where, shipped.hub_id, shipped.is_alone) == (str(installed), None, False)
    assert krea.where == krea.hub_id == "black-forest-labs/FLUX.1-Krea-dev"
    assert (Identity(str(FLUX)).path, Identity(str(FILE)).is_alone) == (FLUX, True)
    assert Identity(str(FILE), base="flux-krea").pipeline.hub_id == krea.hub_id
    with pytest.raises(InputError, match="no config found"):
        _ = Identity(str(tmp_path)).config
