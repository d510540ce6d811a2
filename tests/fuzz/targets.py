"""The 22 kinds of input that a user, a download or a damaged disk can give us, and what the program does with each."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dcgen_convert import conversion, families
from dcgen_convert.bundle import checks
from dcgen_convert.bundle import manifest as manifests
from dcgen_convert.bundle.inspection import inspect
from dcgen_convert.bundle.layout import BundleParts, read_index, write_bundle
from dcgen_convert.checkpoint import keymap
from dcgen_convert.checkpoint.licence import licence_of
from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.checkpoint.record import source_record
from dcgen_convert.core.console import NULL
from dcgen_convert.core.files import sha256
from dcgen_convert.core.journal import Run, Wanted
from dcgen_convert.core.version import __version__
from dcgen_convert.data import cache as latents
from dcgen_convert.data import images, prompts
from dcgen_convert.evaluation import curves, report
from dcgen_convert.ranks import hosts
from dcgen_convert.recipe import loading, shelf
from dcgen_convert.stages import records
from dcgen_convert.stages.job import find_autoencoder
from dcgen_convert.svdquant import trees
from dcgen_convert.train import checkpoints
from dcgen_convert.train.watch import kept_lines

from . import mutations as damage

WEIGHTS = Path(families.__file__).parents[1] / "tiny" / "weights"
BASE, AE = WEIGHTS / "tiny-flux", WEIGHTS / "tiny-dc-ae-f32"
FILE = BASE / "transformer" / "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Target:
    """One kind of input.

    make: (folder) -> writes good inputs there, once. spoil: (chance, folder) -> damages a copy of them. use: (folder)
    -> what the program does with them; its exceptions are what is looked at.
    """

    name: str
    make: Callable[[Path], object]
    spoil: Callable[[random.Random, Path], object]
    use: Callable[[Path], object]


def rewritten(*names: str, by: Callable[[random.Random, Any], bytes]) -> Callable[[random.Random, Path], None]:
    """Damages one of the files ``names`` in the folder. by: (chance, content) -> new content."""

    def spoil(chance: random.Random, folder: Path) -> None:
        path = folder / chance.choice(names)
        content = path.read_bytes()
        path.unlink()  # the copy may be a link to the good file
        path.write_bytes(by(chance, content))

    return spoil


def as_json(chance: random.Random, content: bytes) -> bytes:
    return damage.damaged_json(chance, json.loads(content))


def as_lines(chance: random.Random, content: bytes) -> bytes:
    return damage.damaged_lines(chance, content.decode())


def linked(origin: Path, folder: Path) -> None:
    shutil.copytree(origin, folder, copy_function=os.link, dirs_exist_ok=True)


def taken(path: Path, *, base: Path | None = BASE) -> None:
    """What happens to a source before and while it is imported."""
    inspect(path)
    loading.load(str(path), flags={"base": str(base)} if base else {})
    source = load_source("x", str(path), base=str(base) if base else None, home=path.parent / "import")
    source.fingerprint  # noqa: B018  it reads the files


@cache
def single_file() -> dict[str, torch.Tensor]:
    """tiny-flux under the names of the original code."""
    tensors = load_file(FILE)
    stacks = keymap.find("flux", "bfl").backward({name: tuple(value.shape) for name, value in tensors.items()})
    return {
        name: torch.cat([tensors[cut.name][cut.start : cut.stop] for cut in stack.cuts]).reshape(stack.shape)
        for name, stack in stacks.items()
    }


def make_gguf(folder: Path) -> None:
    writer = gguf.GGUFWriter(folder / "model.gguf", "flux")
    for name, value in single_file().items():
        blocks = value.ndim > 1 and value.shape[-1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q8_0 if blocks else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(value.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def spoil_gguf(chance: random.Random, folder: Path) -> None:
    path = folder / "model.gguf"
    content = bytearray(path.read_bytes())
    for _ in range(chance.randint(1, 3)):  # within the header every number is a length, a type or an offset
        at = chance.randrange(4, 7000)
        content[at : at + 4] = chance.choice((chance.randbytes(4), b"\xff" * 4, b"\x09\0\0\0", bytes(4)))
    path.unlink()
    path.write_bytes(damage.damaged(chance, bytes(content)) if not chance.randrange(4) else content)


def make_lora(folder: Path) -> None:
    weight = load_file(FILE)["transformer_blocks.0.attn.to_q.weight"]
    name = "transformer.transformer_blocks.0.attn.to_q"
    down, up = torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4)
    settings = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2, "transformer.rank_pattern": {}})
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(tensors, folder / "lora.safetensors", {"format": "pt", "lora_adapter_metadata": settings})


def spoil_lora(chance: random.Random, folder: Path) -> None:
    path = folder / "lora.safetensors"
    content = path.read_bytes()
    header = damage.header_of(content)
    if chance.randrange(2):
        inner = json.loads(header["__metadata__"]["lora_adapter_metadata"])
        header["__metadata__"]["lora_adapter_metadata"] = json.dumps(damage.mutated(chance, inner))
        text = json.dumps(header).encode()
        start = 8 + int.from_bytes(content[:8], "little")
        content = len(text).to_bytes(8, "little") + text + content[start:]
    else:
        content = damage.damaged_safetensors(chance, content)
    path.unlink()
    path.write_bytes(content)


def use_lora(folder: Path) -> None:
    inspect(folder / "lora.safetensors")
    source = load_source("x", str(BASE), loras=[f"{folder / 'lora.safetensors'}:0.5"], home=folder / "import")
    for lora in source.loras:
        lora.updates()


def use_prompts(folder: Path) -> None:
    prompts.make(str(folder / "prompts.txt"), 5, 0)


def make_run(folder: Path) -> None:
    """A run folder with a record and the marker of a finished stage."""
    resolved = loading.load("tiny-flux")
    record = {
        "recipe": resolved.recipe.model_dump(mode="json"),
        "machine": asdict(resolved.machine),
        "output": str(folder / "bundle"),
        "version": __version__,
    }
    (folder / "recipe.json").write_text(json.dumps(record))


def use_run(folder: Path) -> None:
    resolved, output = conversion.recorded(folder)
    str(output), resolved.identity.family, resolved.machine.gpus or 0


def make_trees(folder: Path) -> None:
    tree = {"a": (torch.zeros(2), [torch.ones(1), None, {"b": torch.arange(3)}]), "flag": True, "text": "x", "t": 0.5}
    trees.save(tree, folder / "tree.safetensors")


def spoil_tree(chance: random.Random, folder: Path) -> None:
    path = folder / "tree.safetensors"
    content = path.read_bytes()
    header = damage.header_of(content)
    if chance.randrange(3):
        inner = damage.mutated(chance, json.loads(header["__metadata__"][trees.KEY]))
        header["__metadata__"][trees.KEY] = damage.DEEP if not chance.randrange(30) else json.dumps(inner)
        text = json.dumps(header).encode()
        content = len(text).to_bytes(8, "little") + text + content[8 + int.from_bytes(content[:8], "little") :]
    path.write_bytes(damage.damaged_safetensors(chance, content) if not chance.randrange(3) else content)


def make_pictures(folder: Path) -> None:
    for i, suffix in enumerate(("png", "jpg", "webp", "bmp")):
        Image.new("RGB", (40 + i, 30), (50 * i, 9, 200)).save(folder / f"{i}.{suffix}")
        (folder / f"{i}.txt").write_text(f"a red square, number {i}\nand a Bär")


def spoil_pictures(chance: random.Random, folder: Path) -> None:
    path = chance.choice(sorted(folder.iterdir()))
    content = path.read_bytes()
    path.write_bytes(as_lines(chance, content) if path.suffix == ".txt" else damage.damaged(chance, content))
    if not chance.randrange(10):
        os.mkfifo(folder / chance.choice(("pipe.png", "pipe.txt", "9.jpg")))


def use_pictures(folder: Path) -> None:
    path = folder / "index.jsonl" if (folder / "index.jsonl").exists() else folder
    for picture in images.read_folder(path):
        images.size_of(picture.file)
        images.read_pixels(picture.file, 32)
    images.take(path, 2)


def make_jsonl(folder: Path) -> None:
    make_pictures(folder)
    rows = [{"file": f"{i}.{suffix}", "caption": "a fox", "seed": i} for i, suffix in enumerate(("png", "jpg", "webp"))]
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def spoil_jsonl(chance: random.Random, folder: Path) -> None:
    path = folder / "index.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if chance.randrange(2):
        at = chance.randrange(len(rows))
        rows[at] = damage.mutated(chance, rows[at])
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(damage.damaged_lines(chance, text) if chance.randrange(2) else text.encode())


def make_latents(folder: Path) -> None:
    torch.manual_seed(0)
    latents.write_captions(folder, ["a fox"] * 4)
    for table, count, shape in (
        ("target-32", 4, (2, 1, 1)),
        ("base-32", 4, (2, 4, 4)),
        ("text", 4, (3, 2)),
        ("null", 1, (3, 2)),
    ):
        for number in range(-(-count // 2)):
            rows = {"z" if "-" in table else "prompt_embeds": torch.randn(min(2, count), *shape)}
            latents.write_shard(folder, table, number, rows)
    latents.write_index(folder, 4, 2, [1], {"model": "flux"})


def use_latents(folder: Path) -> None:
    found = latents.LatentCache(folder, 32, key={"model": "flux"})
    for part in (found, *found.split()):
        part.batch([0])
        part.captions([0])
    found.pairs([len(found) - 1])


def make_bundle(folder: Path) -> None:
    """tiny-flux as a bundle of the layout `source`."""
    source = load_source("tiny-flux", str(BASE), home=folder / "import")
    defaults = {"height": 32, "width": 32, "steps": 1, "guidance": 1.0, "text_length": 8}
    manifest = manifests.build(
        recipe={"name": "x"}, family="flux", sources={"base": source_record("tiny-flux", BASE)},
        autoencoder={"name": "x", "factor": 8, "channels": 16, "scaling_factor": 1.0}, defaults=defaults, seed=0,
        licence={"base": licence_of(BASE)}, times={"quantize": 1.0},
        metrics={"flow_loss": {"before": 1.25, "after": 0.5}},
    )  # fmt: skip
    write_bundle(folder / "bundle", BundleParts(source.family, BASE, source.transformer, "source"), manifest, NULL)


def use_bundle(folder: Path) -> None:
    bundle = folder / "bundle"
    inspect(bundle)
    index, manifest = read_index(bundle), manifests.read(bundle)
    checks.check_files(bundle, manifest, NULL)
    checks.check_structure(bundle, index)
    checks.check_table(bundle, manifest)


def make_checkpoint(folder: Path) -> None:
    path = checkpoints.step_folder(folder, 4)
    path.mkdir()
    save_file({"weight/a": torch.zeros(2)}, path / "state-00001.safetensors")
    state = path / "state-00001.safetensors"
    known = [state.stat().st_size, sha256(state)]
    document = {"schema": checkpoints.SCHEMA, "step": 4, "files": {state.name: known}}
    (path / checkpoints.INDEX).write_text(json.dumps({**document, "shapes": {"weight/a": [2]}, "extra": {"seed": 0}}))


def use_checkpoint(folder: Path) -> None:
    found = checkpoints.latest(folder)
    if found is not None:
        list(checkpoints._tensors(*found))
    checkpoints.prune(folder)


STAGE = {"k": 1, "deep": {"x": [1, 2]}}


def make_stages(folder: Path) -> None:
    """One finished stage, and one that was cut off."""
    run = Run(folder / "run", NULL)
    for name in ("a", "b"):
        wanted = Wanted(name, STAGE)
        with suppress(KeyboardInterrupt), run.stage(wanted, run.look(wanted)) as stage:
            (stage.folder / "artefact").write_text("x")
            stage.metrics["loss"] = 1.5
            if name == "b":
                raise KeyboardInterrupt


def use_stages(folder: Path) -> None:
    run = Run(folder / "run", NULL)
    for name in ("a", "b"):
        for inputs in (STAGE, {"k": 2}):
            found = run.look(Wanted(name, inputs, continues=lambda old: f"{old['k']:d} -> 2"))
            assert found.seconds >= 0 and run.spent(name) >= 0
        run.origin(name)


def make_recipe(folder: Path) -> None:
    shutil.copy(shelf.root() / "tiny-flux.yaml", folder / "mine.yaml")


def use_recipe(folder: Path) -> None:
    resolved = loading.load(str(folder / "mine.yaml"))
    assert Path(resolved.recipe.name).name == resolved.recipe.name


SETTINGS = (
    "seed=3",
    "adapt.phases.0.steps=4",
    "lora.rank=8",
    "data.batch=2",
    "quantize.format=int4",
    "adapt.phases.*.lr=0.1",
)


def make_settings(folder: Path) -> None:
    (folder / "sets").write_text("\n".join(SETTINGS))
    (folder / "env").write_text("{}")


def spoil_settings(chance: random.Random, folder: Path) -> None:
    text = "\n".join(chance.sample(SETTINGS, 2))
    (folder / "sets").write_bytes(damage.damaged_lines(chance, text))
    values = {
        f"DCGEN_CONVERT_{key}": str(chance.choice(damage.ODD)) for key in ("SEED", "ADAPT__EMA", "ADAPT", "DATA__X")
    }
    chosen = chance.sample(sorted(values), chance.randrange(3))
    (folder / "env").write_text(json.dumps({key: values[key] for key in chosen}))


def use_settings(folder: Path) -> None:
    sets = (folder / "sets").read_bytes().decode("utf-8", "surrogateescape").split("\n")
    loading.load("tiny-flux", sets=sets, env=json.loads((folder / "env").read_text()))


def make_index(folder: Path) -> None:
    linked(BASE, folder / "source")
    names = [name for name in damage.header_of(FILE.read_bytes()) if name != "__metadata__"]
    document = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, FILE.name)}
    (folder / "source" / "transformer" / f"{FILE.name}.index.json").write_text(json.dumps(document))


def make_asked(folder: Path) -> None:
    Run(folder / "run", NULL)
    (folder / "run" / records.ASKED).write_text(json.dumps({"job": "x", "stages": ["surgery", "data"]}))


def use_asked(folder: Path) -> None:
    run = Run(folder / "run", NULL)
    records.asked(run, ["surgery", "data"], None)
    records.answered(run, "data")


def make_metrics(folder: Path) -> None:
    rows = [{"step": step, "loss": 1 / (step + 1), "deep": {"x": 1}} for step in range(6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def use_metrics(folder: Path) -> None:
    curves.points(curves.records(folder / "metrics.jsonl"), "loss")
    kept_lines(folder / "metrics.jsonl", lambda line: line["step"] < 4)


def make_report(folder: Path) -> None:
    for name in ("surgery", "data", "verify"):
        (folder / "run" / name).mkdir(parents=True)
        metrics = {"loss": 1.5, "gap": [0.1, 0.2], "psnr": {"mean": 30.0}, "problems": []}
        record = {"schema": "dcgen.stage/2", "inputs": STAGE, "seconds": 3.0, "metrics": metrics, "files": {}}
        (folder / "run" / name / "stage.json").write_text(json.dumps(record))
    (folder / "run" / "recipe.json").write_text(json.dumps({"recipe": STAGE}))


def make_layers(folder: Path) -> None:
    record = {"module": "a.b", "format": "nvfp4", "error": 0.1, "error_rtn": 0.2, "rank": 16, "shape": [8, 8]}
    (folder / "transformer").mkdir()
    (folder / "transformer" / "quantization.json").write_text(json.dumps({"layers": [record, record]}))


SAFETENSORS = "bfl.safetensors"
CONFIGS = ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json")
TARGETS = (
    Target(
        "headers",
        lambda folder: save_file(single_file(), folder / SAFETENSORS),
        rewritten(SAFETENSORS, by=damage.damaged_safetensors),
        lambda folder: taken(folder / SAFETENSORS),
    ),
    Target("gguf", make_gguf, spoil_gguf, lambda folder: taken(folder / "model.gguf")),
    Target("lora", make_lora, spoil_lora, use_lora),
    Target(
        "prompts",
        lambda folder: (folder / "prompts.txt").write_text("a fox\na Bär\n\na red square\n"),
        rewritten("prompts.txt", by=as_lines),
        use_prompts,
    ),
    Target("recipe.json", make_run, rewritten("recipe.json", by=as_json), use_run),
    Target(
        "hostfile",
        lambda folder: (folder / "hosts").write_text("# two\nnode1 slots=8\nnode2 slots=4\n"),
        rewritten("hosts", by=as_lines),
        lambda folder: hosts.slots(str(folder / "hosts")),
    ),
    Target("calibration trees", make_trees, spoil_tree, lambda folder: trees.load(folder / "tree.safetensors")),
    Target("stage.json", make_stages, rewritten("run/a/stage.json", "run/b/started.json", by=as_json), use_stages),
    Target("pictures and captions", make_pictures, spoil_pictures, use_pictures),
    Target(
        "--ae config",
        lambda folder: linked(AE, folder / "ae"),
        rewritten("ae/config.json", by=as_json),
        lambda folder: find_autoencoder(str(folder / "ae"), folder / "work").fingerprint,
    ),
    Target("jsonl", make_jsonl, spoil_jsonl, use_pictures),
    Target("latents index", make_latents, rewritten("index.json", by=as_json), use_latents),
    Target("recipe", make_recipe, rewritten("mine.yaml", by=as_lines), use_recipe),
    Target("manifest", make_bundle, rewritten("bundle/dcgen_manifest.json", by=as_json), use_bundle),
    Target("checkpoint index", make_checkpoint, rewritten("step-000004/checkpoint.json", by=as_json), use_checkpoint),
    Target(
        "config",
        lambda folder: linked(BASE, folder / "source"),
        rewritten(*(f"source/{name}" for name in CONFIGS), by=as_json),
        lambda folder: taken(folder / "source", base=None),
    ),
    Target("asked.json", make_asked, rewritten(f"run/{records.ASKED}", by=as_json), use_asked),
    Target("metrics.jsonl", make_metrics, rewritten("metrics.jsonl", by=as_lines), use_metrics),
    Target(
        "report",
        make_report,
        rewritten("run/data/stage.json", "run/verify/stage.json", "run/recipe.json", by=as_json),
        lambda folder: report.write_report(folder / "run"),
    ),
    Target(
        "quantised layers",
        make_layers,
        rewritten("transformer/quantization.json", by=as_json),
        report.write_report,
    ),
    Target("settings", make_settings, spoil_settings, use_settings),
    Target(
        "index",
        make_index,
        rewritten("source/model_index.json", f"source/transformer/{FILE.name}.index.json", by=as_json),
        lambda folder: taken(folder / "source", base=None),
    ),
)
