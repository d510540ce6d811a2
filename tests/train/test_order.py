"""Which rows a step sees: every row of every shape, the same whatever the ranks, one shape a batch."""

from collections import Counter
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcgen_convert.train import objective
from dcgen_convert.train.loop import _feed, positions_of
from dcgen_convert.train.objective import Sampling, t_of_normal
from dcgen_convert.train.order import BatchOrder

from .train_worker import FLUX, MixedRows, Rows, adapt, losses, run_ranks

SAMPLING = Sampling("logit-normal", 2.0, (1.0, 5.0), 0.1)


def spans_of(lengths):
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [range(start, start + length) for start, length in zip(starts, lengths, strict=True)]


def test_order_is_a_permutation_of_each_epoch():
    order = BatchOrder([range(10)], 4, seed=3)
    rows = [row for step in range(5) for row in order.rows_of(step)]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10)) and rows[:10] != rows[10:]
    assert BatchOrder([range(10)], 4, seed=3).rows_of(3) == rows[12:16]  # by step alone, without the steps before
    assert [row for step in range(5) for row in BatchOrder([range(10)], 4, seed=4).rows_of(step)] != rows
    # the order of rows of one shape is older than buckets: runs must go on as they began
    first = torch.randperm(10, generator=torch.Generator().manual_seed(3 * 1_000_003)).tolist()
    assert rows[:10] == first


