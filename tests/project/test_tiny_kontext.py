"""The program that makes tiny-kontext: its pairs say what they show, and what it writes runs in the stock pipeline."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxKontextPipeline, FluxPipeline

from dcgen_convert import families
from dcgen_convert.evaluation import tiny_world
from dcgen_convert.families.base import REFERENCE
from dcgen_convert.tiny import edits, world

sys.path.insert(0, str(Path(__file__).parents[2]))  # the programs are no part of the package
from tools.tiny import assemble, editing, transformers

LENGTH, SEED = 16, 9
SHARED = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")


@pytest.fixture(scope="module")
def flux(weights):
    return FluxPipeline.from_pretrained(weights / "tiny-flux", dtype=torch.float32)


@pytest.fixture(scope="module")
def pairs(flux):
    return editing.pairs(flux, 24, SEED, LENGTH, lambda line: None)


@torch.no_grad()
def shown(flux, z):
    config = flux.vae.config
    return tiny_world.read(flux.vae.decode(z / config.scaling_factor + config.shift_factor).sample)


def test_every_row_is_the_edit_that_its_instruction_asks_for(flux, pairs):
    before, after = shown(flux, pairs.reference), shown(flux, pairs.z)
    changed = before != after
    once = changed.sum(1) == 1  # the autoencoder loses an attribute now and then
    assert once.float().mean() > 0.9
    columns = changed[once].long().argmax(1).tolist()
    texts = [edits.instruction(row, column) for row, column in zip(after[once].tolist(), columns, strict=True)]
    with torch.no_grad():
        wanted = families.get("flux-kontext").encode_text(flux, texts, LENGTH)
    for key, value in wanted.items():
        apart = (pairs.text[key][pairs.row[once]] - value).abs().flatten(1).amax(1)
        assert (apart < 1e-4).float().mean() > 0.9, key
    scenes = [tuple(row) for row in torch.cat([before, after], 1).tolist()]
    undone = [(*scene[6:], *scene[:6]) for scene in scenes]
    assert sum(scene in undone for scene in scenes) > 0.9 * len(scenes)  # there and back
    shapes = changed[:, edits.COLUMNS.index("shape")] & once
    assert len({scenes[i] for i in shapes.nonzero()[:, 0].tolist()}) == shapes.sum() // editing.SHAPES


def test_a_dropped_instruction_keeps_its_reference(pairs):
    index = torch.tensor([3, 4])
    z, text = pairs.batch(index, torch.tensor([True, False]))
    assert torch.equal(z, pairs.z[index]) and torch.equal(text[REFERENCE], pairs.reference[index])
    pooled = text["pooled_projections"]
    assert torch.equal(pooled[0], pairs.null["pooled_projections"][0])
    assert torch.equal(pooled[1], pairs.text["pooled_projections"][pairs.row[4]])


def test_teacher_and_student_become_a_pipeline_that_shares_all_but_the_transformer(flux, pairs, weights, tmp_path):
    family, losses = families.get("flux-kontext"), []
    one = transformers.Training(1, 4, 1e-3, SEED, 2.0, half=True)
    teacher = transformers.train_flow(family, flux.transformer, pairs, one, losses.append)
    student = transformers.distill_guidance(family, teacher, pairs, one, losses.append)
    assert len(losses) == 2 and all(float(line.split()[3]) < 2 for line in losses)
    student.save_pretrained(tmp_path / "work" / "kontext")
    assemble.write(tmp_path / "work", tmp_path / "weights")
    folder = tmp_path / "weights" / "tiny-kontext"
    files = [file.relative_to(folder) for part in SHARED for file in (folder / part).iterdir()]
    large = [file for file in files if file.suffix == ".safetensors" or file.name == "tokenizer.json"]
    assert {file.parts[0] for file in large} == {*SHARED}
    assert all((folder / file).read_bytes() == (weights / "tiny-flux" / file).read_bytes() for file in large)
    pipeline = FluxKontextPipeline.from_pretrained(folder)
    size = dict(height=world.SIDE, width=world.SIDE, max_area=world.SIDE**2, _auto_resize=False)
    drawn = pipeline(
        torch.rand(1, 3, 96, 160), "make it a ring", **size, num_inference_steps=1, max_sequence_length=LENGTH
    ).images
    assert [picture.size for picture in drawn] == [(128, 128)]
