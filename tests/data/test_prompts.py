"""Prompts: lists of the user's in every form, the built-in ones, and how they are given to pictures."""

import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from dcgen_convert.core.errors import AccessError, InputError
from dcgen_convert.data import earlier_prompts, grammar, hub, prompt_lists, prompts

TEXTS = ("a red fox", "a blue, wet fox", 'a "green" fox', "ein Bär\u2028mit Hut")


def write(folder, suffix, texts=TEXTS, column="caption", bom=False):
    """A file of ``suffix`` with these texts."""
    path, rows = folder / f"list{suffix}", [{"id": i, column: text} for i, text in enumerate(texts)]
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    separator = {".csv": ",", ".tsv": "\t"}.get(suffix)
    if suffix == ".txt":
        lines = ["# a comment", "", *(f"  {text} " for text in texts)]
    elif suffix == ".jsonl":
        lines = [json.dumps(row) for row in rows]
    else:
        quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
        lines = [separator.join(("id", column)), *(f"{i}{separator}{text}" for i, text in enumerate(quoted))]
    path.write_bytes(b"\xef\xbb\xbf" * bom + "\r\n".join([*lines, ""]).encode())
    return path


@pytest.mark.parametrize("suffix", prompt_lists.KINDS)
@pytest.mark.parametrize("bom", [False, True])
def test_a_list_is_read_from_every_kind_of_file(suffix, bom, tmp_path):
    path = write(tmp_path, suffix, bom=bom)
    assert prompt_lists.read(str(path)).texts == TEXTS
    assert prompt_lists.read(str(tmp_path)).texts == TEXTS  # a folder
    if suffix != ".txt":
        assert prompt_lists.read(f"{path}:caption").texts == TEXTS
        assert prompt_lists.read(f"{tmp_path}:caption").texts == TEXTS
        other = write(tmp_path, suffix, column="long text", bom=bom)
        assert prompt_lists.read(f"{other}:long text").texts == TEXTS
        with pytest.raises(InputError, match=r"no column prompt or caption or text; it has id, long text"):
            prompt_lists.read(str(other))
        with pytest.raises(InputError, match=r"no column 'tags'; it has id, long text"):
            prompt_lists.read(f"{other}:tags")
    else:
        with pytest.raises(InputError, match="has no columns"):
            prompt_lists.read(f"{path}:caption")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b" \n# only this\n", "is empty"),
        ("a.csv", b"", "is empty"),
        ("a.csv", b"prompt,n\na fox,1,2\n", "line 2 has 3 values for 2 columns"),
        ("a.csv", b'prompt\n"a fox\n', r"line \d cannot be read"),
        ("a.csv", b"prompt\n" + b"x" * 140_000 + b"\n", "line 2 cannot be read"),
        ("a.csv", b"prompt,prompt\na,b\n", "names a column twice"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": ["b"]}\n', "row 2: prompt is no text"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\\ud800"}\n', "row 2: prompt holds half of a surrogate pair"),
        ("a.jsonl", b'{"prompt": "a"}\n[1]\n', "line 2 is no object"),
        ("a.jsonl", b'{"prompt": "a"}\n{\n', "line 2 is no JSON"),
        ("a.jsonl", b'{"prompt": "a"}\n\xff\n', "is not UTF-8 text, after line"),
        ("a.tsv", b"prompt\na\0b\n", "line 2 holds a zero byte"),
        ("a.parquet", b"PAR1 nothing PAR1", "a.parquet is damaged"),
        ("a.txt", b"a\xffb", "is not UTF-8 text"),
    ],
)
def test_a_list_that_cannot_be_read_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as found:
        prompt_lists.read(str(tmp_path / name))
    assert name in found.value.message and found.value.hint


def test_a_missing_list_is_named(tmp_path):
    for name in ("none.txt", "none.csv:caption", "hf://datasets/alone:text", "hf://models/a/b:text"):
        with pytest.raises(InputError, match=r"does not exist|is no data set of the hub"):
            prompt_lists.read(str(tmp_path / name) if name.startswith("none") else name)


