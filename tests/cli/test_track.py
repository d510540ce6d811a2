"""`--track`: what TensorBoard reads back is what the console was given; a missing package is one sentence."""

import importlib.util

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dcgen_convert import track
from dcgen_convert.console import NULL, Console
from dcgen_convert.errors import InputError


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


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_with_its_cure(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"--track {kind} needs the package {kind}") as caught, track.tracking(NULL, kind, tmp_path, {}):
        pass
    assert caught.value.hint == f"pip install 'dcgen-convert[{kind}]'"
    assert not list(tmp_path.iterdir())


def test_without_a_tracker_nothing_is_written(tmp_path):
    with track.tracking(NULL, None, tmp_path, {}):
        NULL.scalars("adapt", 0, {"loss": 1.0})
    assert not list(tmp_path.iterdir())
