"""Layout settings throw no work away: a stopped training goes on with them, and a finished run holds."""

import json
import re
import shutil
import sys

import pytest
import torch
from conftest import SHORT
from safetensors.torch import load_file
from stopping import Stopping

from dcgen_convert import conversion
from dcgen_convert.bundle.verify import verify
from dcgen_convert.conversion import convert
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.errors import Terminated
from dcgen_convert.core.files import read_json
from dcgen_convert.core.journal import Run
from dcgen_convert.planning import needs
from dcgen_convert.recipe.loading import load
from dcgen_convert.recipe.pictures import PhaseData
from dcgen_convert.recipe.schema import LAYOUT, AlignEmbedder, AlignHead, Budget, Evaluate, Watch
from dcgen_convert.recipe.settings import leaves
from dcgen_convert.stages import depends
from dcgen_convert.stages.job import prepare

STEPS, STOP = 12, 5
TRAINING = {"data.count": 24, "evaluate.prompts": 0, "align_head.steps": 0}
TRAINING |= {"adapt.phases.0.steps": STEPS, "adapt.phases.0.batch": 8, "adapt.phases.0.warmup": 2}
STAGES = [
    "surgery",
    "data",
    "latents",
    "align-embedder",
    "align-head",
    "adapt-1",
    "merge-1",
    "quantize",
    "bundle",
    "verify",
]
TRAINED = ["align-head", "adapt"]

# The stages that run again when one setting changes; what builds on them follows if the result is another. Each layout
# setting stands in the last line.
AGAIN = {
    "source": ["import", "surgery", "data", "latents", "align-embedder"],
    "base": ["import", "surgery", "data", "latents", "align-embedder"],
    "loras": ["import", "surgery", "data", "latents", "align-embedder"],
    "revision": ["import", "surgery", "data", "latents", "align-embedder"],
    "ae": ["surgery", "latents"],
    "ae_channels": ["surgery", "latents"],
    "name": ["bundle"],
    "seed": ["data", "align-embedder", *TRAINED, "quantize"],
    "dtype": ["data", "latents", *TRAINED, "quantize"],
    "merge_lora": ["merge", "bundle"],
    "data.path": [],
    "data.min_side": ["data"],
    "data.sources": ["data"],
    "data.prompts": ["data", "quantize"],
    "data.buckets": ["data", "latents"],
    "data.frames": ["data", "latents"],
    "latents.text_length": ["data", "latents", "quantize"],
    "latents.scale_override": ["latents", "bundle"],
    "adapt.phases.*.resolution": ["surgery", "latents", "adapt"],
    "adapt.clip": ["adapt"],
    "adapt.lora_start": ["adapt"],
    "adapt.optimizer": ["adapt"],
    "bundle.layout": ["bundle"],
    "bundle.steps": ["quantize", "bundle"],
    "bundle.guidance": ["quantize", "bundle"],
    **{f"data.{name}": ["data"] for name in ("kind", "count", "steps", "guidance", "resolution", "beyond_base")},
    **{f"latents.{name}": ["latents"] for name in ("text", "normalise")},
    **{f"align_embedder.{name}": ["align-embedder"] for name in AlignEmbedder.model_fields},
    "align_embedder.target": ["latents", "align-embedder"],
    **{f"align_head.{name}": ["align-head"] for name in AlignHead.model_fields},
    **{f"adapt.{name}": TRAINED for name in ("objective", "null_branch", "guidance_range", "data_guidance", "shift")},
    **{f"adapt.{name}": TRAINED for name in ("weighting", "text_drop", "ema")},
    **{
        f"adapt.phases.*.{name}": ["adapt"]
        for name in ("mode", "steps", "rank", "alpha", "lr", "warmup", "schedule", "batch", "targets", "consistency")
    },
    "adapt.phases.*.data": ["data"],
    **{f"adapt.phases.*.data.{name}": ["data"] for name in PhaseData.model_fields if name not in ("path", "buckets")},
    "adapt.phases.*.data.path": [],
    "adapt.phases.*.data.buckets": ["data", "latents"],
    **{f"quantize.{name}": ["quantize"] for name in ("format", "rank", "dense", "container", "fuse_qkv")},
    **{f"quantize.calibration.{name}": ["quantize"] for name in ("prompts", "steps")},
    **{name: [] for name in LAYOUT if name not in ("watch", "evaluate", "budget")},
    **{f"budget.{name}": [] for name in Budget.model_fields},
    **{f"watch.{name}": [] for name in Watch.model_fields},
    **{f"evaluate.{name}": [] for name in Evaluate.model_fields},
}  # fmt: skip

