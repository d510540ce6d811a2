"""Phases with pictures of their own: each is trained on its own rows, and each set of pictures is kept and grows."""

import shutil
import subprocess
from contextlib import contextmanager

import pytest
import three_phases
from conftest import run_cli, start_cli

from dcgen_convert.conversion import convert
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_json, sha256
from dcgen_convert.data.cache import LatentCache
from dcgen_convert.data.images import read_index
from dcgen_convert.ranks.crew import SOLO, Crew
from dcgen_convert.recipe.loading import load
from dcgen_convert.stages import latents
from dcgen_convert.stages.tasks import Performer

STAGES = [
    "surgery", "data-1", "latents-1", "data-2", "latents-2", "data-3", "latents-3", "align-embedder", "align-head",
    "adapt-1", "merge-1", "adapt-2", "merge-2", "adapt-3", "merge-3", "bundle",
]  # fmt: skip


class Watching(Console):
    """Writes down which latents every stage has read."""

    def __init__(self, file) -> None:
        super().__init__("human", stderr=file)
        self.reads: dict[str, set[str]] = {}
        self.now: set[str] = set()

    def event(self, kind, **values):
        if kind == "stage":
            self.reads[values["name"]], self.now = self.now, set()
        super().event(kind, **values)


def run(folder, monkeypatch, *sets, until="bundle"):
    """Convert in ``folder``, which is the current one: (console, what was said)."""
    read = LatentCache.read
    with (folder / "said.txt").open("w") as file, monkeypatch.context() as patch:
        console = Watching(file)

        def watched(self, *arguments):
            console.now.add(self.folder.name)
            return read(self, *arguments)

        patch.setattr(LatentCache, "read", watched)
        patch.chdir(folder)
        convert(load("three.yaml", sets=sets), folder / "run", folder / "bundle", console, until=until)
    return console, " ".join((folder / "said.txt").read_text().split())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phases")
    three_phases.write(folder)
    with pytest.MonkeyPatch.context() as patch:
        console, said = run(folder, patch)
    return folder, console, said


def test_every_phase_reads_the_rows_of_its_own_pictures_only(made):
    folder, console, said = made
    assert list(console.reads) == STAGES
    latents = {name: sets for name, sets in console.reads.items() if sets}
    first = {"align-embedder": {"latents-1"}, "align-head": {"latents-1"}}
    phases = {f"adapt-{n}": {f"latents-{n}"} for n in (1, 2, 3)}
    gaps = {f"merge-{n}": {"latents-1"} for n in (1, 2, 3)}  # on the pictures that the embedder was aligned on
    assert latents == first | phases | gaps
    rows = [row.file.name for row in read_index(folder / "run" / "latents-2" / "rows.jsonl", folder)]
    assert rows == [f"{number}.png" for number in range(1, three_phases.PICTURES)]
    assert "data-2: 6 of 7 pictures taken, 1 left out because they are smaller than 128 px" in said
    assert "adapt.phases.1.data.min_side" in said
    counts = [read_json(folder / "run" / f"latents-{n}" / "index.json")["count"] for n in (1, 2, 3)]
    assert counts == [8, 6, 10]


def test_more_pictures_of_one_phase_are_added_to_its_own(made, tmp_path, monkeypatch):
    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)
    three_phases.add(tmp_path, 99)
    _, said = run(tmp_path, monkeypatch, until="latents-3")
    assert "data-2: continues, 6 -> 7 pictures" in said and "latents-2: continues, 1 new pictures are appended" in said
    assert all(f"{name}: holds, skipped" in said for name in ("data-1", "latents-1", "data-3", "latents-3"))


def test_a_change_of_one_phases_pictures_runs_their_stages_again(made, tmp_path, monkeypatch):
    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)
    _, said = run(tmp_path, monkeypatch, "adapt.phases.2.data.guidance=2", until="data-3")
    assert [name for name in STAGES[:6] if f"{name}: starts again" in said] == ["data-3"]


