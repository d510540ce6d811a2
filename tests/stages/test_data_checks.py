"""What the stages `data` and `latents` say of the user's pictures, and what is refused before any work is done."""

import io
import json
import tarfile
from dataclasses import replace

import pytest
from PIL import Image

from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.errors import InputError, RecipeError
from dcgen_convert.core.journal import Found, Run, Wanted
from dcgen_convert.data import images
from dcgen_convert.planning import absent
from dcgen_convert.planning.plan import plan
from dcgen_convert.recipe.loading import load
from dcgen_convert.stages import depends, latent_rows, latents, pictures
from dcgen_convert.stages.job import prepare


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Nine pictures of 160 px, and one of 64 px with a transparent part."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(9):
        Image.new("RGB", (160, 160), (20 * number, 90, 40)).save(folder / f"{number}.png")
    Image.new("RGBA", (64, 160), (0, 0, 0, 0)).save(folder / "small.png")
    for file in list(folder.glob("*.png")):
        file.with_suffix(".txt").write_text("" if file.stem == "0" else "a disc " * (60 if file.stem == "1" else 1))
    return folder


def job_of(run, *sets, **flags):
    """A job with what it says."""
    said = io.StringIO()
    console = Console("human", stderr=said)
    return prepare(load("tiny-flux", sets=sets, flags=flags), Run(run, console), console), said


def given(path, run, *sets):
    return job_of(run, *sets, **{"data.path": str(path), "data.kind": "folder"})


def test_what_was_done_about_pictures_and_captions_is_told(data, tmp_path):
    job, said = given(data, tmp_path / "run", "data.max_broken=0.2", "data.min_side=1")
    taken, told = images.take(data, 100)
    assert told == "10 pictures taken"
    (tmp_path / "broken.png").write_bytes(b"no picture")
    kept = latents.readable(job, [*taken, images.Picture(tmp_path / "broken.png", "x")], 11)
    assert kept == taken
    pictures.tell_captions(job, [picture.caption for picture in taken])
    text = said.getvalue()
    assert "10 pictures taken, 1 left out because they cannot be read (1: " in text
    assert "pictures transparent, shown on white (1: small.png)" in text
    assert "pictures smaller than 128 px, enlarged (1: small.png)" in text
    assert "1 of 10 captions are empty" in text
    assert f"1 of 10 captions are longer than {job.text_length} tokens and are cut" in text


@pytest.mark.parametrize("text", ["", "data.buckets=on"])
def test_small_pictures_are_left_out_and_counted(text, data, tmp_path):
    job, _ = given(data, tmp_path / "run", *filter(None, [text]))
    pictures.require(job)
    why = "because they are smaller than 128 px (data.min_side) (1: small.png)"
    assert len(job.given) == 9 and job.taken[1] == f"9 of 10 pictures taken, 1 left out {why}"
    job, _ = given(data, tmp_path / "run", "data.min_side=64", *filter(None, [text]))
    assert len(job.given) == 10 and job.taken[1] == "10 pictures taken"
    job, _ = given(data, tmp_path / "run", "data.count=9")  # small ones do not count
    assert len(job.given) == 9 and "data.count" not in job.taken[1]


@pytest.mark.parametrize("kind", ["folder", "list", "shard"])
@pytest.mark.parametrize("kept", [0, 1])
def test_too_few_large_pictures_are_refused_before_any_work(kind, kept, data, tmp_path):
    """By `recipes validate` and `plan` too, but for pictures in shards: those are counted when they are copied."""
    for number in range(kept):
        Image.new("RGB", (512, 512)).save(data / f"large{number}.png")
        (data / f"large{number}.txt").write_text("a disc")
    place = tmp_path / {"folder": "same", "list": "all.jsonl", "shard": "all.tar"}[kind]
    if kind == "list":
        files = sorted(map(str, data.glob("*.png")))
        place.write_text("".join(json.dumps({"file": file, "caption": "a disc"}) + "\n" for file in files))
    elif kind == "shard":
        with tarfile.open(place, "w") as tar:
            for file in sorted(data.iterdir()):
                tar.add(file, file.name)
    else:
        place = data
    sets = ["adapt.phases.0.resolution=256", "data.resolution=256"]
    job, _ = given(place, tmp_path / ".run", *sets)
    try:
        message = (
            rf"10 pictures in .* smaller than the 256 px .* 160 x 160 px, and {'1 is' if kept else 'none is'} large"
        )
        with pytest.raises(InputError, match=message) as caught:
            pictures.require(job)
        assert caught.value.exit_code == 2 and "--set data.min_side=160 allows" in caught.value.hint
        if kind != "shard":
            assert [str(problem) for problem in absent.absent(job.recipe)] == [str(caught.value)]
        pictures.require(given(place, tmp_path / ".run2", *sets, "data.min_side=160")[0])
    finally:
        for file in data.glob("large*"):
            file.unlink()


