"""Damaged inputs: whatever is wrong with headers, indexes, configs or lengths, the answer is one typed error (or none),
and
nothing is written outside the run folder."""

import copy
import json
import os
import random
import shutil
import time
from functools import partial

import gguf
import pytest
import torch
from conftest import WEIGHTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dcgen_convert.bundle.inspection import inspect
from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import DcgenError, explain
from dcgen_convert.recipe import loading

from .test_single_file import peft_file, to_bfl, write_gguf

BASE = WEIGHTS / "tiny-flux"
FILE = BASE / "transformer" / "diffusion_pytorch_model.safetensors"
MANY = settings(max_examples=400, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
SECONDS = 5  # of processor time that one input may take


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Good inputs of every kind: a folder that mutations start from, and one that they are written to."""
    folder = tmp_path_factory.mktemp("fuzz")
    weights = load_file(FILE)
    save_file(to_bfl(weights), folder / "bfl.safetensors")
    save_file({name: value.to(torch.float8_e4m3fn) for name, value in weights.items()}, folder / "fp8.safetensors")
    peft_file(folder / "lora.safetensors", weights, alpha=True)
    write_gguf(folder / "model.gguf", to_bfl(weights), [gguf.GGMLQuantizationType.Q8_0])
    shutil.copytree(BASE, folder / "base")
    shutil.copytree(BASE / "transformer", folder / "alone")
    return folder


def tried(action, place, watched=()):
    """Run ``action``: it may fail with a typed error only, soon, and write only under ``place``/run."""
    before = listing(place, watched)
    started = time.process_time()
    try:
        action()
    except DcgenError as error:
        assert error.message and "\n" not in error.message.strip() and error.exit_code != 70, error.message
    except OSError as error:  # the command's own table knows these
        assert explain(error).exit_code != 70
    assert time.process_time() - started < SECONDS
    assert listing(place, watched) == before


def listing(place, watched):
    files = [path for folder in (place, *watched) for path in folder.rglob("*")]
    return sorted(str(path) for path in files if not path.is_relative_to(place / "run"))


def everything(path, place):
    """What the command does with a path before and while it imports it, with the base at hand."""
    inspect(path)
    loading.load(str(path), flags={"base": str(BASE)})
    source = load_source("x", str(path), base=str(BASE), home=place / "run" / "import")
    source.fingerprint  # noqa: B018 (reads the files)


# Values that turn up where a number, a name or a list is expected.
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.just(2**63), st.just(-(2**70)), st.floats(), st.text(max_size=6),
    st.just("../../x"),
    st.just([]), st.just({}), st.lists(st.integers(-2, 9), max_size=4), st.just({"a": {"b": []}}), st.just("F32"),
    st.just("U4"),
)  # fmt: skip


def mutated(data, document):
    """``document`` with a few of its values replaced, removed, renamed or doubled, anywhere in the tree."""
    document = json.loads(json.dumps(document))
    for _ in range(data.draw(st.integers(1, 3))):
        node, parent, key = document, None, None
        while isinstance(node, (dict, list)) and node and (parent is None or data.draw(st.integers(0, 3))):
            parent = node
            key = (
                data.draw(st.sampled_from(sorted(node)))
                if isinstance(node, dict)
                else data.draw(st.integers(0, len(node) - 1))
            )
            node = node[key]
        if parent is None:
            return copy.deepcopy(data.draw(ODD))
        change = data.draw(st.sampled_from(["replace", "remove", "rename"]))
        if change == "replace":
            parent[key] = copy.deepcopy(data.draw(ODD))
        elif change == "remove" or isinstance(parent, list):
            del parent[key]
        else:
            names = [str(key) + "x", str(key)[:-1], "", "../../x", "a.b", "double_blocks.999999.x.weight"]
            parent[data.draw(st.sampled_from(names))] = parent.pop(key)
    return document


def with_header(content, header):
    length = int.from_bytes(content[:8], "little")
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def header_of(content):
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


@MANY
@given(st.data(), st.sampled_from(["bfl", "fp8"]))
def test_headers(place, data, kind):
    content = (place / f"{kind}.safetensors").read_bytes()
    path = place / "run" / "mutated.safetensors"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(with_header(content, mutated(data, header_of(content))))
    tried(lambda: everything(path, place), place)


def damaged(data, content):
    """Bytes cut, flipped, added or overwritten, mostly in the first kilobytes."""
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        span = min(len(content), data.draw(st.sampled_from([8, 64, 4096, len(content) or 1])))
        at = data.draw(st.integers(0, max(0, span - 1)))
        change = data.draw(st.sampled_from(["cut", "flip", "insert", "fill"]))
        if change == "cut":
            del content[at:]
        elif change == "flip" and at < len(content):
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif change == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        else:
            content[at : at + 8] = data.draw(st.sampled_from([b"\xff" * 8, bytes(8), b"\x00" * 7 + b"\x80"]))
    return bytes(content)


@MANY
@given(st.data(), st.sampled_from(["bfl.safetensors", "fp8.safetensors", "model.gguf"]))
def test_bytes(place, data, name):
    path = place / "run" / f"mutated-{name}"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(damaged(data, (place / name).read_bytes()))
    tried(lambda: everything(path, place), place)


@MANY
@given(st.data())
def test_gguf_headers(place, data):
    """Damage within the key-value pairs and tensor infos, where every number is a length, a type or an offset."""
    content = bytearray((place / "model.gguf").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(4, 7000))
        content[at : at + 4] = data.draw(
            st.binary(min_size=4, max_size=4) | st.sampled_from([b"\xff" * 4, b"\x09\0\0\0", bytes(4)])
        )
    path = place / "run" / "mutated.gguf"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    tried(lambda: everything(path, place), place)


@MANY
@given(st.data(), st.booleans())
def test_loras(place, data, in_header):
    content = (place / "lora.safetensors").read_bytes()
    header = header_of(content)
    header["__metadata__"] = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2}),
    }
    if in_header and data.draw(st.booleans()):
        inner = mutated(data, {"transformer.r": 4, "transformer.lora_alpha": 2, "transformer.rank_pattern": {}})
        header["__metadata__"]["lora_adapter_metadata"] = json.dumps(inner)
    elif in_header:
        header = mutated(data, header)
    path = place / "run" / "mutated-lora.safetensors"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(with_header(content, header) if in_header else damaged(data, content))

    def use():
        inspect(path)
        source = load_source("x", str(BASE), loras=[f"{path}:0.5"], home=place / "run" / "import")
        for lora in source.loras:
            lora.updates()

    tried(use, place)


@MANY
@given(st.data(), st.sampled_from(["config", "index", "model_index", "vae", "alone"]))
def test_configs_and_indexes(place, data, which):
    folder = place / "run" / "source"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place / ("alone" if which == "alone" else "base"), folder, copy_function=os.link)
    if which == "index":
        names = header_of(FILE.read_bytes())
        document = {
            "metadata": {"total_size": 1},
            "weight_map": {name: FILE.name for name in names if name != "__metadata__"},
        }
        file = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    else:
        places = {"config": "transformer/config.json", "model_index": "model_index.json", "vae": "vae/config.json"}
        file = folder / places.get(which, "config.json")
        document = json.loads(file.read_text())
        file.unlink()
    text = json.dumps(mutated(data, document))
    file.write_bytes(damaged(data, text.encode()) if data.draw(st.integers(0, 4)) == 0 else text.encode())

    def use():
        inspect(folder)
        loading.load(str(folder), flags={"base": str(BASE)} if which == "alone" else {})
        source = load_source(
            "x", str(folder), base=str(BASE) if which == "alone" else None, home=place / "run" / "import"
        )
        source.fingerprint  # noqa: B018 (reads the files)

    tried(use, place, [place / "base", place / "alone"])


def test_what_is_imported_stays_in_the_run_folder(place):
    """The damage that a header does not show: files with random bytes in their weights."""
    chance = random.Random(0)
    content = (place / "bfl.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for _ in range(6):
        broken = bytearray(content)
        at = chance.randrange(start, len(content) - 64)
        broken[at : at + 64] = chance.randbytes(64)
        path = place / "run" / "weights.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(broken)
        source = load_source("x", str(path), base=str(BASE), home=place / "run" / "import")
        tried(partial(source.lay_out, NULL), place, [place / "base"])
