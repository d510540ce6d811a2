"""Which prompt a picture of a run gets, and that it keeps it."""

import pytest

from dcgen_convert.core.console import NULL
from dcgen_convert.core.files import read_json, write_json
from dcgen_convert.core.journal import Found, Run, Wanted, fingerprint
from dcgen_convert.data import earlier_prompts, prompts
from dcgen_convert.recipe.loading import load
from dcgen_convert.stages import captions
from dcgen_convert.stages.job import prepare


def job(run, prompts, source="tiny-flux", **settings):
    sets = [f"{key}={value}" for key, value in settings.items()]
    return prepare(load(source, flags={"data.prompts": str(prompts)}, sets=sets), Run(run, NULL), NULL)


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("".join(f"prompt {i}\n" for i in range(9)))
    return path


@pytest.mark.parametrize("kind", ["builtin", "a list"])
def test_a_run_that_began_before_prompts_were_shuffled_goes_on_with_its_own(kind, lines, tmp_path):
    run, name = Run(tmp_path / "run", NULL), lines if kind == "a list" else kind

    def before(count):
        return earlier_prompts.of_file(lines, count) if kind == "a list" else earlier_prompts.builtin(count, 0)

    assert captions.texts_of(job(tmp_path / "new", name), 7) == prompts.make(str(name), 7, 0) != before(7)
    inputs = {"data.count": 7, captions.CAPTIONS: fingerprint(before(7))}
    with run.stage(Wanted("data", inputs), Found("nothing")):
        assert captions.texts_of(job(run.path, name), 7) == before(7)  # unfinished
    assert captions.texts_of(job(run.path, name), 12) == before(12)
    captions.keep(job(run.path, name))
    assert captions.texts_of(job(run.path, name), 12) == before(12)


def test_the_prompts_of_a_run_survive_a_longer_list_and_another_count(lines, tmp_path):
    (tmp_path / "run" / "data").mkdir(parents=True)
    first = job(tmp_path / "run", lines, **{"data.count": 12})
    captions.keep(first)
    begun = captions.texts_of(first, 12)
    lines.write_text(lines.read_text() + "more\nand more\n")
    fewer = job(tmp_path / "run", lines, **{"data.count": 4})
    assert captions.texts_of(fewer, 4) == begun[:4]
    captions.keep(fewer)  # forgets nothing
    again = captions.texts_of(job(tmp_path / "run", lines), 14)
    assert again[:12] == begun and set(again[12:]) == {"more", "and more"}
    other = job(tmp_path / "run", lines, seed=1)
    assert captions.texts_of(other, 11) == prompts.make(str(lines), 11, 1)


def test_a_damaged_record_of_prompts_is_not_believed(lines, tmp_path):
    (tmp_path / "run" / "data").mkdir(parents=True)
    captions.keep(job(tmp_path / "run", lines, **{"data.count": 3}))
    path = tmp_path / "run" / "data" / captions.FILE
    document = read_json(path)
    for damaged in (path.read_text()[:40], None):
        if damaged is None:
            write_json(path, {**document, "captions": ["prompt 8", "prompt 7", "prompt 6"]})
        else:
            path.write_text(damaged)
        assert captions.texts_of(job(tmp_path / "run", lines), 3) == prompts.make(str(lines), 3, 0)
