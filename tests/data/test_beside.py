"""What edited pictures were made from, in every form of data: tables, files beside the picture, shards, the hub."""

import json
import tarfile

import pyarrow
import pyarrow.parquet
import pytest

from dcgen_convert.core.errors import InputError
from dcgen_convert.data import beside, decoding, given
from dcgen_convert.data.sieve import Sieve, square

from .test_given import add, picture, take

COUNT = 4


def sources_of(number):
    """Which pictures the picture ``number`` was made from, in this order: one, two or none."""
    return [[100 + number], [210 + number, 200 + number], []][number % 3]


def red(file):
    return decoding.decode(file)[0].getpixel((0, 0))[0]


def require_sources(pictures):
    assert len(pictures) == COUNT
    for one in pictures:
        number = int(one.caption.split()[1])
        assert red(one.file) == number and [red(file) for file in one.references] == sources_of(number)


def write_files(folder):
    (folder / "before").mkdir(parents=True)
    for number in range(COUNT):
        (folder / f"{number}.png").write_bytes(picture(number))
        for source in sources_of(number):
            (folder / "before" / f"{source}.png").write_bytes(picture(source))
    return folder


def write_table(folder, name):
    rows = []
    for number in range(COUNT):
        names = [f"before/{source}.png" for source in sources_of(number)]
        row = {"file_name": f"{number}.png", "text": f"edit {number}"}
        listed = {"source": names}
        apart = {"source": names[0] if names else "", "source-2": names[1] if len(names) > 1 else ""}
        rows.append(row | (listed if name.endswith(("jsonl", "parquet")) else apart))
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    elif name.endswith("jsonl"):
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    else:
        mark = "," if name.endswith("csv") else "\t"
        (folder / name).write_text("\n".join(mark.join(values) for values in [[*rows[0]], *(r.values() for r in rows)]))


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.parquet"])
def test_a_table_of_a_folder_names_the_sources_which_are_no_pictures_of_their_own(name, tmp_path):
    folder = write_files(tmp_path / "mine")
    write_table(folder, name)
    require_sources(take(tmp_path / "work", folder, edited=True)[0])
    assert given.most_references(given.parse_all([str(folder)])) == 2
    for number in range(COUNT):  # beside captions in files too
        (folder / f"{number}.txt").write_text(f"edit {number}")
    require_sources(take(tmp_path / "work", folder, edited=True)[0])


def test_a_model_that_draws_from_text_alone_does_not_look_for_sources(tmp_path):
    """A table that it does not need may be damaged, and every picture needs a caption."""
    folder = write_files(tmp_path / "mine")
    (folder / "metadata.csv").write_text("text,text")
    for number in range(COUNT):
        (folder / f"{number}.txt").write_text(f"edit {number}")
    with pytest.raises(InputError, match=r"4 of 8 images have no caption|names a column twice"):
        take(tmp_path / "work", folder)
    for file in (folder / "before").iterdir():
        file.unlink()
    assert len(take(tmp_path / "work", folder)[0]) == COUNT
    with pytest.raises(InputError, match="names a column twice"):
        take(tmp_path / "work", folder, edited=True)


def test_files_beside_a_picture_are_its_sources(tmp_path):
    for number in range(COUNT):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
        (tmp_path / f"{number}.txt").write_text(f"edit {number}")
        for place, source in enumerate(sources_of(number), 1):
            (tmp_path / f"{number}.source{f'-{place}' if place > 1 else ''}.png").write_bytes(picture(source))
    require_sources(take(tmp_path / "work", tmp_path, edited=True)[0])
    sources = given.parse_all([str(tmp_path)])
    assert given.most_references(sources) == 2
    assert given.held(sources, 100, Sieve(1, "x", square(1))) == COUNT  # what is priced is what is taken
    (tmp_path / "0.source.txt").write_text("edit 100")  # with a caption it is a picture too
    found = {one.file.name: one.references for one in take(tmp_path / "work", tmp_path, edited=True)[0]}
    assert len(found) == COUNT + 1 and [file.name for file in found["0.png"]] == ["0.source.png"]


def write_tar(path):
    with tarfile.open(path, "w") as tar:
        for number in range(COUNT):
            for place, source in reversed([*enumerate(sources_of(number), 1)]):  # they come before the picture
                add(tar, f"{number}.source{f'-{place}' if place > 1 else ''}.png", picture(source))
            add(tar, f"{number}.png", picture(number))
            add(tar, f"{number}.txt", f"edit {number}".encode())
    return path


def write_parquet(path, column="source", shown="image"):
    """A list of structs, as the hub's `Image` features are; with another name the first source alone."""
    rows = []
    for number in range(COUNT):
        cells = [{"bytes": picture(source), "path": None} for source in sources_of(number)]
        row = {shown: {"bytes": picture(number), "path": "a.png"}, "text": f"edit {number}"}
        rows.append(row | ({column: cells} if column == "source" else apart(column, cells)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def apart(column, cells):
    cells = [*cells, None, None]
    return {column: cells[0], "source-2": cells[1] and cells[1]["bytes"]}


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: write_tar(folder / "a.tar"),
        lambda folder: write_parquet(folder / "a.parquet"),
        lambda folder: write_parquet(folder / "a.parquet", "src_img", "edited_img"),
    ],
    ids=["tar", "parquet", "parquet-of-omniedit"],
)
def test_shards_hold_the_sources_beside_the_pictures(write, tmp_path):
    path = write(tmp_path)
    require_sources(take(tmp_path / "work", path, edited=True)[0])
    again, _ = take(tmp_path / "work", path, edited=True)  # from what was copied
    require_sources(again)
    sources = given.parse_all([str(path)])
    assert given.most_references(sources) == 2 and given.held(sources, 100, Sieve(1, "x", square(1))) == COUNT
    plain, _ = take(tmp_path / "other", path)  # a model that draws from text alone copies none
    assert len(plain) == COUNT and not any(one.references for one in plain)
    assert not [*(tmp_path / "other").rglob("*.source*")]


def test_a_cell_of_a_source_without_its_bytes_is_refused_with_its_row_and_texts_are_none(tmp_path):
    rows = [
        {"image": picture(n), "text": f"edit {n}", "source": {"bytes": picture(9), "path": "9.png"}} for n in range(3)
    ]
    rows[1]["source"]["bytes"] = None
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet row 2: its source 1 holds no bytes of a picture"):
        take(tmp_path / "work", tmp_path / "a.parquet", edited=True)
    rows = [{"image": picture(n), "text": f"edit {n}", "source": "some site"} for n in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    pictures, _ = take(tmp_path / "work", tmp_path / "a.parquet", edited=True)
    assert len(pictures) == 3 and not any(one.references for one in pictures)
    assert given.most_references(given.parse_all([str(tmp_path)])) == 0


def test_a_data_set_of_the_hub_brings_its_sources(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    root = tmp_path / "hub" / "datasets--org--edits"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("a" * 40)
    folder = root / "snapshots" / ("a" * 40) / "data"
    folder.mkdir(parents=True)
    write_parquet(folder / "train-0.parquet")
    require_sources(take(tmp_path / "work", "hf://datasets/org/edits", offline=True, edited=True)[0])


@pytest.mark.parametrize(
    "names, found",
    [
        (["image", "source-2", "source", "text", "source-10"], ["source", "source-2", "source-10"]),
        (["input_image", "edited_image"], ["input_image"]),
        (["source-2", "text"], []),
        (["sources", "resource", "source-1"], []),
    ],
)
def test_columns_that_hold_sources(names, found):
    assert beside.columns(names) == found
