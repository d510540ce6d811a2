"""The verb `benchmark`: it times the calls of the stock pipelines, and says what it compared."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pretend_device
import pytest
import torch
from bundle.conftest import autoencoder_dc
from conftest import run_cli
from families.tiny_models import TINY
from networks.test_random_source import CUT, small

import dcgen_convert
from dcgen_convert.api import benchmarking
from dcgen_convert.api.order import without_data
from dcgen_convert.bundle.verify import verify
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import InputError, ResourceError
from dcgen_convert.core.files import write_json
from dcgen_convert.evaluation.report import write_report
from dcgen_convert.evaluation.speed import rows as named_rows
from dcgen_convert.families import components, deep_autoencoders
from dcgen_convert.judging import pair as pairs
from dcgen_convert.judging import recording, speed
from dcgen_convert.judging.timing import Stopwatch
from dcgen_convert.networks import at_once

KEYS = (  # frozen: scripts read them
    "schema status source family base models random steps guidance dtype attention compiled device gpu torch diffusers "
    "notes sizes"
)
ROWS = ["text", "step", "decode", "picture"]
QUICK = 0.01  # seconds of a comparison: one round after one that warms up


def bench(pair: pairs.ModelPair, device: str = "cpu") -> speed.Bench:
    return speed.Bench(pair, Stopwatch(torch.device(device), QUICK), NULL)


def seen(
    model: pairs.Model, settings: recording.DrawSettings, side: int | tuple[int, int]
) -> tuple[list, list[int], list]:
    """What a stock drawing really gives its network and its decoder: keywords of each pass, tokens, latents."""
    passes, tokens, latents = [], [], []
    network, vae = model.network, model.pipeline.vae
    embedder = network.get_submodule(model.family.embedder)
    decode = vae.decode
    hooks = [
        network.register_forward_pre_hook(lambda _, args, kwargs: passes.append((args, kwargs)), with_kwargs=True),
        embedder.register_forward_hook(lambda _, args, output: tokens.append(output.shape[1])),
    ]
    vae.decode = lambda z, *args, **kwargs: latents.append(z) or decode(z, *args, **kwargs)
    size = side if isinstance(side, tuple) else (side, side)
    recording.draw(model.pipeline, model.family, size, settings)
    del vae.decode
    for hook in hooks:
        hook.remove()
    return passes, tokens, latents


@pytest.mark.parametrize("name", ["base", "converted"])
def test_what_is_timed_is_what_the_stock_pipeline_asks_for(pair, name):
    model, found = pair.models[name], bench(pair).record(name, 128)
    passes, tokens, latents = seen(model, bench(pair).settings, 128)
    assert (found.passes, found.steps, len(found.step)) == (len(passes), 3, 1)
    assert {*tokens} == {model.grid.tokens(128)}
    (args, kwargs), call = passes[0], found.step[0]
    assert call.function is model.network and not args and call.kwargs.keys() == kwargs.keys()
    torch.testing.assert_close(call.kwargs, kwargs, atol=0, rtol=0)
    assert found.decode.args[0].shape == latents[0].shape
    assert found.decode().sample.shape == (1, 3, 128, 128) if hasattr(found.decode(), "sample") else found.decode()
    (encode,) = found.text
    prompt = encode()[0]
    torch.testing.assert_close(prompt, kwargs["encoder_hidden_states"], atol=0, rtol=0)
    assert model.pipeline.encode_prompt.__func__ is type(model.pipeline).encode_prompt  # nothing is left replaced
    assert "forward" not in vars(model.network) and "decode" not in vars(model.pipeline.vae)


FAMILIES = ("qwenimage", "auraflow", "unet", "flux-kontext")  # two passes; a config of its own; no transformer; edits


def pytest_generate_tests(metafunc):
    """A commit tries FAMILIES; `--every` all but the tiny DiT, which draws 16 px only."""
    if "family" in metafunc.fixturenames:
        metafunc.parametrize(
            "family", [name for name in TINY if name != "dit"] if metafunc.config.getoption("--every") else FAMILIES
        )


def test_every_family_is_converted_in_memory_and_asked_as_its_pipeline_asks(family, tmp_path):
    entry = TINY[family]
    entry.build(tmp_path / "source")
    autoencoder_dc(32, 128).save_pretrained(tmp_path / "ae")
    settings = {"ae": str(tmp_path / "ae"), "resolution": entry.side}
    pair = pairs.of_source(without_data(tmp_path / "source", settings), torch.float32, entry.side, random=False)
    one = bench(replace(pair, steps=2, length=entry.length, guidance=2.5))
    speed.require_sides(pair, [entry.side])
    for name, model in pair.models.items():
        drawing, (passes, _, latents) = one.record(name, entry.side), seen(model, one.settings, entry.side)
        assert drawing.passes == len(passes) == 2 * len(drawing.step)
        tensors = {key: value for key, value in passes[0][1].items() if isinstance(value, torch.Tensor)}
        mine = {key: drawing.step[0].kwargs[key] for key in tensors}
        torch.testing.assert_close(mine, tensors, atol=0, rtol=0)
        assert drawing.decode.args[0].shape == latents[0].shape
        drawing.encode_text(), drawing.one_step(), drawing.decode()


def test_a_model_that_edits_is_timed_with_a_picture(tmp_path):
    """The network sees picture and reference; the encoder is a part of the whole picture."""
    TINY["flux-kontext"].build(tmp_path / "source")
    autoencoder_dc(32, 128).save_pretrained(tmp_path / "ae")
    settings = {"ae": str(tmp_path / "ae"), "resolution": 64}
    pair = pairs.of_source(without_data(tmp_path / "source", settings), torch.float32, 64, random=False)
    pair = replace(pair, steps=2, length=16)
    for name, model in pair.models.items():
        encoded, encode = [], model.pipeline.vae.encode
        model.pipeline.vae.encode = lambda x, *args, _=(encoded, encode), **kwargs: _[0].append(x) or _[1](x, *args)
        _, tokens, _ = seen(model, bench(pair).settings, 64)
        del model.pipeline.vae.encode
        drawing = bench(pair).record(name, 64)
        assert {*tokens} == {model.tokens(64)} == {2 * model.grid.tokens(64)}
        ((call,), (pixels,)) = drawing.references, encoded
        assert pixels.shape == (1, 3, 64, 64)
        torch.testing.assert_close(call.args[0], pixels, atol=0, rtol=0)
        assert call().latent_dist.mode().shape[2:] == drawing.decode.args[0].shape[2:]
        assert "encode" not in vars(model.pipeline.vae)
    (row,) = speed.measure(pair, [64], Stopwatch(torch.device("cpu"), QUICK), NULL)
    rows = row["rows"]
    assert list(rows) == ["text", "encode", *ROWS[1:]]
    assert row["tokens"] == {"base": 2 * 256, "converted": 2 * 4, "ratio": 64.0}
    for name in pair.models:
        once = sum(rows[what][name]["seconds"] for what in ("text", "encode", "decode"))
        assert rows["picture"][name]["seconds"] == pytest.approx(once + 2 * rows["step"][name]["seconds"])
    kept = {"sizes": [row], "device": "CPU", "dtype": "float32", "steps": 2}
    assert [what.partition(": ")[2] for what, _ in named_rows(kept)] == [
        "encoder",
        "one step",
        "decoder",
        "whole picture (2 steps)",
    ]


def test_only_what_is_new_has_weights_of_its_own(pair):
    base, new = (dict(pair.models[name].network.named_parameters()) for name in ("base", "converted"))
    own = {name.rpartition(".")[0] for name, value in new.items() if value is not base[name]}
    assert own == {"x_embedder", "proj_out"}
    assert speed.weights([pair.models["base"].network, pair.models["converted"].network]) < 1.2 * speed.weights(
        [pair.models["base"].network]
    )
    tokens = bench(pair)._tokens(128)
    assert tokens == {"base": 64, "converted": 16, "ratio": 4.0}


def test_the_rows_and_how_they_add_up(pair):
    (row,) = speed.measure(pair, [128], Stopwatch(torch.device("cpu"), QUICK), NULL)
    rows = row["rows"]
    assert list(rows) == ROWS and row["passes"] == {"base": 3, "converted": 3}
    for name in ("base", "converted"):
        whole = rows["text"][name]["seconds"] + 3 * rows["step"][name]["seconds"] + rows["decode"][name]["seconds"]
        assert rows["picture"][name] == {
            "seconds": pytest.approx(whole), "batch": 1, "basis": "sum of its parts",
        }  # fmt: skip
        assert row["pictures_per_minute"][name] == pytest.approx(60 / whole)
        assert rows["step"][name]["peak_bytes"] >= speed.weights([pair.models[name].network])
    assert rows["text"]["base"] is rows["text"]["converted"]
    for what in ROWS[1:]:
        expected = rows[what]["base"]["seconds"] / rows[what]["converted"]["seconds"]
        assert row["ratios"][what] == {"converted": pytest.approx(expected)}


def test_a_whole_picture_is_measured_where_the_time_allows_it(pair):
    watch = Stopwatch(torch.device("cpu"), 1e9, iter(range(10**9)).__next__)  # each look at the clock is a second
    drawn = []
    one = bench(pair)
    rows = {what: {name: {"seconds": 1.0} for name in pair.models} for what in ("text", "step", "decode")}
    drawings = {name: one.record(name, 128) for name in pair.models}
    for model in pair.models.values():
        model.network.register_forward_hook(lambda *_: drawn.append(1))
    found = speed.Bench(pair, replace(watch, budget=30.0), NULL)._pictures(128, drawings, rows)
    assert found["base"]["basis"] == "measured" and found["base"]["rounds"] >= 1
    passes = (found["base"]["rounds"] + found["base"]["warm_up"]) * 3 * 2
    assert len(drawn) == passes
    for model in pair.models.values():
        model.network._forward_hooks.clear()


def test_the_work_stays_on_the_device(pair, monkeypatch):
    """No tensor of the CPU meets one of the device, in any part of a picture; the numbers are those of the CPU."""
    here = bench(pair).record("converted", 128)
    goal = here.step[0]()[0]
    with pretend_device.ready() as device:
        monkeypatch.setattr(torch.get_device_module(device), "synchronize", lambda: None, raising=False)
        one = bench(pair, device)
        drawing = one.record("converted", 128)
        there = drawing.step[0]()[0]
        assert there.device.type == device
        drawing.encode_text()
        drawing.decode()
        torch.testing.assert_close(there.cpu(), goal, atol=2e-5, rtol=2e-5)
        one.bring([])
        for model in pair.models.values():
            for part in speed._parts(model):
                part.to("cpu")


def test_the_largest_batch_is_halved_until_it_fits(pair, monkeypatch):
    one, tried = bench(pair), []
    record = speed.Bench.record

    def short(self, name, side, batch=1):
        tried.append(batch)
        if batch > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return record(self, name, side, batch)

    monkeypatch.setattr(speed.Bench, "record", short)
    found = one._that_fits("base", 128, 11)
    assert tried == [11, 5, 2] and found.batch == 2
    assert found.step[0].kwargs["hidden_states"].shape[0] == 2


@pytest.fixture
def tiny_sizes(monkeypatch):
    """The catalogue's models with small parts."""
    layout, config = components.layout_of, deep_autoencoders.config_of
    monkeypatch.setattr(components, "layout_of", lambda entry: small(layout(entry)))
    monkeypatch.setattr(deep_autoencoders, "config_of", lambda entry: {**config(entry), **CUT["AutoencoderDC"]})