def test_a_run_that_was_begun_when_small_pictures_were_taken_keeps_them(data, tmp_path):
    job, _ = given(data, tmp_path / "run", "data.min_side=1")
    for stated, count in ((None, 10), (128, 9)):
        with job.run.stage(Wanted("data", depends.inputs(job, "data")), Found("nothing")) as stage:
            pictures.run(job, stage)
            stage.metrics.pop("min_side")
            stage.metrics |= {"min_side": stated} if stated else {}
        assert len(given(data, tmp_path / "run")[0].given) == count


def test_pictures_that_are_drawn_are_not_enlarged_silently():
    sets = ["data.resolution=64", "adapt.phases.0.resolution=128"]
    with pytest.raises(RecipeError, match="data.resolution is 64 px, but the pictures are used at 128 px"):
        load("tiny-flux", sets=sets)
    load("tiny-flux", sets=[*sets, "data.min_side=64"])


def test_what_the_base_draws_beyond_its_training_is_told_once(tmp_path):
    """Also where the pictures of two phases are drawn at that size; `plan` says it once too."""
    phases = "adapt.phases=[{resolution: 256, steps: 4, data: {count: 8}}, {resolution: 256, steps: 4}]"
    sets = ["data.beyond_base=true", "data.resolution=256", phases]
    job, said = job_of(tmp_path / "run", *sets)
    assert job.recipe.sets == (1, 0)
    pictures.require_all(job)
    words = "tiny-flux draws pictures of 256 px, and was trained up to 128 px"
    assert said.getvalue().count(words) == 1
    assert sum(words in note for note in plan(load("tiny-flux", sets=sets))["notes"]) == 1


def test_more_pictures_than_the_count(data):
    taken, told = images.take(data, 4)
    assert len(taken) == 4 and told.startswith("4 of 10 pictures taken, 6 left out because data.count is 4 (6: ")


@pytest.mark.parametrize("kept", [0, 1, 8])
def test_unusable_data_are_refused_before_any_work(kept, data, tmp_path):
    """No picture, one picture, and two broken ones of ten."""
    for number in range(kept):
        for suffix in ("png", "txt"):
            (tmp_path / f"{number}.{suffix}").write_bytes((data / f"{number}.{suffix}").read_bytes())
    for number in range(2 if kept == 8 else 0):
        (tmp_path / f"broken{number}.png").write_bytes(b"no picture")
        (tmp_path / f"broken{number}.txt").touch()
    job, _ = given(tmp_path, tmp_path / ".run")
    message = {
        0: "holds no images",
        1: "at least 2 pictures",
        8: r"2 of 10 .* 0 are tolerated; first: the image .*broken0.png cannot",
    }
    with pytest.raises(InputError, match=message[kept]):
        pictures.require(job)
    pictures.require(given(data, tmp_path / ".run")[0])


def test_pictures_of_several_sources_are_found_again_by_a_rank_that_did_not_copy_them(data, tmp_path):
    """The other ranks read the index only, also when the user's data are gone by then."""
    with tarfile.open(tmp_path / "more.tar", "w") as tar:
        for number in range(4):
            tar.add(data / f"{number}.png", f"{number}.png")
            tar.add(data / "2.txt", f"{number}.txt")
    sets = [f"data.path=[{data}=2,{tmp_path / 'more.tar'}=1]", "data.kind=folder", "data.count=9"]
    job, said = job_of(tmp_path / "run", *sets)
    pictures.require(job)
    with job.run.stage(Wanted("data", depends.inputs(job, "data")), Found("nothing")) as stage:
        pictures.run(job, stage)
    assert "9 pictures taken" in said.getvalue() and "6 of 10 pictures" in said.getvalue()
    recorded = depends.inputs(job, "data")
    (tmp_path / "more.tar").unlink()
    other, _ = job_of(tmp_path / "run", *sets)
    found = pictures.listed(other)
    assert found == pictures.listed(job) and len(found) == 9 and all(one.file.is_file() for one in found)
    assert {latent_rows.row_name(other, one).split("/")[0] for one in found} == {"1", "2.unpacked"}
    assert depends.inputs(other, "data") == recorded


@pytest.mark.parametrize(
    "settings, message", [(["data.prompts=gone.txt"], "does not exist"), (["data.count=1"], "at least 2 pictures")]
)
def test_unusable_prompts_are_refused_before_any_work(settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        pictures.require(job_of(tmp_path / "run", *settings)[0])


def test_a_caption_that_is_no_class_is_refused_before_any_work(tmp_path):
    run, prompts = Run(tmp_path / "run", NULL), tmp_path / "p.txt"
    prompts.write_text("red circle\n0\n1000\n")
    job = prepare(load("tiny-dit", flags={"data.prompts": str(prompts)}), run, NULL)
    pictures.require(job)
    for strange in ("a fox", "1001", "\u00b2"):
        prompts.write_text(f"red circle\n{strange}\n", encoding="utf-8")
        with pytest.raises(InputError, match=f"the caption '{strange}' is no class"):
            pictures.require(replace(job))
