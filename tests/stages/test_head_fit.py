"""The least squares of the head on the miniature: against a dense solver, cut off, with two ranks, with other rows."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dcgen_convert import conversion
from dcgen_convert.core import names
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.journal import Run, Stage
from dcgen_convert.recipe import head_rows
from dcgen_convert.recipe.head_rows import ends, head_samples, reason_to_end
from dcgen_convert.recipe.loading import load
from dcgen_convert.stages import align_head, head_fit
from dcgen_convert.stages.head_fit import HeadFit, Ledger, held_out, shuffled
from dcgen_convert.stages.job import prepare
from dcgen_convert.train import objective, phases

SPANS = [range(0, 40), range(40, 77)]


class Bar:
    """Counts samples; stops the work when there have been ``most``."""

    def __init__(self, most=10**9):
        self.done, self.most = 0, most

    def advance(self, n=1, **info):
        self.done += n
        if self.done >= self.most:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def job(converted):
    return prepare(conversion.recorded(converted / "run")[0], Run(converted / "run", NULL), NULL)


@pytest.fixture(scope="module")
def task(job):
    rows = job.rows(job.resolution).split()[0]
    model = align_head.surgical(job, job.folders.align_embedder / names.MODULES, "cpu")
    return phases.Task(model, job.family, job.recipe.adapt, rows, job.scheduler)


@pytest.fixture(scope="module")
def unseen(job):
    return job.rows(job.resolution).split()[1]


@pytest.fixture(scope="module")
def fit(job, task, unseen, tmp_path_factory):
    """fit(folder, rank, world): the fit of one rank. Its solutions come with 2 rows per input, 4, 8 and all."""
    root = tmp_path_factory.mktemp("fits")

    def make(folder, rank=0, world=1):
        return HeadFit(replace(job, crew=SimpleNamespace(rank=rank, world=world)), task, unseen, root / folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_rows, "FIRST", 2)
        yield make


@pytest.fixture(scope="module")
def whole(fit):
    """The ledger of one rank that was not disturbed."""
    return finish(fit("whole"))


def finish(fit, bar=None, ranks=(), parts=5):
    """Work through the parts, whatever the losses; ``ranks``: the other ranks' fits. The ledger."""
    ledger = Ledger.open(fit)
    with torch.no_grad():
        for number in range(ledger.begun, parts):
            for one in (fit, *ranks):
                with one.listening():
                    one.own_sums(number, bar or Bar())
            ledger.add(number)
    return ledger


def test_every_draw_takes_every_row_once_and_a_beginning_stands_for_all():
    units = shuffled(SPANS, 3, seed=5)
    for number in range(3):
        mine = [unit.rows for unit in units if unit.number == number]
        assert sorted(row for rows in mine for row in rows) == list(range(77))
        assert all(len(rows) <= head_rows.UNIT and len({row < 40 for row in rows}) == 1 for rows in mine)
        assert mine != [unit.rows for unit in units if unit.number == (number + 1) % 3]
    assert {row < 40 for unit in units[:3] for row in unit.rows} == {True, False}
    assert [unit.number for unit in units] == sorted(unit.number for unit in units)
    assert shuffled(SPANS, 3, seed=5) == units != shuffled(SPANS, 3, seed=6)


def test_the_pictures_that_decide_come_from_everywhere_at_every_level():
    spans = [range(0, 300), range(300, 400)]
    chosen = [unit.rows for unit in held_out(spans) if unit.number == 4]
    assert [row for rows in chosen for row in rows] == list(range(0, 400, 4))
    assert len(held_out(spans)) == len(objective.QUANTILES) * len(chosen) and head_rows.LEVELS == 5


@pytest.mark.parametrize(
    "rows, inputs, found",
    [
        ([10] * 100, 10, [16, 32, 64, 100]),
        ([10] * 16, 10, [16]),
        ([10] * 5, 10, [5]),  # fewer than the first solution needs
        ([500, 500, 500], 10, [1, 2, 3]),
        ([1000], 1, [1]),
    ],
)
def test_solutions_come_with_twice_the_rows_each(rows, inputs, found):
    assert ends(rows, inputs) == found