def test_a_recipe_that_a_folder_of_small_pictures_cannot_serve_is_refused_by_every_verb(made, tmp_path):
    shutil.copytree(made[0] / "pictures", tmp_path / "pictures")
    text = (made[0] / "three.yaml").read_text()
    (tmp_path / "three.yaml").write_text(text.replace("resolution: 128, data: {path", "resolution: 256, data: {path"))
    options = ("-o", "bundle", "--run-dir", "run", "-y")
    for words in (("recipes", "validate", "three.yaml"), ("convert", "three.yaml", *options), ("plan", "three.yaml")):
        done = run_cli(*words, cwd=tmp_path)
        assert done.returncode == 2 and "smaller than the 256 px" in done.stderr + done.stdout, (words, done)
        assert "adapt.phases.1.data.min_side" in done.stderr + done.stdout
    assert not list((tmp_path / "run").glob("*/*"))
    with pytest.raises(InputError, match=r"adapt\.phases\.1\.data\.kind is folder but"):
        load(str(tmp_path / "three.yaml"), sets=["adapt.phases.1.data.kind=folder", "adapt.phases.1.data.path=null"])


def test_a_killed_run_gives_the_same_bundle(made, tmp_path):
    """Killed while the third set is drawn and while the second phase trains; a benchmark has ten random moments."""
    three_phases.write(tmp_path)
    words = ["convert", "three.yaml", "-y", "-o", "bundle", "--run-dir", "run"]
    for moment in ("data-3/pictures/*.png", "adapt-2/*"):
        process = start_cli(*words, cwd=tmp_path)
        while not list((tmp_path / "run").glob(moment)):
            try:
                process.communicate(timeout=0.1)
                pytest.fail("the run has ended")
            except subprocess.TimeoutExpired:
                pass
        process.kill()
        process.communicate()
        words = ["resume", "run"]
    done = run_cli("resume", "run", "--until", "bundle", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    files = [path.relative_to(made[0]) for path in (made[0] / "bundle").rglob("*") if path.suffix != ".md"]
    for file in files:
        if (made[0] / file).is_file() and file.name != "dcgen_manifest.json":  # it holds times
            assert sha256(made[0] / file) == sha256(tmp_path / file), file
    assert len(files) > 15


class Second(Crew):
    """Rank 1 of two."""

    rank, world = 1, 2

    def advance(self, count: int = 1) -> None:
        pass


class First(Crew):
    """Rank 0 of two. Rank 1 does its part in this process, with a job of its own, as in a process of its own."""

    world = 2

    def __init__(self) -> None:
        self.shared: list[tuple[str, int]] = []

    def introduce(self, document):
        self.document, self.second = document, Performer(Second(), NULL)

    @contextmanager
    def share(self, task, bar=None, together=True, **arguments):
        yield
        self.second(self.document, task, arguments)
        self.shared.append((task, arguments["of"]))


def test_two_ranks_make_the_rows_of_ones_own_pictures_with_channels_of_equal_size(tmp_path, monkeypatch):
    """Of two phases; the second one's pictures are encoded as the first one's have rewritten the autoencoder."""
    phase = f"{{{three_phases.PHASE}, resolution: %d, data: {{path: pictures, count: 20}}}}"
    text = three_phases.RECIPE.partition("  phases:")[0] + f"  phases: [{phase % 64}, {phase % 128}]\n"
    three_phases.write(tmp_path)
    (tmp_path / "two.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(latents, "SHARD_ROWS", (2, 512))  # so that each rank has some
    crew = First()
    for name, ranks in (("one", SOLO), ("two", crew)):
        recipe = load("two.yaml", sets=["latents.normalise=channel"])
        convert(recipe, tmp_path / name, tmp_path / "bundle", NULL, crew=ranks, until="latents-2")
    assert crew.shared == [("latents", 1), ("captions", 1), ("latents", 2), ("captions", 2)]
    files = [file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("latents-*/**/*.safetensors")]
    assert len({file.name for file in files if file.parts[0] == "latents-2"} & {"target-128-00002.safetensors"}) == 1
    for file in files:
        assert sha256(tmp_path / "one" / file) == sha256(tmp_path / "two" / file), file
