"""More pictures than the alignment can use: only the paired ones are encoded by the base's autoencoder."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import SHORT
from safetensors.torch import load_file

from dcgen_convert.conversion import convert
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_json, write_json
from dcgen_convert.core.journal import SEAL, Run, fingerprint
from dcgen_convert.data import cache
from dcgen_convert.data.cache import LatentCache
from dcgen_convert.data.images import to_image
from dcgen_convert.networks import autoencoders, models
from dcgen_convert.planning import costs
from dcgen_convert.planning.shapes import shapes_of
from dcgen_convert.recipe import paired as rule
from dcgen_convert.recipe.loading import load
from dcgen_convert.stages import align_embedder, gap, latents
from dcgen_convert.stages.job import prepare

SHAPES = {(128, 128): 22, (96, 160): 9}  # height, width: pictures
ENOUGH = 8
SETTINGS = {**SHORT, "data.kind": "folder", "data.count": 100, "data.buckets": "true", "quantize.format": "none"}
SETTINGS |= {"evaluate.prompts": 0, "latents.scale_tolerance": 100, "latents.batch": 1}


def resolved(folder, **settings):
    values = {**SETTINGS, "data.path": folder / "pictures", **settings}
    return load("tiny-flux", sets=[f"{key}={value}" for key, value in values.items()])


def job_of(folder, run, **settings):
    return prepare(resolved(folder, **settings), Run(folder / run, NULL), NULL)


def draw(folder, first, shapes):
    folder.mkdir(exist_ok=True)
    sizes = [size for size, count in shapes.items() for _ in range(count)]
    for number, (height, width) in enumerate(sizes, first):
        pixels = torch.rand(3, height // 16, width // 16, generator=torch.Generator().manual_seed(number)) * 2 - 1
        to_image(pixels.repeat_interleave(16, 1).repeat_interleave(16, 2)).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"picture {number}")


@pytest.fixture(scope="module", autouse=True)
def small():
    """Few pictures are enough, and a shard has few rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rule, "FEWEST", ENOUGH)
        patch.setattr(rule, "ROWS", 1)
        patch.setattr(latents, "SHARD_ROWS", (4, 4))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """pictures; few/: a run up to align-embedder; whole/: the same with latents of the base for every picture."""
    folder = tmp_path_factory.mktemp("paired")
    draw(folder / "pictures", 0, SHAPES)
    console = Console("human", stderr=open(folder / "said.txt", "w"))  # noqa: SIM115  closed with the process
    convert(resolved(folder), folder / "few", folder / "out", console, until="align-embedder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rule, "FEWEST", 1000)
        convert(resolved(folder), folder / "whole", folder / "out", NULL, until="latents")
    return folder


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def files_of(folder):
    """Bytes of all that the stage latents wrote, but for its marker."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "stage.json"}


def go_on(folder, run, until="latents", **settings):
    convert(resolved(folder, **settings), folder / run, folder / "out", NULL, until=until)


def test_only_the_paired_rows_have_latents_of_the_base_and_all_else_is_as_before(made):
    few, whole = (files_of(made / run / "latents") for run in ("few", "whole"))
    same = {name for name in whole if not name.startswith("base-") and name not in ("index.json", "rows.jsonl")}
    assert {name: few[name] for name in same} == {name: whole[name] for name in same} and len(same) > 10
    index, every = (json.loads(found["index.json"]) for found in (few, whole))
    paired = index.pop("paired")
    assert index == every and b"paired" not in whole["rows.jsonl"]
    marks = [json.loads(line).get("paired", True) for line in few["rows.jsonl"].splitlines()]
    assert [row for row, mark in enumerate(marks) if mark] == paired and set(paired) & set(index["held_out"])
    count, job = sum(SHAPES.values()), job_of(made, "few")
    sizes = shapes_of(job.recipe, job.identity)
    assert sizes.alignment_rows == (32, 16) and rule.enough(32, 16) == ENOUGH  # the plan says the same
    assert costs.paired_pictures(job.recipe, sizes, 0) == ENOUGH <= len(paired) <= ENOUGH + 4
    said = " ".join((made / "said.txt").read_text().split())
    assert f"latents: the base's autoencoder encodes {len(paired)} of {count} pictures: the alignment" in said
    old, new = (job_of(made, run).rows(128) for run in ("whole", "few"))
    places = new.paired()
    assert len(places) == len(paired) and len(places.spans) == 2
    for place, row in enumerate(paired):
        for one, other in zip(places.pairs([place]), old.pairs([row]), strict=True):
            assert torch.equal(one["z"], other["z"])
    missing = next(row for row in range(count) if row not in paired)
    with pytest.raises(InputError, match="has no latents of the base"):
        new.pairs([missing])


def test_the_embedder_is_that_of_least_squares_on_the_paired_rows(made):
    """By augmented least squares in float64 over shards that are read here; 1e-10 of the largest weight."""
    folder, job = made / "few" / "latents", job_of(made, "few")
    index, teacher = read_json(folder / "index.json"), models.load(job.source.transformer, torch.float32)
    inputs, goals = [], []
    for table, _, _, start, stop in index["spans"]["128"]:
        z, base = (
            torch.cat([load_file(path)["z"] for path in sorted(folder.glob(f"{name}-{table}-*"))])
            for name in ("target", "base")
        )
        own = [row - start for row in index["paired"] if start <= row < stop]
        assert len(own) == len(base)
        for row, old in zip(own, base, strict=True):
            tokens = teacher.x_embedder(job.family.tokens(old[None], 2)).detach()
            maps = tokens.unflatten(1, (old.shape[1] // 2, old.shape[2] // 2)).movedim(-1, 1)
            goals.append(torch.nn.functional.avg_pool2d(maps, 2).flatten(2)[0].T.double())
            inputs.append(z[row].flatten(1).T.double())
    x, y = torch.cat(inputs), torch.cat(goals)
    deep, wide = x - x.mean(0), y - y.mean(0)
    ridge = job.recipe.align_embedder.ridge + 1e-12
    scale = (ridge * deep.square().mean(0).mean() * len(x)).sqrt()
    rows = torch.cat([deep, scale * torch.eye(32, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(rows, torch.cat([wide, torch.zeros(32, y.shape[1], dtype=torch.float64)])).solution.T
    bias = y.mean(0) - wanted @ x.mean(0)
    student = models.load(job.folders.surgery / models.TRANSFORMER, torch.float32)
    problem = align_embedder.Problem(job, teacher, student, job.rows(128).paired(), "average")
    found = problem.equations(1).solve(job.recipe.align_embedder.ridge)
    for mine, other in zip(found, (wanted, bias), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-10 * other.abs().max().item())
    saved = load_file(made / "few" / "align-embedder" / "modules.safetensors")
    torch.testing.assert_close(saved["x_embedder.weight"], wanted.float(), rtol=1e-6, atol=1e-6)

    start = align_embedder.xavier(student.x_embedder, 0)
    weight, moved = (torch.nn.Parameter(value.clone()) for value in start)
    optimizer = torch.optim.AdamW([weight, moved], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):  # the published way, by hand
        drawn = torch.randint(len(inputs), (6,), generator=generator).tolist()
        optimizer.zero_grad()
        seen, goal = (torch.cat([table[row] for row in drawn]).float() for table in (inputs, goals))
        (seen @ weight.T + moved - goal).square().mean().backward()
        optimizer.step()
    descended = align_embedder.descend(problem, start, 3, 1e-2, 6, 3)
    torch.testing.assert_close(descended, (weight.detach(), moved.detach()), rtol=1e-4, atol=1e-5)


def test_the_gap_is_measured_on_held_out_rows_that_are_paired(made, tmp_path):
    job = job_of(made, "few")
    held_out = job.rows(128).paired().split()[1]
    index = read_json(made / "few" / "latents" / "index.json")
    assert list(held_out.rows) == sorted({*index["paired"]} & {*index["held_out"]})
    found = gap.measure(job, job.folders.surgery / "transformer", held_out, tmp_path)
    every = job_of(made, "whole")
    same = LatentCache(every.folders.latents, 128, list(held_out.rows))
    assert found == gap.measure(every, job.folders.surgery / "transformer", same, tmp_path)


def test_a_run_that_was_killed_in_the_base_s_part_goes_on_to_the_same_bytes(copy, monkeypatch):
    really, written = cache.write_shard, []

    def write(folder, table, number, tensors):
        if written and written[-1].startswith("base-"):
            raise KeyboardInterrupt
        written.append(table)
        really(folder, table, number, tensors)

    monkeypatch.setattr(cache, "write_shard", write)
    with pytest.raises(KeyboardInterrupt):
        go_on(copy, "killed")
    monkeypatch.setattr(cache, "write_shard", really)
    assert len(list((copy / "killed" / "latents").glob("base-*"))) == 1
    go_on(copy, "killed")
    assert files_of(copy / "killed" / "latents") == files_of(copy / "few" / "latents")


def test_two_ranks_write_what_one_writes(made, tmp_path):
    """Each its part, from what rank 0 has written."""
    wanted, folder = files_of(made / "few" / "latents"), tmp_path / "run" / "latents"
    folder.mkdir(parents=True)
    for name in ("rows.jsonl", "layout.json"):
        (folder / name).write_bytes(wanted[name])
    job, shared = job_of(made, "few"), []
    spans = [list(span) for span in read_json(made / "few" / "latents" / "index.json")["spans"]["128"]]
    for rank in range(2):
        own = replace(job, run=Run(tmp_path / "run", NULL), crew=SimpleNamespace(rank=rank, world=2))
        before = {path.name for path in folder.iterdir()}
        with NULL.progress("latents", 1, "pictures") as bar:
            latents.encode_part(own, bar, spans)
        shared.append({path.name for path in folder.iterdir()} - before)
    assert all(any(name.startswith("base-") for name in part) for part in shared)
    found = files_of(folder)
    assert found == {name: wanted[name] for name in found}
    assert {name for name in wanted if name.startswith(("base-", "target-"))} <= found.keys()


def test_a_run_of_an_earlier_version_encodes_nothing_again(copy, monkeypatch):
    """It has latents of the base for every row, and no marks; it was killed when one shard was missing."""
    folder = copy / "whole" / "latents"
    wanted, last = files_of(folder), max(folder.glob("target-*"))
    marker = read_json(folder / "stage.json")
    started = {"inputs": marker["inputs"], "history": [], "origin": None}
    write_json(folder / "started.json", {**started, "begun": 0, "spent": 0, SEAL: fingerprint(started)})
    for name in ("stage.json", "index.json", last.name):
        (folder / name).unlink()
    encoded, really = [], autoencoders.Codec.encode

    def encode(codec, pixels):
        if pixels.shape[-2] >= 96:  # a smaller one is the trial of an autoencoder that is loaded
            encoded.append(codec.channels)
        return really(codec, pixels)

    monkeypatch.setattr(autoencoders.Codec, "encode", encode)
    go_on(copy, "whole")
    assert files_of(folder) == wanted
    assert encoded and 16 not in encoded  # the channels of the base's autoencoder
    go_on(copy, "whole", until="align-embedder")
    assert len(job_of(copy, "whole").rows(128).paired()) == sum(SHAPES.values())


@pytest.mark.parametrize("run", ["few", "whole"])
def test_the_base_s_part_is_made_again_where_the_list_of_rows_is_lost(made, copy, run):
    """Nothing else says which rows the shards hold."""
    (copy / run / "latents" / "rows.jsonl").unlink()
    go_on(copy, run)
    assert files_of(copy / run / "latents") == files_of(made / "few" / "latents")


def test_new_pictures_are_appended_to_paired_rows_that_stay(copy, monkeypatch):
    before = read_json(copy / "few" / "latents" / "index.json")["paired"]
    draw(copy / "pictures", 500, {(128, 128): 3, (160, 96): 2})
    go_on(copy, "few")
    after = read_json(copy / "few" / "latents" / "index.json")["paired"]
    count = sum(SHAPES.values())
    assert [row for row in after if row < count] == before and len([row for row in after if row >= count]) <= 3
    monkeypatch.setattr(rule, "FEWEST", 1000)
    go_on(copy, "fresh")
    kept, every = (job_of(copy, run).rows(128) for run in ("few", "fresh"))
    places, own = every.captions(range(count + 5)), kept.paired()
    assert len(own.spans) >= 3  # the new shape has its share
    for place, caption in enumerate(own.captions(range(len(own)))):
        one, other = own.pairs([place])[0]["z"], every.pairs([places.index(caption)])[0]["z"]
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