@pytest.mark.parametrize(
    "losses, last, ended",
    [
        ([2.0], False, None),
        ([2.0], True, "all rows"),
        ([2.0, 1.99], True, "all rows"),
        ([2.0, 1.97], False, None),
        ([2.0, 1.97, 1.96], False, "less than 1%"),
        ([1.9, 2.0], False, None),  # worse: not settled
    ],
)
def test_the_fit_ends_when_twice_the_rows_change_little(losses, last, ended):
    reason = reason_to_end(losses, last)
    assert reason == ended or ended in reason


def test_what_a_recipe_costs():
    flux = load("flux-dev", sets=["data.count=100000", "align_head.draws=8"]).recipe
    assert vars(head_samples(flux, 3072, 256)) == {"usual": 3072, "most": 99_488 * 4, "held_out": 640, "passes": 2}
    assert head_rows.useful_draws(10**9, 1472, 128) == 2850 and head_rows.useful_draws(8, 10**12, 128) == 1
    assert head_samples(load("dit-xl-512").recipe, 1152, 256).passes == 1
    assert head_samples(load("ablations/no-alignment").recipe, 128, 16) == head_rows.HeadSamples(0, 0, 0, 0)


def test_the_cost_is_that_of_the_fit(job, task, whole):
    parts, expected = whole.fit.parts, head_samples(job.recipe, 128, 16)
    assert sum(len(unit.rows) for part in parts[1:] for unit in part) == expected.most == len(task.rows)
    assert sum(len(unit.rows) for unit in parts[0]) == expected.held_out


def test_all_rows_give_the_least_squares_optimum(job, task, unseen, whole):
    """Against a dense solver in float64, on features that were taken in the order of the rows: held-out loss to 1e-4
    (ridge 1e-6, other batches). That loss is the one that the model itself has with this head.
    """
    rows, design, goals, seen = task.rows, [], [], []
    head = task.model.get_submodule(job.family.head)
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for part in (range(46), range(46, 92)):
        z0, text = rows.batch(list(part))
        drawn = objective.draw(job.recipe.seed, head_fit.DRAW_STREAM, part, z0.shape[1:], task.sampling(z0.shape[1:]))
        z, null = (
            objective.noised(z0, drawn.eps, drawn.t),
            {key: value.expand(46, *value.shape[1:]) for key, value in rows.null.items()},
        )
        seen.clear()
        with torch.no_grad():
            for words, guidance in (
                (objective.drop_text(text, rows.null, drawn.dropped), drawn.guidance),
                (null, torch.ones(46)),
            ):
                objective.predict(job.family, task.model, z, drawn.t, words, guidance)
        guided, unguided = (features[:, -16:].double() for features in seen)
        shown = job.recipe.adapt.data_guidance / drawn.guidance.double()[:, None, None]
        design.append((unguided + shown * (guided - unguided)).flatten(0, 1))
        goals.append((drawn.eps - z0).flatten(2).movedim(1, 2).flatten(0, 1).double())
    handle.remove()
    best = torch.linalg.lstsq(torch.cat([torch.cat(design), torch.ones(16 * 92, 1)], 1), torch.cat(goals)).solution
    found = whole.losses[-1]
    assert found == pytest.approx(whole.unseen.mse(best[:-1].T, best[-1]), rel=1e-4)
    with torch.no_grad():
        head.weight.copy_(whole.solution[0])
        head.bias.copy_(whole.solution[1])
    assert align_head.heldout_loss(job, task, unseen) == pytest.approx(found, rel=1e-4)