CHANGES = {
    "data.batch=3": [],
    "data.max_broken=0.5": [],
    "latents.batch=4": [],
    "latents.scale_tolerance=0.5": [],
    "align_embedder.batch=3": [],  # with ridge, the default
    "align_embedder.lr=0.5": [],
    "align_embedder.pooling=average": [],  # what null means
    "align_embedder.target=pooled": [],  # what follows at 128 px
    "align_embedder.target=home": ["latents", "align-embedder"],
    "adapt.checkpointing=true": [],
    "adapt.zero=1": [],
    "adapt.offload=optimizer": [],
    "adapt.phases.0.micro_batch=4": [],
    "compile=true": [],
    "quantize.calibration.batch=3": [],
    "watch.evaluate_every=7": [],
    "watch.metrics=[accuracy]": [],
    "evaluate.prompts=3": [],
    "data.count=20": ["data"],
    "align_head.lr=0.5": [],  # without steps
    "align_head.draws=3": ["align-head"],
    "adapt.ema=0.5": ["align-head", "adapt-1"],
    "adapt.phases.0.lr=0.5": ["adapt-1"],
    "adapt.lora_start=gradient": ["adapt-1"],
    "adapt.optimizer=adamw": ["adapt-1"],
    "quantize.fuse_qkv=true": ["quantize"],
    "seed=7": ["data", "align-embedder", "align-head", "adapt-1", "quantize"],
}


def resolved(changes=(), **settings):
    values = {**SHORT, **TRAINING, **settings}
    return load("tiny-flux", sets=[*(f"{key}={value}" for key, value in values.items()), *changes])


def inputs(folder, *changes):
    """What every stage of a conversion with these settings depends on."""
    job = prepare(resolved(["quantize.format=nvfp4", *changes]), Run(folder / "run", NULL), NULL)
    steps = conversion.walk(job, folder / "out", False)
    return {step.name: step.inputs for step in steps}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return folder, inputs(folder)


@pytest.mark.parametrize("change", CHANGES)
def test_which_stages_a_change_runs_again(first, change):
    folder, before = first
    after = inputs(folder, change)
    assert list(before) == list(after) == STAGES
    differ = [name for name in STAGES if before[name] != after[name]]
    assert differ == CHANGES[change] + ["verify"] * change.startswith("evaluate")  # which deletes nothing


@pytest.mark.parametrize(
    "part, wanted",
    [
        ("text_encoder/model.safetensors", ["data", "latents"]),
        ("tokenizer_2/tokenizer.json", ["data", "latents"]),
        ("transformer/diffusion_pytorch_model.safetensors", ["surgery", "data", "latents", "align-embedder"]),
        ("model_index.json", ["surgery", "data", "latents", "align-embedder"]),
    ],
)
def test_which_stages_a_file_of_the_source_runs_again(first, part, wanted):
    folder, _ = first
    job = prepare(resolved(["quantize.format=nvfp4"]), Run(folder / "run", NULL), NULL)
    before = {step.name: step for step in conversion.walk(job, folder / "out", False)}
    known = job.source.contents()
    assert part in known
    job.source.known.update({**known, part: "other"})
    after = {step.name: step.inputs for step in conversion.walk(job, folder / "out", False)}
    assert [name for name, step in before.items() if after[name] != step.inputs] == wanted
    for step in before.values():  # as a version wrote them that knew one fact for all files
        names = {depends.SOURCE if name == depends.NETWORK else name: value for name, value in step.inputs.items()}
        old = {**names, depends.SOURCE: known} if depends.SOURCE in names else names
        old = {name: value for name, value in old.items() if name != depends.BASE_VIEW}  # and no other target
        assert step.recorded(old) == step.inputs


@pytest.mark.parametrize("own", [[], ["adapt.phases.0.data.count=16"]])
def test_what_is_needed_follows_the_walk(first, own):
    """Stages that a stage builds on have a part that it reads, so `clean` cannot take it away too early."""
    sets = ["quantize.format=nvfp4", "latents.normalise=channel", *own]
    job = prepare(resolved(sets), Run(first[0] / "run", NULL), NULL)
    steps, parts = list(conversion.walk(job, first[0] / "out", False)), needs.parts(job.recipe, False)
    assert [step.name for step in steps] == needs.stages(job.recipe, False)
    read = {(part.stage, reader) for part in parts for reader in part.readers}
    assert {(before, step.name) for step in steps for before in step.after} - read == {("bundle", "verify")}