def test_spans_are_shuffled_apart():
    spans = spans_of([30, 30, 30])
    order = BatchOrder(spans, 10, seed=1)
    steps = [order.rows_of(step) for step in range(18)]
    passes = [[row - span.start for rows in steps[:9] for row in rows if row in span] for span in spans]
    assert passes[0] != passes[1] != passes[2] != passes[0]
    turns = [order.span_of(step) for step in range(18)]
    assert sorted(turns[:9]) == sorted(turns[9:]) == [0] * 3 + [1] * 3 + [2] * 3 and turns[:9] != turns[9:] != sorted(
        turns[9:]
    )


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 12), st.integers(0, 5))
def test_batches_are_of_one_span_and_no_row_waits_or_is_lost(lengths, batch, seed):
    spans = spans_of(lengths)
    order, total = BatchOrder(spans, batch, seed), sum(lengths)
    for epochs in (1, 3):
        steps = sum(-(-epochs * length // batch) for length in lengths)
        seen = [order.rows_of(step) for step in range(steps)]
        counts = Counter(row for rows in seen for row in rows)
        for span in spans:
            assert all(epochs <= counts[row] <= epochs + -(-batch // len(span)) for row in span)
        for step, rows in enumerate(seen):
            assert len(rows) == batch and set(rows) <= set(spans[order.span_of(step)])
    for span in spans:  # the rows of a span, in order of time, are one permutation after the other
        of_span = [row for rows in seen for row in rows if row in span]
        passes = [of_span[at : at + len(span)] for at in range(0, len(of_span) - len(span) + 1, len(span))]
        assert all(sorted(part) == list(span) for part in passes)
    if all(length % batch == 0 for length in lengths):
        assert sorted(row for rows in seen[: total // batch] for row in rows) == list(range(total))
    assert BatchOrder(spans, batch, seed).rows_of(len(seen) - 1) == seen[-1]


class Seen(MixedRows):
    def batch(self, indices):
        self.read = [*getattr(self, "read", []), list(indices)]
        return super().batch(indices)


def read_by(world, rank, start):
    """(step, rows) of the micro-batches that a rank reads from step ``start`` on, and its draws of t."""
    micro = 6 // world // (2 if world == 1 else 1)
    settings = SimpleNamespace(batch=6, steps=24)
    engine = SimpleNamespace(
        settings=settings,
        step_count=start,
        rank=rank,
        micro_batch=micro,
        accumulation=6 // world // micro,
        device=torch.device("cpu"),
    )
    rows = Seen()
    found = {}
    with closing(_feed(engine, rows, lambda shape: SAMPLING, seed=5)) as feed:
        for step in range(start, settings.steps):
            for positions in positions_of(engine):
                z0, _, draws = feed.take((step, positions))
                assert z0.shape[1:] == draws.eps.shape[1:] and tuple(z0.shape[1:]) in rows.shapes
                found.setdefault(step, []).extend(zip(rows.read.pop(0), draws.t.tolist(), strict=True))
    return found


def test_ranks_and_a_resumed_run_read_the_same_rows():
    """What the ranks' feeds read, joined, against one process and against feeds that begin at step 7; equal, draws
    too.
    """
    alone = read_by(1, 0, 0)
    assert [row for row, _ in alone[5]] == BatchOrder(MixedRows().spans, 6, 5).rows_of(5)
    for world, start in ((2, 0), (3, 0), (3, 7)):
        parts = [read_by(world, rank, start) for rank in range(world)]
        joined = {step: [pair for part in parts for pair in part[step]] for step in parts[0]}
        assert joined == {step: pairs for step, pairs in alone.items() if step >= start}


DYNAMIC = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 2,
    "max_image_seq_len": 20,
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Losses of a run on three shapes that was not disturbed; (shape, t) of its training batches."""
    seen, flow_loss = [], objective.flow_loss

    def watched(family, model, z0, text, draws, null, weighting):
        seen.append((tuple(z0.shape[1:]), draws.t))
        return flow_loss(family, model, z0, text, draws, null, weighting)

    folder = tmp_path_factory.mktemp("mixed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dcgen_convert.train.phases.flow_loss", watched)
        metrics, _ = adapt(folder, mixed=True, scheduler=DYNAMIC, held_out=MixedRows((4, 1, 3), seed=9))
    return losses(folder), seen, metrics


def test_noise_levels_are_shifted_by_the_tokens_of_their_own_shape(mixed):
    """Every t drawn, and the held-out quantiles, against the family's shift at the batch's own tokens; equal."""
    _, seen, metrics = mixed
    training = [(shape, t) for shape, t in seen if len(t) == 6]
    assert {shape for shape, _ in training} == set(MixedRows().shapes) and len(training) == 12
    for step, (shape, t) in enumerate(training):
        sampling = Sampling("logit-normal", FLUX.shift(shape[1] * shape[2], DYNAMIC), (1.0, 5.0), 0.1)
        assert torch.equal(t, objective.draw(0, step, range(6), shape, sampling).t)
    median = torch.zeros((), dtype=torch.float64)
    expected = {
        shape: t_of_normal(
            median, Sampling("logit-normal", FLUX.shift(shape[1] * shape[2], DYNAMIC), (1.0, 5.0), 0.1)
        ).item()
        for shape in MixedRows().shapes
    }
    held = {(shape, round(t[0].item(), 6)) for shape, t in seen if len(t) < 6}
    assert {(shape, round(t, 6)) for shape, t in expected.items()} <= held
    mean = sum(count * t for count, t in zip((4, 1, 3), expected.values(), strict=True)) / 8
    assert list(metrics["evaluation"]["before"])[2] == f"t{mean:.2f}"


def test_three_ranks_and_a_resumed_run_train_on_shapes_as_one_process(mixed, tmp_path):
    """Real processes; loss within 1e-6, and bitwise after a resume on the same layout."""
    reference, _, _ = mixed
    job = {"mixed": True, "scheduler": DYNAMIC, "saving": [4, 0.0]}
    run_ranks(3, [{"folder": str(tmp_path / "ranks"), **job}], tmp_path / "ranks.log")
    assert losses(tmp_path / "ranks") == pytest.approx(reference, abs=1e-6)
    adapt(tmp_path / "resumed", mixed=True, scheduler=DYNAMIC, saving=(4, 0.0))
    newest = sorted((tmp_path / "resumed" / "checkpoints").iterdir())[-1]
    (newest / "checkpoint.json").unlink()
    metrics, _ = adapt(tmp_path / "resumed", mixed=True, scheduler=DYNAMIC, saving=(4, 0.0))
    assert metrics["resumed_from"] == 8 and losses(tmp_path / "resumed") == reference


def test_tokens_per_second_are_those_of_the_shape(mixed, tmp_path):
    seen = []
    console = SimpleNamespace(advance=lambda *args, **info: seen.append(info))
    console.progress = lambda *args: _Bar(console)
    console.say = console.scalars = lambda *args, **more: None
    adapt(tmp_path, mixed=True, scheduler=DYNAMIC, phase={"steps": 8}, console=console)
    tokens = [round(info["tokens_per_s"] / info["samples_per_s"]) for info in seen]
    order, rows = BatchOrder(MixedRows().spans, 6, 0), MixedRows()
    shapes = [rows.shapes[order.span_of(step)] for step in range(8)]
    assert tokens == [shape[1] * shape[2] + 3 for shape in shapes] and len(set(tokens)) > 1
    assert len(Rows(1).spans) == 1


class _Bar:
    def __init__(self, console):
        self.console = console

    def __enter__(self):
        return self.console

    def __exit__(self, *args):
        return None
