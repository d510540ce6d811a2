"""Videos as data: what is found in folders, lists and shards, what is left out and why; the tiny world in motion."""

import io
import json
import tarfile

import pyarrow
import pyarrow.parquet
import pytest
import torch

from dcgen_convert.core.errors import InputError
from dcgen_convert.data import drawn, gathering, given, images, prompts, videos
from dcgen_convert.data.sieve import Sieve, square
from dcgen_convert.tiny import videos as tiny_videos

from .test_videos import moving, noise


def enough(side=24, frames=5) -> Sieve:
    return Sieve(side, "data.min_side", square(side), frames)


def frames_in(folder, count, size=(24, 40)):
    folder.mkdir()
    for number, picture in enumerate(noise(count, *size, seed=9).unbind(1)):
        images.write(picture, folder / f"frame-{number:03d}.png")
    return folder


@pytest.fixture
def folder(tmp_path):
    """Four videos that can be used, in every form, and one of each kind that cannot."""
    root = tmp_path / "clips"
    (root / "trip").mkdir(parents=True)
    for name, pixels in {
        "a.mp4": moving(7),
        "b.MKV": noise(5),
        "trip/c.webm": noise(6, seed=1),
        "short.mkv": noise(4),
        "small.mkv": noise(6, 16, 40),
    }.items():
        if name.endswith("mp4"):
            videos.write_mp4(pixels, root / name, 16)
        else:
            videos.write(pixels, root / name, 16)
    frames_in(root / "d", 5)
    for stem in ("a", "b", "d", "short", "small"):
        (root / f"{stem}.txt").write_text(f"clip {stem}\n")
    (root / "trip" / "metadata.jsonl").write_text('{"file_name": "c.webm", "text": "clip c"}\n')
    (root / "old.avi").write_bytes(b"RIFF")
    (root / "lost.txt").write_text("no video")
    images.write(noise(1)[:, 0], root / "poster.png")
    (root / ".hidden.mp4").write_bytes(b"")
    return root


def test_a_folder_gives_files_and_folders_of_frames_and_says_what_is_left_out(folder):
    found, told = given.take(given.parse_all([str(folder)], frames=5), 10, folder.parent / "work", sieve=enough())
    assert {str(one.file.relative_to(folder)): one.caption for one in found} == {
        "a.mp4": "clip a",
        "b.MKV": "clip b",
        "d": "clip d",
        "trip/c.webm": "clip c",
    }
    for one in found:
        assert videos.read(one.file, 5, 24, 24).shape == (3, 5, 24, 24)
    assert told.startswith("4 of 6 videos taken, 6 left out ")
    for reason in (
        "because of their format (2: old.avi, poster.png)",
        "because they are hidden or belong to another program (1: .hidden.mp4)",
        "because no picture belongs to these captions (1: lost.txt)",
        "because they have fewer than 5 frames (data.frames) (1: short.mkv)",
        "because they are smaller than 24 px (data.min_side) (1: small.mkv)",
    ):
        assert reason in told


def test_what_is_priced_is_what_is_taken(folder, tmp_path):
    sieve = enough()
    sources = given.parse_all([str(folder)], frames=5)
    assert given.held(sources, 100, sieve) == 4
    assert "1 are left out because they are smaller" in sieve.told and "1 are left out because they have" in sieve.told
    with pytest.raises(InputError, match="6 videos in .* fewer than the 50 frames .* the longest has 7, and none is"):
        given.require_large(given.parse_all([str(folder)], frames=50), enough(frames=50))
    two = given.parse_all([f"{folder}=0.5", "tiny-videos:32=0.5"], frames=5)
    found, told = given.take(two, 4, tmp_path / "work", sieve=enough())
    assert len(found) == 4 and "tiny-videos:32 2 of 2 videos" in told
    assert sum("videos-32-5" in str(one.file) for one in found) == 2


def test_pictures_are_read_as_before_where_there_are_videos_too(folder):
    (folder / "poster.txt").write_text("a poster")
    files, left_out = gathering.gather(folder)
    assert sorted(file.name for file in files) == [*(f"frame-{i:03d}.png" for i in range(5)), "poster.png"]
    assert gathering.FORMAT not in left_out.counts