def test_the_table_of_all_settings_is_this_one():
    recipes = [resolved().recipe, resolved(["adapt.phases.0.data.count=16"]).recipe]
    found = [key for recipe in recipes for key, _ in leaves(recipe.model_dump(mode="json"))]
    names = {re.sub(r"\.\d+\.", ".*.", key) for key in found}
    assert {name: depends.stages_of(name) for name in sorted(names)} == dict(sorted(AGAIN.items()))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that SIGTERM stopped in the middle of its training, and one that nothing disturbed."""
    folder = tmp_path_factory.mktemp("stopped")
    convert(resolved(), folder / "whole", folder / "out", NULL, until="align-head")
    shutil.copytree(folder / "whole", folder / "run")
    with pytest.raises(Terminated):
        convert(resolved(), folder / "run", folder / "out", Stopping(STOP), until="adapt-1")
    checkpoints = folder / "run" / "adapt-1" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == [f"step-{STOP:06d}"]
    convert(resolved(), folder / "whole", folder / "out", NULL, until="adapt-1")
    return folder


def trained(run):
    """Losses by step, and every exported tensor."""
    lines = (run / "adapt-1" / "metrics.jsonl").read_text().splitlines()
    weights = {}
    for path in (run / "adapt-1" / "export").glob("*.safetensors"):
        weights |= load_file(path)
    return [json.loads(line)["loss"] for line in lines], weights


def resumed_from(run):
    return read_json(run / "adapt-1" / "stage.json")["metrics"]["resumed_from"]


@pytest.mark.parametrize("change", ["adapt.phases.0.micro_batch=2", "adapt.zero=1", "adapt.checkpointing=true"])
def test_the_hint_of_an_out_of_memory_error_continues_the_training(stopped, tmp_path, change):
    shutil.copytree(stopped / "run", tmp_path / "run")
    convert(resolved([change]), tmp_path / "run", tmp_path / "out", NULL, until="adapt-1")
    assert resumed_from(tmp_path / "run") == STOP
    losses, weights = trained(tmp_path / "run")
    wanted_losses, wanted = trained(stopped / "whole")
    assert losses == pytest.approx(wanted_losses, rel=1e-5) and len(losses) == STEPS
    assert weights.keys() == wanted.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5)


def test_where_lora_begins_is_found_once_and_goes_on(stopped, tmp_path):
    """A run that was stopped goes on from the same start; its LoRA has twice the rank, and is merged."""
    begin = ["adapt.lora_start=gradient"]
    for stage in STAGES[: STAGES.index("adapt-1")]:
        shutil.copytree(stopped / "whole" / stage, tmp_path / "run" / stage)
    with pytest.raises(Terminated):
        convert(resolved(begin), tmp_path / "run", tmp_path / "out", Stopping(STOP), until="adapt-1")
    file = tmp_path / "run" / "adapt-1" / "checkpoints" / "lora-start.safetensors"
    before = file.stat().st_mtime_ns
    done = convert(resolved(begin), tmp_path / "run", tmp_path / "out", NULL, until="merge-1")
    assert resumed_from(tmp_path / "run") == STOP and file.stat().st_mtime_ns == before
    (losses, weights), (zero, plain) = trained(tmp_path / "run"), trained(stopped / "whole")
    assert losses[0] == pytest.approx(zero[0], rel=1e-5) and losses[-1] != pytest.approx(zero[-1], rel=1e-5)
    changed = {name for name in plain if plain[name].shape != weights[name].shape}
    assert changed == {name for name in plain if ".lora_" in name}
    assert all(2 * 64 in weights[name].shape for name in changed)
    assert done["stages"][-1]["metrics"]["merged"] == len(changed) // 2


def test_a_stopped_and_then_finished_run_holds_and_its_bundle_states_its_recipe(stopped, tmp_path, capsys):
    shutil.copytree(stopped / "run", tmp_path / "run")
    run, out, change = tmp_path / "run", tmp_path / "out", "adapt.phases.0.micro_batch=2"
    convert(resolved([change]), run, out, NULL)
    manifest = read_json(out / "dcgen_manifest.json")
    assert resumed_from(run) == STOP and manifest["recipe"] == read_json(run / "recipe.json")["recipe"]
    assert manifest["recipe"]["adapt"]["phases"][0]["micro_batch"] == 2
    again = ["adapt.phases.0.micro_batch=4", "adapt.zero=1", "watch.grid_every=3", "latents.batch=4"]
    done = convert(resolved(again), run, out, Console("human", stderr=sys.stdout))
    assert capsys.readouterr().out.count("holds, skipped") == len(done["stages"]) == len(STAGES) - 1
    assert read_json(out / "dcgen_manifest.json") == manifest  # the settings that it was made with
    assert verify(out, NULL, None)["checks"]


def test_latents_do_not_depend_on_how_many_pictures_are_encoded_at_once(stopped, tmp_path):
    for stage in ("surgery", "data"):
        shutil.copytree(stopped / "run" / stage, tmp_path / "run" / stage)
    convert(resolved(["latents.batch=5"]), tmp_path / "run", tmp_path / "out", NULL, until="latents")
    files = [path.name for path in (stopped / "run" / "latents").glob("*.safetensors")]
    assert len(files) > 3
    for name in files:
        found, wanted = (load_file(folder / "run" / "latents" / name) for folder in (tmp_path, stopped))
        for key, tensor in wanted.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5)


def test_partial_work_that_another_setting_deletes_is_told(stopped, tmp_path, capsys):
    shutil.copytree(stopped / "run", tmp_path / "run")
    console = Console("human", stderr=sys.stdout)
    convert(resolved(["adapt.phases.0.batch=4"]), tmp_path / "run", tmp_path / "out", console, until="adapt-1")
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"adapt-1: starts again, changed: adapt\.phases\.0\.batch; [\d.]+ s of work are deleted", said)
    assert resumed_from(tmp_path / "run") is None
