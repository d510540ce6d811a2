"""`--track`: what the trackers' own files hold is what the console was given; a missing package or account is one
sentence.
"""

import importlib.util
import json
import struct
import time

import pytest
import wandb
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from dcgen_convert.core import track
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.errors import InputError


def test_tensorboard_gets_curves_pictures_and_the_recipe(tmp_path):
    console = Console("quiet")
    with track.tracking(console, "tensorboard", tmp_path, {"adapt.ema": 0.99}):
        for step in range(3):
            console.scalars("adapt", step, {"loss": 1.0 / (step + 1), "lr": 1e-4})
        console.picture("adapt/samples", 2, Image.new("RGB", (8, 6), (255, 0, 0)))
    assert console.tracker is None
    events = EventAccumulator(str(tmp_path / track.FOLDER))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("adapt/loss")] == [
        (step, pytest.approx(1.0 / (step + 1))) for step in range(3)
    ]
    (picture,) = events.Images("adapt/samples")
    assert (picture.width, picture.height, picture.step) == (8, 6, 2)
    assert b"adapt.ema: 0.99" in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]


@pytest.fixture
def own_wandb(tmp_path, monkeypatch):
    """W&B as on a machine where nobody has logged in: no key, no settings, its folders in ``tmp_path``."""
    wandb.teardown()
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    yield
    wandb.teardown()


def records(path) -> list[Record]:
    """What an offline run wrote, in order: LevelDB's log format, blocks of 32 KiB after a file header of 7 bytes."""
    data, at, whole, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)  # checksum, bytes, 1 whole | 2 first | 3 middle | 4 last
        whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):
            found.append(Record.FromString(whole))
            whole = b""
    return found


def test_wandb_gets_curves_pictures_and_the_recipe(tmp_path, monkeypatch, own_wandb):
    monkeypatch.setenv("WANDB_MODE", "offline")
    console, run = Console("quiet"), tmp_path / "new" / "run"
    with track.tracking(console, "wandb", run, {"adapt.ema": 0.99}):
        for label, steps in (("align head", 2), ("adapt", 3)):  # each counts its own steps
            for step in range(steps):
                console.scalars(label, step, {"loss": 1.0 / (step + 1), "lr": 1e-4})
        console.picture("adapt/samples", 2, Image.new("RGB", (8, 6), (255, 0, 0)))
    assert console.tracker is None
    wandb.teardown()
    (path,) = run.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60  # W&B's own process writes the file to its end after the run has finished
    while not [record for record in records(path) if record.HasField("exit")] and time.monotonic() < deadline:
        time.sleep(0.05)
    written = records(path)
    (start,) = (record.run for record in written if record.HasField("run"))
    assert (start.project, start.display_name) == ("dcgen-convert", "run")
    assert {update.key: update.value_json for update in start.config.update}["adapt.ema"] == "0.99"
    rows = [
        {"/".join(item.nested_key): json.loads(item.value_json) for item in r.history.item}
        for r in written
        if r.HasField("history")
    ]
    for label, steps in (("align head", 2), ("adapt", 3)):
        curve = [
            (row[f"{label}/step"], row[f"{label}/loss"], row[f"{label}/lr"]) for row in rows if f"{label}/loss" in row
        ]
        assert curve == [(step, 1.0 / (step + 1), 1e-4) for step in range(steps)]
    assert {(r.metric.glob_name, r.metric.step_metric) for r in written if r.HasField("metric")} == {
        (f"{label}/*", f"{label}/step") for label in ("align head", "adapt", "adapt/samples")
    }
    (picture,) = path.parent.rglob("*.png")
    assert Image.open(picture).size == (8, 6) and Image.open(picture).getpixel((3, 3)) == (255, 0, 0)
    assert [r.exit.exit_code for r in written if r.HasField("exit")] == [0]


def test_wandb_without_an_account_is_one_sentence(tmp_path, own_wandb):
    reason = "Weights & Biases does not start: No API key"
    with pytest.raises(InputError, match=reason) as caught, track.tracking(NULL, "wandb", tmp_path, {}):
        pass
    assert "wandb login" in caught.value.hint and "WANDB_MODE=offline" in caught.value.hint


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_with_its_cure(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with (
        pytest.raises(InputError, match=f"--track {kind} needs the package {kind}") as caught,
        track.tracking(NULL, kind, tmp_path, {}),
    ):
        pass
    assert caught.value.hint == f"pip install 'dcgen-convert[{kind}]'"
    assert not list(tmp_path.iterdir())


def test_without_a_tracker_nothing_is_written(tmp_path):
    with track.tracking(NULL, None, tmp_path, {}):
        NULL.scalars("adapt", 0, {"loss": 1.0})
    assert not list(tmp_path.iterdir())