def test_a_data_set_of_the_hub_is_read_from_the_cache_and_named_where_it_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(AccessError, match="data set org/name is not in the local cache") as missing:
        prompt_lists.read("hf://datasets/org/name:caption", offline=True)
    assert missing.value.hint.endswith("hf download --repo-type dataset org/name")
    store, commit = tmp_path / "datasets--org--name", "a" * 40
    folder = store / "snapshots" / commit / "data"
    folder.mkdir(parents=True)
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text(commit)
    write(folder, ".parquet")
    (folder / "more.csv").write_text("caption\na cat\n")
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path), raising=False)
    read = {
        name: prompt_lists.read(f"hf://datasets/org/{name}", offline=True).texts
        for name in ("name:caption", "name", "name@main/data", "name/data/more.csv:caption")
    }
    assert read == dict.fromkeys(read, (*TEXTS, "a cat")) | {"name/data/more.csv:caption": ("a cat",)}
    with pytest.raises(InputError, match="has no files of the kinds"):
        hub.fetch("hf://datasets/org/name/other", prompt_lists.KINDS, offline=True)


def test_repetitions_and_empty_rows_are_left_out_and_told(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt": " a "}\n{"prompt": null}\n{"prompt": 7}\n')
    found = prompt_lists.read(str(tmp_path / "a.jsonl"))
    assert found == prompt_lists.PromptList(("a", "7"), 3, 1)
    told = "list: 1 of its 3 prompts are repetitions and are left out; 1 rows are empty"
    assert found.told("list", 2) == told
    assert found.told("list", 5) == f"{told}; 2 prompts for 5 pictures: they are used again, with other noise"
    assert found.told("list", 1) == f"{told}; 2 prompts for 1 pictures: 1 are not used"
    assert prompt_lists.PromptList(("a", "b"), 2, 0).told("list", 2) == ""


def test_a_list_is_shuffled_by_the_seed_and_comes_whole_before_one_is_used_again():
    texts = tuple(f"prompt {i}" for i in range(50))
    drawn = prompts.of_list(texts, 120, 3)
    assert drawn == prompts.of_list(texts[::-1], 120, 3) != prompts.of_list(texts, 120, 4)
    assert sorted(drawn[:50]) == sorted(texts) and drawn[:50] != [*texts] and drawn[50:100] == drawn[:50]
    assert prompts.of_list(texts, 70, 3) == drawn[:70]


def test_pictures_keep_their_prompts_when_the_list_grows():
    few, many = tuple(f"prompt {i}" for i in range(20)), tuple(f"prompt {i}" for i in range(60))
    begun = prompts.of_list(few, 30, 0)
    grown = prompts.of_list(many, 80, 0, begun)
    assert grown[:30] == begun and set(grown[30:70]) == set(many) - set(few)
    assert prompts.of_list(many, 10, 0, begun) == begun[:10]
    assert prompts.of_list(many[1:], 80, 0, begun) == prompts.of_list(many[1:], 80, 0)  # one of theirs is gone


def test_builtin_prompts_show_every_noun_and_then_every_subject_before_one_comes_again():
    nouns, subjects = grammar.nouns(), grammar.subjects()
    assert nouns > 400 and subjects > 10_000
    drawn = prompts.make("builtin", 2 * subjects, 1)
    shown = [text.split(": ", 1)[1] for text in drawn]
    every = [words for _, words in grammar.islice(grammar._subjects(1), 2 * subjects)]
    assert all(text.startswith(f"{words}, ") for text, words in zip(shown, every, strict=True))
    assert len(set(every[:subjects])) == len(set(every)) == subjects
    noun_of = {
        grammar._subject(noun, phrase): noun
        for group in grammar.GROUPS
        for noun in group.nouns
        for phrase in group.phrases
    }
    assert len(noun_of) == subjects and len({noun_of[words] for words in every[:nouns]}) == nouns
    assert not [text for text in drawn if re.search(r"\b(a|an) (\w+ )?(a|an) |\{|\}|  ", text)]
    assert prompts.make("builtin", 99, 1) == drawn[:99] != prompts.make("builtin", 99, 2)


def test_too_many_pictures_for_the_builtin_prompts_are_told():
    assert prompts.doubt("builtin", prompts.MANY) == prompts.doubt("p.txt", 10**6) == ""
    text = prompts.doubt("builtin", 100_000)
    assert f"{grammar.subjects():,} subjects" in text and "--prompts FILE" in text


def test_the_prompts_of_earlier_runs_stay_what_they_were(tmp_path):
    assert earlier_prompts.builtin(2, 0) == [
        "a children's book illustration of a coral reef in a dense forest in soft window light, reflections",
        "a children's book illustration of a greenhouse in a subway station in neon light, symmetrical composition",
    ]
    (tmp_path / "p.txt").write_text("# one\n\n two \n")
    assert earlier_prompts.of_file(tmp_path / "p.txt", 3) == ["# one", "two", "# one"]
