"""Edits of the tiny world: what they change, what instructions say, and how edited pictures are judged."""

from __future__ import annotations

import math

import pytest
import torch

from dcgen_convert.core.errors import InputError
from dcgen_convert.evaluation import measures, rows, tiny_edits, tiny_world
from dcgen_convert.evaluation.measures import Weights
from dcgen_convert.tiny import edits, world

BOTH = ["edit-accuracy", "preservation"]
BLUE = "make the circle blue"


def judged(pictures, sources, instructions):
    """(edit accuracy, preservation)."""
    chosen = measures.chosen(BOTH, Weights(), instructions, side=128, edited=True)[0]
    figures = rows.measured([(pictures, instructions, sources)], chosen)
    return [figures.scores[name].mean().item() for name in BOTH]


def test_an_edit_changes_one_attribute_to_another_value():
    sample = edits.sample(3000, 5)
    differs = sample.before != sample.after
    assert differs.sum(1).eq(1).all() and torch.equal(differs.long().argmax(1), sample.column)
    for column, names in enumerate(world.ATTRIBUTES.values()):
        rows_of = sample.column == column
        assert 400 < rows_of.sum() < 600, column  # 500 of each attribute
        assert set(sample.after[rows_of, column].tolist()) == set(range(len(names)))
    again, other = edits.sample(3000, 5), edits.sample(3000, 6)
    assert torch.equal(again.after, sample.after) and not torch.equal(other.after, sample.after)


def test_source_and_edited_picture_differ_in_the_attribute_alone():
    sample = edits.sample(60, 8)
    sources, edited = edits.draw(sample, 8)
    same = (sources == edited).all(1)  # (B, 128, 128)
    corners = same[:, ::127, ::127]
    scene = sample.column == edits.COLUMNS.index("scene")
    assert corners[~scene].all() and not corners[scene].any()  # only a scene reaches the corners
    assert (same[scene].sum((1, 2)) > 300).all() and not same.all((1, 2)).any()  # and it leaves the shape
    assert torch.equal(sources, world.draw(sample.before, 8))


def test_instructions_name_the_new_value_in_the_words_of_the_captions():
    row = [0, 3, 3, 1, 1, 2]  # the caption: a large dotted blue circle at the top left on snow
    assert [edits.instruction(row, column) for column in range(6)] == [
        "make it a circle",
        BLUE,
        "put the circle on snow",
        "move the circle to the top left",
        "make the circle large",
        "make the circle dotted",
    ]
    sample = edits.sample(2000, 11)
    for i, text in enumerate(sample.instructions):
        column = int(sample.column[i])
        assert edits.parse(text) == (column, int(sample.after[i, column])), text
    for text in ("make the circle teal", "a small plain red circle in the center on sand", "", "make the blue circle"):
        assert edits.parse(text) is None


def test_what_leads_back_undoes_an_edit():
    sample = edits.sample(50, 3)
    back = sample.undone
    for i, text in enumerate(back.instructions):
        column, value = edits.parse(text)
        again = sample.after[i].clone()
        again[column] = value
        assert torch.equal(again, sample.before[i])


def test_drawn_edits_are_right_and_keep_the_rest():
    sample = edits.sample(120, 21)
    sources, edited = edits.draw(sample, 21)
    accuracy, preservation = judged(edited, sources, sample.instructions)
    assert accuracy > 0.98 and preservation > 0.99
    accuracy, preservation = judged(sources, sources, sample.instructions)  # nothing was done
    assert accuracy < 0.02 and preservation == 1
    strangers = world.draw(world.sample_labels(120, 4), 4)  # chance: the mean of 1 / values
    accuracy, preservation = judged(strangers, sources, sample.instructions)
    chance = sum(1 / len(names) for names in world.ATTRIBUTES.values()) / 6
    assert accuracy == pytest.approx(chance, abs=0.12) and preservation == pytest.approx(chance, abs=0.06)


def test_kept_attributes_are_told_one_by_one_and_the_asked_one_is_left_out():
    before = torch.tensor([[0, 0, 1, 1, 1, 0]])
    after = torch.tensor([[0, 3, 1, 1, 0, 0]])  # the size has changed too
    kept = tiny_edits.kept(world.draw(after, 2), world.draw(before, 2, side=64), [BLUE])
    assert kept.dtype == torch.float64
    assert [None if math.isnan(value) else value for value in kept[0].tolist()] == [1, None, 1, 1, 0, 1]
    assert tiny_edits.changed(world.draw(after, 2), [BLUE]).tolist() == [1]
    assert tiny_world.read(world.draw(after, 2)).tolist() == after.tolist()


def test_what_cannot_be_judged_is_said():
    with pytest.raises(InputError, match="no instruction 'make it rain'"):
        measures.chosen(["edit-accuracy"], Weights(), [BLUE, "make it rain"])
    with pytest.raises(InputError, match="preservation cannot be used: the pictures that were edited are not at hand"):
        measures.chosen(["preservation"], Weights(), [BLUE])
    found, left_out = measures.chosen(None, Weights(), [BLUE], side=128, edited=True)
    assert {*BOTH} <= {one.name for one in found} and "accuracy" in left_out
    found, left_out = measures.chosen(None, Weights(), ["a fox"], side=128, edited=True)
    assert {*BOTH} <= set(left_out) and not {*BOTH} & {one.name for one in found}
