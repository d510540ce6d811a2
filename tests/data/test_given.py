"""The user's pictures in shards, in the hub's folders, on the hub, and from several sources with shares."""

import io
import json
import os
import tarfile
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from dcgen_convert.core.errors import AccessError, InputError
from dcgen_convert.data import decoding, given, shards


def picture(number, kind="PNG"):
    """Bytes of a picture that shows ``number`` as its red."""
    file = io.BytesIO()
    Image.new("RGB", (12, 8), (number, 0, 0)).save(file, format=kind)
    return file.getvalue()


def add(tar, name, content, **fields):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in fields.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def write_tar(path, numbers, name="{:05d}"):
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            stem = name.format(number)
            add(tar, f"{stem}.jpg" if number % 2 else f"{stem}.png", picture(number, "JPEG" if number % 2 else "PNG"))
            if number % 3:
                add(tar, f"{stem}.txt", f" picture {number}\n".encode())
            else:
                add(tar, f"{stem}.json", json.dumps({"width": 12, "caption": f"picture {number}"}).encode())
    return path


def write_parquet(path, numbers, caption="text"):
    rows = [{"image": {"bytes": picture(n), "path": f"../{n}.png"}, caption: f"picture {n}"} for n in numbers]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_folder(path, numbers):
    path.mkdir()
    for number in numbers:
        (path / f"{number:03d}.png").write_bytes(picture(number))
        (path / f"{number:03d}.txt").write_text(f"picture {number}")
    return path


def take(work, *texts, count=1000, **rest):
    return given.take(given.parse_all([str(text) for text in texts]), count, work, **rest)


def shown(pictures):
    """The numbers that the pictures show; each must have the caption that belongs to it."""
    numbers = []
    for one in pictures:
        image, _ = decoding.decode(one.file)
        number = int(one.caption.split()[1])
        assert abs(image.getpixel((0, 0))[0] - number) <= 2  # JPEG
        numbers.append(number)
    return sorted(numbers)


@pytest.mark.parametrize("write, suffix", [(write_tar, ".tar"), (write_parquet, ".parquet")])
def test_the_pictures_of_shards_have_their_captions_and_a_larger_count_keeps_them(write, suffix, tmp_path):
    folder, work = tmp_path / "mine", tmp_path / "run" / "sources"
    (folder / "train").mkdir(parents=True)
    write(folder / f"a{suffix}", range(40))
    write(folder / "train" / f"b{suffix}", range(40, 100))
    few, told = take(work, folder, count=10)
    assert len(few) == 10 and told == f"10 pictures taken: {folder} 10 of 100 pictures"
    assert shown(few)[0] < 40 <= shown(few)[-1] and shown(few) != [*range(10)]  # from everywhere
    assert len(list((work / "1.unpacked").rglob("*.*g"))) == 10  # nothing more was copied
    assert take(work, folder, count=10)[0] == few
    more = take(work, folder, count=30)[0]
    assert set(few) < set(more) and len(more) == 30
    every, _ = take(work, folder)
    assert shown(every) == [*range(100)] and set(more) < set(every)
    assert all(one.file.is_relative_to(work) for one in every)
    single, _ = take(tmp_path / "other", folder / f"a{suffix}")
    assert shown(single) == [*range(40)]
    assert shown(take(work, folder, count=10)[0]) == shown(few)


def test_shards_that_changed_are_copied_again(tmp_path):
    shard = write_tar(tmp_path / "a.tar", range(4))
    assert shown(take(tmp_path / "work", shard)[0]) == [0, 1, 2, 3]
    write_tar(shard, range(10, 12))
    assert shown(take(tmp_path / "work", shard)[0]) == [10, 11]
    (tmp_path / "work" / "1.unpacked" / given.UNPACKED).unlink()  # cut off
    assert shown(take(tmp_path / "work", shard)[0]) == [10, 11]


