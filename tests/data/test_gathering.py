"""What is taken of a folder of pictures, and what is left out and why."""

import os

import pytest
from PIL import Image

from dcgen_convert.core import names
from dcgen_convert.core.errors import InputError
from dcgen_convert.data import gathering, images
from dcgen_convert.data.tally import Tally


def put(folder, *pictures):
    folder.mkdir(parents=True, exist_ok=True)
    for name in pictures:
        Image.new("RGB", (8, 8)).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(os.fsencode(name).decode(errors="replace"))
    return folder


def taken(folder):
    return [picture.file.relative_to(folder).as_posix() for picture in images.read_folder(folder)]


def test_every_format_is_taken_or_counted(tmp_path):
    put(tmp_path, "a.png", "b.JPG", "c.tiff", "d.gif", "e.avif")
    for name in ("f.heic", "g.psd", "h.HEIC", "f.txt", "i.cr2"):
        (tmp_path / name).touch()
    (tmp_path / "notes.md").touch()
    (tmp_path / "alone.txt").touch()
    pictures, left_out = images.gather(tmp_path)
    assert [picture.file.name for picture in pictures] == ["a.png", "b.JPG", "c.tiff", "d.gif", "e.avif"]
    assert left_out.reasons() == (
        "because of their format (4: f.heic, g.psd, h.HEIC, ...), because no picture belongs to these captions "
        "(1: alone.txt)"
    )


def test_files_and_folders_of_other_programs_are_no_data(tmp_path):
    put(tmp_path, "a.png")
    put(tmp_path / ".ipynb_checkpoints", "a-checkpoint.png")
    put(tmp_path / "__MACOSX", "b.png")
    put(tmp_path / "@eaDir", "c.png")
    for name in ("._a.png", "._a.txt", "Thumbs.db", ".DS_Store", "desktop.ini"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7\xff\xfe")
    pictures, left_out = images.gather(tmp_path)
    assert [picture.caption for picture in pictures] == ["a.png"]
    assert left_out.counts == {gathering.FOREIGN: 4}  # three folders, and one file that calls itself a picture
    assert taken(put(tmp_path / ".hidden" / "data", "x.png")) == ["x.png"]  # only what lies below the folder counts


def test_run_folders_and_bundles_are_no_data(tmp_path):
    put(tmp_path, "a.png")
    put(tmp_path / "runs" / "mine" / "data" / "pictures", "0.png")
    put(tmp_path / "runs" / "mine", "grid.png")
    (tmp_path / "runs" / "mine" / names.RECIPE).touch()
    assert len(taken(tmp_path)) == 3  # a recipe of a cook is no run folder
    (tmp_path / "runs" / "mine" / names.LOCK).touch()
    (put(tmp_path / "bundle", "b.png") / names.MANIFEST).touch()
    assert taken(tmp_path) == ["a.png"]
    assert images.gather(tmp_path)[1].reasons() == f"{gathering.OWN} (2: bundle/, runs/mine/)"


def test_links_to_folders_are_followed_once(tmp_path):
    data = put(tmp_path / "d", "a.png")
    (data / "more").symlink_to(put(tmp_path / "elsewhere", "b.png"))
    (data / "again").symlink_to(tmp_path / "elsewhere")
    (data / "self").symlink_to(data)
    (data / "loop").symlink_to("loop")
    (data / "c.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    (data / "c.txt").write_text("linked")
    assert taken(data) == ["a.png", "again/b.png", "c.png"]
    assert images.gather(data)[1].counts == {gathering.AGAIN: 2}


def test_captions_in_capitals_belong_to_their_pictures(tmp_path):
    put(tmp_path, "a.png")
    (tmp_path / "a.txt").rename(tmp_path / "a.TXT")
    assert images.read_folder(tmp_path)[0].caption == "a.png"


def test_a_folder_without_usable_pictures_says_what_was_left_out(tmp_path):
    (tmp_path / "a.heic").touch()
    with pytest.raises(InputError, match=r"holds no images \(.*\.avif.*\); 1 left out because of their format"):
        images.read_folder(tmp_path)


def test_a_name_that_is_no_utf8_comes_back_from_the_index(tmp_path):
    name = os.fsdecode(b"k\xe4se.png")
    put(tmp_path, name)
    pictures = images.read_folder(tmp_path)
    images.write_index(tmp_path / images.INDEX, pictures, tmp_path)
    assert images.read_index(tmp_path / images.INDEX, tmp_path) == pictures and pictures[0].file.is_file()


def test_a_count_chooses_from_everywhere_and_a_larger_one_adds(tmp_path):
    files = [tmp_path / kind / f"{number}.png" for kind in "abcd" for number in range(10)]
    pictures = [images.Picture(file, "x") for file in files]
    few, more = (images.chosen(pictures, count, tmp_path) for count in (20, 25))
    assert len(few) == 20 and set(few) < set(more) and few == [picture for picture in pictures if picture in few]
    assert {picture.file.parent.name for picture in few} == set("abcd")
    assert images.chosen(pictures, 40, tmp_path) == pictures
    moved = [images.Picture(tmp_path / "moved" / file.relative_to(tmp_path), "x") for file in files]
    assert [picture.file.name for picture in images.chosen(moved, 20, tmp_path / "moved")] == [
        picture.file.name for picture in few
    ]


def test_a_tally_gives_a_few_names():
    tally = Tally()
    for number in range(5):
        tally.add("because x", f"{number}.png")
    tally.add("because y", "z")
    assert tally.total == 6
    assert tally.reasons() == "because x (5: 0.png, 1.png, 2.png, ...), because y (1: z)"