def test_a_fit_that_was_cut_off_goes_on_to_the_same_bits(fit, whole, monkeypatch):
    """Stopped in the held-out part, then between two parts: a unit was lost each time, and all others are kept."""
    monkeypatch.setattr(head_fit, "SAVE_SECONDS", -1)
    add, added = HeadFit.add, []
    monkeypatch.setattr(HeadFit, "add", lambda *at: (added.append(at[2]), add(*at)))
    bars = Bar(10), Bar(80), Bar()
    for bar in bars[:2]:
        with pytest.raises(KeyboardInterrupt):
            finish(fit("cut off"), bar)
    ledger = finish(fit("cut off"), bars[2])
    assert ledger.losses == whole.losses and len(whole.losses) == 4
    assert all(torch.equal(a, b) for a, b in zip(ledger.solution, whole.solution, strict=True))
    assert len(added) == sum(map(len, whole.fit.parts)) + 2
    assert Ledger.open(fit("cut off")).reason == whole.reason == "these are all rows"


def test_two_ranks_agree_with_one_and_one_goes_on_where_two_had_finished_a_part(fit, whole):
    """The order of float64 sums differs: the weights agree to 1e-6 of the largest, the losses to 1e-9."""
    first, second = (fit("two", rank, 2) for rank in (0, 1))
    for folder, parts in (("two", 5), ("changed", 2)):
        for rank in (first, second):
            rank.folder = rank.folder.parents[1] / folder / head_fit.SUMS
        ledger = finish(first, ranks=[second], parts=parts)
        assert ledger.losses == pytest.approx(whole.losses[: parts - 1], rel=1e-9)
        if parts == 5:
            for a, b in zip(ledger.solution, whole.solution, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * b.abs().max().item())
    with torch.no_grad(), first.listening():
        first.own_sums(2, Bar())  # is lost
    bar = Bar()
    assert finish(fit("changed"), bar).losses == pytest.approx(whole.losses, rel=1e-9)
    assert bar.done == sum(len(unit.rows) for part in whole.fit.parts[2:] for unit in part)


def test_sums_of_other_rows_are_not_used(fit, whole):
    assert Ledger.open(fit("whole")).begun == 5
    other = fit("whole")
    other.key = "0" * 16
    assert Ledger.open(other).begun == 0 and Ledger.open(fit("whole")).begun == 0


def test_a_stage_that_was_cut_off_in_its_training_keeps_its_start(job, tmp_path, monkeypatch):
    said = []
    recipe = job.recipe.model_copy(update={"align_head": job.recipe.align_head.model_copy(update={"steps": 0})})
    for name in ("surgery", "latents", "align-embedder"):
        (tmp_path / name).symlink_to(job.run.path / name)
    console = Console("quiet")
    monkeypatch.setattr(console, "say", said.append)
    job = replace(job, recipe=recipe, run=Run(tmp_path, NULL), console=console)
    stages = [Stage(job.folders.align_head) for _ in range(3)]
    stages[0].folder.mkdir()
    align_head.run(job, stages[0])
    modules = (stages[0].folder / names.MODULES).read_bytes()
    metrics = stages[0].metrics
    assert metrics["rows"] == metrics["rows_most"] == 92 * 16 and "all rows" in metrics["rows_reason"]
    assert any("1,472 of at most 1,472 rows: these are all rows" in line for line in said)
    assert not (stages[0].folder / head_fit.SUMS).exists()
    said.clear()
    align_head.run(job, stages[1])
    assert said == [] and stages[1].metrics == metrics
    assert (stages[0].folder / names.MODULES).read_bytes() == modules
    start = stages[0].folder / align_head.START
    start.write_bytes(start.read_bytes()[:-1] + b"\1")  # damaged
    align_head.run(job, stages[2])
    assert said and (stages[0].folder / names.MODULES).read_bytes() == modules


def test_the_fit_ends_early(job, task, unseen, whole, tmp_path, monkeypatch):
    """When any change of the loss is small enough, with the second solution."""
    monkeypatch.setattr(head_rows, "ENOUGH", 1e9)
    found = align_head.start_head(job, task, unseen, tmp_path)
    assert found["rows"] == sum(whole.fit.rows[1:3]) < found["rows_most"] == sum(whole.fit.rows[1:])
    assert found["loss_by_rows"] == whole.losses[:2] and "the last doubling" in found["rows_reason"]
    assert align_head.heldout_loss(job, task, unseen) == pytest.approx(found["loss_by_rows"][-1], rel=1e-4)