def test_a_list_names_videos(folder):
    lines = [{"video": "clips/a.mp4", "caption": "one"}, {"file": "clips/d", "caption": "two"}]
    (folder.parent / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, told = given.take(
        given.parse_all([str(folder.parent / "list.jsonl")], frames=5), 10, folder / "no", sieve=enough()
    )
    assert [(one.file.name, one.caption) for one in found] == [("a.mp4", "one"), ("d", "two")]
    assert told == "2 videos taken"


def test_videos_without_captions_are_named(folder):
    (folder / "a.txt").unlink()
    with pytest.raises(InputError, match="1 of 6 videos have no caption, first .*a.mp4"):
        images.gather(folder, moving=True)
    with pytest.raises(InputError, match=r"holds no videos \(.mkv, .mov, .mp4, .webm\)"):
        images.gather(folder / "d", moving=True)


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def table_of(path, clips):
    rows = [{"video": {"bytes": clip, "path": None}, "caption": f"row {i}"} for i, clip in enumerate(clips)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("suffix", [".tar", ".parquet"])
def test_shards_hold_videos(suffix, folder, tmp_path):
    clips = [(folder / name).read_bytes() for name in ("a.mp4", "b.MKV")]
    shard = tmp_path / f"part{suffix}"
    if suffix == ".tar":
        poster = (folder / "poster.png").read_bytes()
        tar_of(shard, {"1.mp4": clips[0], "1.png": poster, "1.txt": b"row 0", "2.mkv": clips[1], "2.txt": b"row 1"})
    else:
        table_of(shard, clips)
    found, told = given.take(given.parse_all([str(shard)], frames=5), 10, tmp_path / "work", sieve=enough())
    assert [(one.caption, one.file.suffix) for one in found] == [("row 0", ".mp4"), ("row 1", ".mkv")]
    assert [one.file.read_bytes() for one in found] == clips and "2 of 2 videos" in told


def test_a_shard_of_pictures_holds_no_videos(folder, tmp_path):
    tar_of(tmp_path / "x.tar", {"1.png": (folder / "poster.png").read_bytes(), "1.txt": b"a poster"})
    sources = given.parse_all([str(tmp_path / "x.tar")], frames=5)
    with pytest.raises(InputError, match="holds no video with a caption: because they hold no video"):
        given.take(sources, 10, tmp_path / "work", sieve=enough())


def test_the_tiny_world_in_motion_is_drawn_once(tmp_path):
    sources = given.parse_all(["tiny-videos:32"], frames=8)
    found, _ = given.take(sources, 3, tmp_path, sieve=enough(32, 8))
    captions = prompts.generated("tiny-videos", 3, drawn.CAPTIONS_SEED)
    assert [one.caption for one in found] == captions
    for number, one in enumerate(found):
        labels = torch.tensor([tiny_videos.parse(one.caption)])
        wanted = tiny_videos.draw(labels, drawn.DRAWING_SEED + number, 8, 32)[0]
        torch.testing.assert_close(videos.read(one.file, 8, 32, 32), wanted, atol=0.0041, rtol=0)
    times = [one.file.stat().st_mtime_ns for one in found]
    found[1].file.write_bytes(b"damaged")
    again, _ = given.take(sources, 4, tmp_path, sieve=enough(32, 8))
    assert [one.file for one in again[:3]] == [one.file for one in found] and len(again) == 4
    new = [one.file.stat().st_mtime_ns for one in found]
    assert (new[0], new[2]) == (times[0], times[2]) and videos.is_whole(found[1].file)
    longer, _ = given.take(given.parse_all(["tiny-videos:32"], frames=12), 3, tmp_path, sieve=enough(32, 12))
    assert videos.shape(longer[0].file) == (32, 32, 12) and videos.shape(found[0].file) == (32, 32, 8)


def test_the_tiny_world_is_asked_for_what_the_model_draws(tmp_path):
    for text, frames, message in (
        ("tiny-videos:32", 0, "gives videos, and the model draws pictures"),
        ("tiny-world:32", 8, "gives pictures, and the model draws videos"),
        ("tiny-edits:32", 8, "gives edits, and the model draws videos"),
    ):
        with pytest.raises(InputError, match=message):
            given.take(given.parse_all([text], frames=frames), 2, tmp_path)


def test_prompts_say_how_the_shape_moves():
    texts = prompts.make("tiny-videos", 1500, 3)
    assert texts[:20] == prompts.make("tiny-videos", 20, 3) and len(set(texts)) > 1400
    assert all(tiny_videos.parse(text) for text in texts)