def test_names_and_kinds_of_members_of_an_archive_do_no_harm(tmp_path):
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as tar:
        for number, stem in enumerate(("../../up", "/etc/passwd", "a/../../b", "x" * 300, "\udcff", "né w"), 1):
            add(tar, f"{stem}.png", picture(number))
            add(tar, f"{stem}.txt", f"picture {number}".encode())
        add(tar, "link.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "link.txt", b"picture 99")
        add(tar, "hard.png", b"", type=tarfile.LNKTYPE, linkname="../../up.png")
        add(tar, "pipe.png", b"", type=tarfile.FIFOTYPE)
        add(tar, "folder.png", b"", type=tarfile.DIRTYPE)
        add(tar, ".hidden.png", picture(98))
        add(tar, "bare.png", picture(97))
        add(tar, "long.png", picture(96))
        add(tar, "long.txt", b"x" * (shards.LONGEST + 1))
    before = {file for file in tmp_path.rglob("*")}
    pictures, told = take(tmp_path / "work", path)
    assert shown(pictures) == [1, 2, 3, 4, 5, 6]
    made = [file for file in tmp_path.rglob("*") if file not in before]
    assert all(file.is_relative_to(tmp_path / "work") for file in made) and not any(map(os.path.islink, made))
    assert "6 left out" in told and "because they have no caption (2: " in told
    assert "because they hold no picture (1: " in told and "links, devices or sparse files in an archive (3: " in told


@pytest.mark.parametrize("damage", ["cut", "gzip", "text", "empty", "huge", "json", "utf8"])
def test_a_damaged_archive_is_named(damage, tmp_path):
    path = write_tar(tmp_path / "a.tar", range(3))
    content = path.read_bytes()
    if damage == "gzip":
        with tarfile.open(path, "w:gz") as tar:
            add(tar, "a.png", picture(1))
    elif damage in ("json", "utf8"):
        with tarfile.open(path, "w") as tar:
            add(tar, "a.png", picture(1))
            add(tar, "a.json" if damage == "json" else "a.txt", b"{" if damage == "json" else b"\xff")
    else:
        size = content[:124] + b"77777777777\0" + content[136:148] + b"        " + content[156:]
        total = f"{sum(size[:512]):06o}\0 ".encode()
        huge = size[:148] + total + size[156:]
        path.write_bytes({"cut": content[:700], "text": b"no archive" * 99, "empty": b"", "huge": huge}[damage])
    with pytest.raises(InputError, match=r"a\.tar"):
        take(tmp_path / "work", path)


def test_a_picture_that_is_none_is_left_to_the_check_of_all_pictures(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a.png", b"no picture")
        add(tar, "a.txt", b"picture 1")
        add(tar, "b.png", picture(2))
        add(tar, "b.cls", b"7")
    (broken, whole), _ = take(tmp_path / "work", tmp_path / "a.tar")
    assert whole.caption == "7"  # a class
    with pytest.raises(InputError, match="cannot be read"):
        decoding.decode(broken.file)


def test_columns_of_shards_are_chosen_or_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", range(3), "long text")
    assert shown(take(tmp_path / "work", f"{path}:long text")[0]) == [0, 1, 2]
    with pytest.raises(InputError, match=r"no column of captions; it has image, long text"):
        take(tmp_path / "work", path)
    cells = ((picture(1), "picture 1"), (None, "x"), (picture(3), None))
    rows = [{"image": image, "text": text} for image, text in cells]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    pictures, told = take(tmp_path / "work", path)
    assert shown(pictures) == [1] and "2 left out because they hold no picture (1: a.parquet row 2)" in told
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a.png", picture(5))
        add(tar, "a.txt", b"picture 0")
        add(tar, "a.json", b'{"alt": "picture 5"}')
    assert shown(take(tmp_path / "work", f"{tmp_path / 'a.tar'}:alt")[0]) == [5]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_captions_of_a_folder_may_stand_in_a_table(name, tmp_path):
    folder = write_folder(tmp_path / "mine", range(3))
    (folder / "deep").mkdir()
    (folder / "deep" / "7.png").write_bytes(picture(7))
    (folder / "000.txt").write_text("picture 0 of its own")
    for number in (1, 2):
        (folder / f"{number:03d}.txt").unlink()
    names = {"001.png": 1, "./002.png": 2, "deep/7.png": 7, "../../gone.png": 8, "000.png": 9}
    texts = {file: f"picture {number}" for file, number in names.items()}
    rows = [{"file_name": file, "text": text, "alt": f"{text} alt"} for file, text in texts.items()]
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    elif name.endswith("csv"):
        lines = ["file_name,text,alt", *(",".join(row.values()) for row in rows)]
        (folder / name).write_text("\n".join(lines))
    else:
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    pictures, _ = take(tmp_path / "work", folder)
    assert shown(pictures) == [0, 1, 2, 7] and pictures[0].caption == "picture 0 of its own"
    assert not (tmp_path / "work").exists()  # a plain folder is read where it lies
    alt = take(tmp_path / "work", f"{folder}:alt")[0]
    assert [one.caption for one in alt] == ["picture 9 alt", "picture 1 alt", "picture 2 alt", "picture 7 alt"]
    (folder / "deep" / "8.png").write_bytes(picture(8))
    with pytest.raises(InputError, match=r"1 of 5 images have no caption, first .*8\.png"):
        take(tmp_path / "work", folder)


def test_shares_hold_and_a_small_source_makes_all_smaller(tmp_path):
    first, second = write_folder(tmp_path / "a", range(30)), write_tar(tmp_path / "b.tar", range(100, 160))
    work = tmp_path / "work"

    def counts(*texts, count):
        pictures, told = take(work, *texts, count=count)
        found = shown(pictures)
        return Counter(number >= 100 for number in found), told

    assert counts(f"{first}=0.75", f"{second}=0.25", count=20)[0] == {False: 15, True: 5}
    few, told = counts(f"{first}=3", f"{second}=1", count=1000)
    assert few == {False: 30, True: 10} and "b.tar 10 of 60 pictures" in told
    assert counts(first, second, count=1000)[0] == {False: 30, True: 60}
    assert sum(counts(first, second, count=12)[0].values()) == 12
    small = set(take(work, f"{first}=3", f"{second}=1", count=20)[0])
    assert small < set(take(work, f"{first}=3", f"{second}=1", count=36)[0])
    with pytest.raises(InputError, match="has no share, other sources have"):
        take(work, f"{first}=1", second)
    with pytest.raises(InputError, match="the share of .* is 0"):
        take(work, f"{first}=0", f"{second}=1")


def test_names_stay_the_same_where_data_and_run_are_moved(tmp_path):
    names = []
    for place in ("here", "there"):
        root = tmp_path / place
        root.mkdir()
        write_folder(root / "a", range(3))
        write_tar(root / "b.tar", range(3))
        (root / "list.jsonl").write_text('{"file": "a/001.png", "caption": "picture 1"}\n')
        pictures, _ = take(root / "work", root / "a", root / "b.tar", root / "list.jsonl")
        names.append([os.path.relpath(one.file, root / "work") for one in pictures])
    assert names[0] == names[1] and len(names[0]) == 7
    (tmp_path / "here" / "a").rename(tmp_path / "moved")
    again, _ = take(tmp_path / "here" / "work", tmp_path / "moved", tmp_path / "here" / "b.tar")
    assert shown(again) == [0, 0, 1, 1, 2, 2]


def test_a_data_set_of_the_hub_is_read_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(AccessError, match="data set org/name is not in the local cache"):
        take(tmp_path / "work", "hf://datasets/org/name", offline=True)
    folder = tmp_path / "hub" / "datasets--org--name" / "snapshots" / ("a" * 40) / "data"
    folder.mkdir(parents=True)
    (tmp_path / "hub" / "datasets--org--name" / "refs").mkdir()
    (tmp_path / "hub" / "datasets--org--name" / "refs" / "main").write_text("a" * 40)
    write_parquet(folder / "train-0.parquet", range(4), "alt")
    assert shown(take(tmp_path / "work", "hf://datasets/org/name:alt", offline=True)[0]) == [0, 1, 2, 3]


def test_sources_are_read_from_their_texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd=0.5").mkdir()
    known = {
        "mine": ("mine", None, None),
        "mine=.5": ("mine", None, 0.5),
        "mine:alt=2": ("mine", "alt", 2.0),
        "hf://datasets/a/b": ("hf://datasets/a/b", None, None),
        "hf://datasets/a/b:alt=0.25": ("hf://datasets/a/b", "alt", 0.25),
        "odd=0.5": ("odd=0.5", None, None),
    }
    for text, (where, column, share) in known.items():
        assert given.parse(text) == given.PictureSource(where, column, share)
    with pytest.raises(InputError, match="does not exist"):
        take(tmp_path / "work", "gone=1")