@pytest.mark.parametrize(
    ("name", "ae", "tokens", "step"),
    [
        ("flux-krea", "dc-ae-f32", (64, 16), 1),
        ("sana-1.6b", "dc-ae-f32-sana", (16, 16), 1),  # guidance in one pass of twice the batch
        ("dit-xl-256", "dc-ae-f32", (16, 4), 1),
    ],
)
def test_random_weights_need_no_download(tiny_sizes, name, ae, tokens, step):
    side = 64 if name.startswith("dit") else 128
    resolved = without_data(name, {"ae": ae})  # the shrunk DiT draws another size than the real one
    pair = pairs.of_source(resolved, torch.bfloat16, side, random=True)
    assert "random weights for all parts" in pair.notes[0]
    one = bench(replace(pair, steps=2, length=16))
    assert tuple(one._tokens(side).values())[:2] == tokens
    for key, model in pair.models.items():
        drawing = one.record(key, side)
        assert (drawing.passes, len(drawing.step)) == (2 * step, step)
        out = drawing.step[0]()[0]
        assert torch.isfinite(out).all() and out.dtype is torch.bfloat16
        assert recording.draw(model.pipeline, model.family, (side, side), one.settings).shape == (1, 3, side, side)


def test_weights_that_do_not_fit_are_refused_before_any_is_made(monkeypatch):
    monkeypatch.setattr(at_once, "free_bytes", lambda _: 8 * 10**9)
    with pytest.raises(ResourceError, match=r"flux-krea and its conversion need 35\.\d GB .*transformer 23\.8") as told:
        dcgen_convert.benchmark("flux-krea", ae="dc-ae-f64", random=True)
    assert told.value.exit_code == 4 and "8.0 GB are free" in told.value.message


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(resolution=100), "no multiple of"),
        (dict(resolution=[144, 256]), "144 x 144 px"),
        (dict(resolution=0), "resolution is 0"),
        (dict(seconds=0), "seconds is 0"),
        (dict(against="tiny-flux"), "against names the base of a bundle"),
        (dict(random=True), "random weights"),
    ],
)
def test_what_cannot_be_timed_is_refused(settings, said):
    with pytest.raises(InputError, match=said):
        dcgen_convert.benchmark("tiny-flux", **{"ae": "tiny-dc-ae-f32", **settings})


