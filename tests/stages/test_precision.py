"""In which precision an autoencoder works: what a round trip of the first pictures allows, decided once."""

import pytest
from conftest import WEIGHTS

from dcgen_convert.core.console import Console
from dcgen_convert.core.files import read_json
from dcgen_convert.core.journal import Stage
from dcgen_convert.data.images import Picture, to_image
from dcgen_convert.networks import autoencoders
from dcgen_convert.stages import precision
from dcgen_convert.tiny import world


class Recipe:
    dtype, aligned_set = "bf16", 0


class Job:
    """What `decide` reads of a job."""

    recipe, console, fps = Recipe(), Console(), 0

    def __init__(self, run):
        self.run = type("Run", (), {"path": run})()


@pytest.fixture
def tried(tmp_path, monkeypatch):
    """(job, stage, pictures, views): two pictures of the tiny world, on a device that has bfloat16."""
    (tmp_path / "latents").mkdir()
    pictures = []
    for number, pixels in enumerate(world.draw(world.sample_labels(2, seed=5), seed=5)):
        to_image(pixels).save(tmp_path / f"{number}.png")
        pictures.append(Picture(tmp_path / f"{number}.png", ""))
    monkeypatch.setattr(precision, "has_bfloat16", lambda _: True)
    folders = {"base": WEIGHTS / "tiny-flux" / "vae", "target": WEIGHTS / "tiny-dc-ae-f32"}
    load = precision.load
    monkeypatch.setattr(
        precision,
        "load",
        lambda job, name, dtype=None: autoencoders.load(folders[name], dtype) if dtype else load(job, name),
    )
    return Job(tmp_path), Stage(tmp_path / "latents"), pictures, dict.fromkeys(folders, ((128, 128), [0, 1]))


@pytest.mark.parametrize(("bar", "dtype"), [(30.0, "bf16"), (90.0, "fp32")])
def test_bfloat16_where_the_round_trip_allows_it(tried, monkeypatch, capsys, bar, dtype):
    job, stage, pictures, views = tried
    monkeypatch.setattr(precision, "SAFE_DB", bar)
    precision.decide(job, stage, pictures, views)
    record = read_json(job.run.path / "latents" / precision.PRECISION)
    assert [record[name]["dtype"] for name in views] == [dtype, dtype]
    assert all(30 < record[name]["psnr_db"] < 90 for name in views), record
    assert stage.metrics["psnr_bf16_target_db"] == record["target"]["psnr_db"]
    assert f"{record['target']['psnr_db']:g} dB from one in float32" in capsys.readouterr().err.replace("\n", " ")
    monkeypatch.setattr(precision, "_measured", lambda *_: pytest.fail("measured again"))
    precision.decide(job, stage, pictures, views)
    assert precision.decided(job, "base").dtype == dtype


def test_float32_where_nothing_was_measured(tried, monkeypatch):
    job, stage, pictures, views = tried
    monkeypatch.setattr(precision, "has_bfloat16", lambda _: False)
    assert precision.decided(job, "base") == precision.Precision("fp32", None)  # a run of an earlier version
    precision.decide(job, stage, pictures, views)
    assert precision.decided(job, "target") == precision.Precision("fp32", None)
    assert stage.metrics == {"precision_base": "fp32", "precision_target": "fp32"}
