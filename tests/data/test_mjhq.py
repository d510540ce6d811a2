"""The reader of MJHQ-30K, with a set of six pictures."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from dcgen_convert.core.errors import InputError
from dcgen_convert.data import mjhq

META = {  # not in order, as in the real file
    "c9": {"category": "people", "prompt": "a woman"},
    "a1": {"category": "food", "prompt": "a soup"},
    "b2": {"category": "animals", "prompt": "an owl"},
    "b10": {"category": "animals", "prompt": "a fox"},
    "a7": {"category": "food", "prompt": "bread"},
    "c1": {"category": "people", "prompt": "a man"},
}
ORDER = ["animals/b10", "animals/b2", "food/a1", "food/a7", "people/c1", "people/c9"]


def grey(number: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    return Image.fromarray(numpy.full((size[1], size[0], 3), 30 * number + 10, numpy.uint8))


@pytest.fixture
def unpacked(tmp_path) -> Path:
    folder = tmp_path / "unpacked"
    for number, name in enumerate(ORDER):
        file = folder / "mjhq30k_imgs" / f"{name}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        grey(number).save(file)
    (folder / "meta_data.json").write_text(json.dumps(META))
    return folder


@pytest.fixture
def zipped(unpacked) -> Path:
    folder = unpacked.parent / "zipped"
    folder.mkdir()
    shutil.copy(unpacked / "meta_data.json", folder)
    with zipfile.ZipFile(folder / "mjhq30k_imgs.zip", "w") as archive:
        for file in (unpacked / "mjhq30k_imgs").glob("*/*"):
            archive.write(file, file.relative_to(unpacked / "mjhq30k_imgs").as_posix())
        archive.writestr("__MACOSX/animals/b2.jpg", b"x")
    return folder


def test_pictures_come_in_the_order_of_the_prompts_from_an_archive_and_from_folders(zipped, unpacked):
    plain = unpacked.parent / "plain"
    shutil.copytree(unpacked / "mjhq30k_imgs", plain)
    shutil.copy(unpacked / "meta_data.json", plain)
    for folder in (zipped, unpacked, plain):
        whole = mjhq.read(folder)
        assert [f"{entry.category}/{entry.id}" for entry in whole.entries] == ORDER
        assert whole.entries[1].prompt == "an owl"
        pictures = list(whole.pictures([whole.entries[4], whole.entries[1]], 16))
        assert [tuple(picture.shape) for picture in pictures] == [(3, 16, 16)] * 2
        levels = [((picture.mean() + 1) * 127.5).item() for picture in pictures]
        assert levels == pytest.approx([130, 40], abs=1.5)
        assert pictures[0].dtype == torch.float32
    assert not list(zipped.glob("*/*"))  # nothing was unpacked


def test_the_subset_is_that_of_the_authors(zipped):
    """The literals are what numpy.random.RandomState(0).choice gives, whose stream is frozen."""
    whole = mjhq.read(zipped)
    assert [entry.id for entry in whole.subset(4)] == ["c9", "a1", "b2", "a7"]
    assert len({entry.id for entry in whole.subset(6)}) == 6
    large = mjhq.Mjhq(zipped, [mjhq.Prompt("x", f"{number:05d}", "") for number in range(30_000)])
    assert [int(entry.id) for entry in large.subset(2000)[:6]] == [8225, 10794, 9163, 26591, 6631, 14161]
    for count in (0, 7):
        with pytest.raises(InputError, match="has 6 prompts"):
            whole.subset(count)


def test_what_is_wrong_with_a_folder_is_one_sentence(zipped, unpacked, tmp_path):
    (unpacked / "mjhq30k_imgs" / "food" / "a1.jpg").unlink()
    whole = mjhq.read(unpacked)
    with pytest.raises(InputError, match="has no picture food/a1.jpg"):
        next(whole.pictures(whole.entries, 16))
    (unpacked / "mjhq30k_imgs" / "food" / "a1.jpg").write_bytes(b"none")
    with pytest.raises(InputError, match="a1.jpg cannot be read"):
        list(mjhq.read(unpacked).pictures(whole.entries, 16))
    with zipfile.ZipFile(zipped / "mjhq30k_imgs.zip", "w") as archive:
        archive.writestr("people/c9.jpg", b"none")
    whole = mjhq.read(zipped)
    with pytest.raises(InputError, match="the picture people/c9.jpg in .*mjhq30k_imgs.zip cannot be read"):
        list(whole.pictures(whole.entries[-1:], 16))
    (zipped / "mjhq30k_imgs.zip").write_bytes(b"none")
    with pytest.raises(InputError, match="is no whole zip archive"):
        list(mjhq.read(zipped).pictures(whole.entries, 16))
    for text in ("[]", "{", '{"a": 1}', '{"a": {"category": "food"}}', '{"a": {"category": 1, "prompt": ""}}', "{}"):
        (zipped / "meta_data.json").write_text(text)
        with pytest.raises(InputError, match="meta_data.json"):
            mjhq.read(zipped)
    with pytest.raises(InputError, match="has no meta_data.json, so it is no folder of MJHQ-30K"):
        mjhq.read(tmp_path)