def test_a_bundle_keeps_its_figures_and_stays_whole(own_bundle, parts):
    bundle, base = own_bundle("flux"), parts("flux").source
    found = dcgen_convert.benchmark(bundle, against=base, seconds=QUICK, resolution=[64, 128]).document()
    assert [*found] == KEYS.split() and found["schema"] == "dcgen.benchmark/1"
    assert (found["base"], found["family"], found["random"], found["notes"]) == (str(base), "flux", False, [])
    assert [(size["resolution"], size["tokens"]["base"], size["tokens"]["converted"]) for size in found["sizes"]] == [
        (64, 256, 4),
        (128, 1024, 16),
    ]
    kept = json.loads((bundle / "dcgen_manifest.json").read_text())["metrics"]["benchmark"]
    assert kept["sizes"] == found["sizes"] and not {"source", "base"} & {*kept}  # they may be places of a machine
    assert verify(bundle, NULL, probe=False)["ok"]
    done = run_cli("benchmark", "bundle", "--seconds", "0.01", "--against", str(base), cwd=bundle.parent)
    assert done.returncode == 0, done.stderr
    assert "speed-up" in done.stdout and "image tokens" in done.stdout and "64 px" in done.stdout
    card = (bundle / "README.md").read_text()
    assert (
        card.count("Time at 64 px on CPU") == 3 and "Time at 128 px" not in card and "whole picture (2 steps)" in card
    )
    assert verify(bundle, NULL, probe=False)["ok"]
    run = bundle.parent / "run"
    (run / "data").mkdir(parents=True)
    write_json(run / "data" / "stage.json", {"stage": "data", "metrics": {}, "seconds": 1.0})
    write_json(run / "recipe.json", {"output": str(bundle)})
    assert write_report(run).read_text().count("Time at 64 px on CPU") == 3


def test_of_a_4_bit_bundle_it_says_what_runs(quantised, parts, tmp_path):
    bundle = shutil.copytree(quantised("nvfp4")[0], tmp_path / "bundle")
    found = dcgen_convert.benchmark(bundle, against=parts("flux").source, seconds=QUICK)
    assert list(found.models) == ["base", "converted"] and found.models["converted"]["runtime"] == "dequantised"
    assert "nvfp4 was not timed" in found.notes[0] and "CUDA" in found.notes[0]


def test_a_bundle_takes_no_settings_of_a_conversion_and_needs_its_base(own_bundle, parts):
    bundle = own_bundle("flux")
    with pytest.raises(InputError, match="ae_channels is a setting for a source"):
        dcgen_convert.benchmark(bundle, ae_channels=4)
    with pytest.raises(InputError, match="is a dit model"):
        dcgen_convert.benchmark(bundle, against="tiny-dit")
    manifest = json.loads((bundle / "dcgen_manifest.json").read_text())
    manifest["sources"]["base"] |= {"name": "my-folder", "repo": None}
    (bundle / "dcgen_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="was made from my-folder") as told:
        dcgen_convert.benchmark(bundle)
    assert "--against" in told.value.hint


def test_a_base_beyond_its_training_is_timed_with_a_capped_shift_and_it_is_said(monkeypatch):
    resolved = without_data("flux-krea", {"ae": "dc-ae-f64"})
    pair = pairs.ModelPair({}, resolved.identity, 20, 3.5, 256, 1024)
    assert speed.beyond(pair, [1024]) == []
    (told,) = speed.beyond(pair, [1024, 4096])
    assert "flux-krea was trained up to 1414 px: at 4096 px its times are right" in told
    assert "mu is 1.15 instead of 11.55" in told
    assert benchmarking.SECONDS == 60
