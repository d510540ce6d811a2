"""What every stage is given: the recipe, the base model, the autoencoder, the run folder, and the console."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dcgen_convert.bundle.scheduler import scheduler_config
from dcgen_convert.checkpoint import trust
from dcgen_convert.checkpoint.headers import read_weights
from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.checkpoint.source import Source, resolve_folder
from dcgen_convert.checkpoint.tensors import same_tensors
from dcgen_convert.core import names
from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_json, read_object, sha256
from dcgen_convert.core.journal import MARKER, Run
from dcgen_convert.data.buckets import Size, nearest
from dcgen_convert.data.images import NOUNS
from dcgen_convert.families import Family, catalog, legacy
from dcgen_convert.families.base import Pipeline, reference_keys
from dcgen_convert.families.experts import WHOLE, Expert
from dcgen_convert.families.grid import LTX, STILL, Grid, Time, autoencoder_grid, autoencoder_time
from dcgen_convert.networks import autoencoder_files, parts
from dcgen_convert.ranks.crew import SOLO, Crew
from dcgen_convert.recipe import drawable, sources
from dcgen_convert.recipe.alignment import Alignment, alignment
from dcgen_convert.recipe.drawable import Beyond
from dcgen_convert.recipe.geometry import bucket_sizes, usual_size
from dcgen_convert.recipe.identity import Identity
from dcgen_convert.recipe.loading import Resolved
from dcgen_convert.recipe.schema import Recipe
from dcgen_convert.recipe.videos import drawn_frames, frames_of
from dcgen_convert.stages import possible
from dcgen_convert.stages.folders import Folders, latents_stage
from dcgen_convert.svdquant import targets

if TYPE_CHECKING:
    import torch

    from dcgen_convert.data.cache import LatentCache
    from dcgen_convert.data.given import PictureSource
    from dcgen_convert.data.images import Picture
    from dcgen_convert.data.sieve import Sieve
    from dcgen_convert.stages.conditions import Conditions

T = TypeVar("T")
DEEP = {2: ("AutoencoderDC",), 3: (trust.VIDEO_CLASS, *LTX)}
AE_PATTERNS = ["config.json", "*.safetensors", "*.safetensors.index.json", "README.md", "LICENSE*"]


@dataclass(frozen=True)
class Autoencoder:
    """The deep-compression autoencoder to move to: its folder and geometry (f, C, and `Time` of one for videos)."""

    name: str
    folder: Path
    revision: str | None
    factor: int
    channels: int
    time: Time = STILL

    @property
    def grid(self) -> Grid:
        """Its latent space, with the patch of a converted model."""
        return Grid(self.factor, self.channels, 1, self.time)

    @cached_property
    def fingerprint(self) -> str:
        return sha256(self.folder / "config.json") + "".join(
            sha256(path) for path in sorted(self.folder.glob("*.safetensors"))
        )


@dataclass(frozen=True)
class Job:
    """One conversion.

    Attributes:
        pictures: number of the set of pictures that `data` of the recipe, and the folders of pictures and latents, are
            of. 0: section `data`; n: the data of phase n.
        expert: the network that is worked on; WHOLE where the model has one, and where all of them are meant.
    """

    recipe: Recipe
    identity: Identity
    source: Source
    ae: Autoencoder
    run: Run
    console: Console
    crew: Crew = SOLO
    pictures: int = 0
    expert: Expert = WHOLE
    _found: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def family(self) -> Family:
        return self.source.family

    @cached_property
    def folders(self) -> Folders:
        return Folders(self.run.path, len(self.recipe.adapt.phases), self.pictures, self.expert)

    @property
    def experts(self) -> list[Job]:
        """This job, once for each network of the model."""
        return [self.of_expert(expert.name) for expert in self.source.experts]

    def of_expert(self, name: str) -> Job:
        """This job with the network called ``name``; itself for the only network of a model, which has no name."""
        if name == self.expert.name:
            return self
        assert not self.expert.name, "a job of one network does not know the others"
        expert = next(expert for expert in self.source.experts if expert.name == name)
        return self.remembered(
            f"expert {name}", lambda job: replace(job, source=job.source.of_expert(expert), expert=expert)
        )

    def of_phase(self, number: int) -> Job:
        """This job with the pictures that phase ``number`` (the first is 1) is trained on."""
        return self.of_set(self.recipe.set_of(number))

    def of_set(self, number: int) -> Job:
        """This job with the pictures of set ``number``."""
        if number == self.pictures:
            return self
        assert not self.pictures, "a job of one set does not know the pictures of the others"

        def view(job: Job) -> Job:
            recipe = job.recipe.model_copy(update={"data": job.recipe.data_of(number)})
            return replace(job, recipe=recipe, pictures=number)

        return self.remembered(f"set {number}", view)

    @property
    def is_aligned(self) -> bool:
        """Whether the embedder is aligned on these pictures: those of the first phase."""
        return self.pictures == self.recipe.aligned_set

    @property
    def resolutions(self) -> list[int]:
        """Picture sides in px that the pictures are used at, ascending."""
        return self.recipe.sides(self.pictures)

    @property
    def dtype(self) -> torch.dtype:
        from dcgen_convert.networks.pipelines import DTYPES

        return DTYPES[self.recipe.dtype]

    @property
    def text_length(self) -> int:
        return self.recipe.latents.text_length or self.family.text_length

    @property
    def resolution(self) -> int:
        """Picture side in px that the bundle is made for: the last phase's."""
        return self.recipe.adapt.phases[-1].resolution

    @property
    def frames(self) -> int:
        """Frames of a training video, as the new autoencoder takes it; 0 for a family that draws pictures."""
        return frames_of(self.recipe, self.family, self.ae.time)

    @property
    def shown_frames(self) -> int:
        """Of these the first ones that pipelines draw, and that the base's autoencoder is given; 0 of pictures."""
        return self.ae.time.shown(self.frames) if self.frames else 0

    @property
    def drawn_frames(self) -> int:
        """Frames that the base draws of a training video; 1 of a picture."""
        return drawn_frames(self.frames, autoencoder_time(read_json(self.source.vae / "config.json")))

    @property
    def fps(self) -> float:
        """Frames a second of the videos that the model draws; 0 for a family that draws pictures."""
        return self.family.frames_per_second(self.source.index)

    @property
    def size(self) -> Size:
        """(height, width) in px that the bundle is made for: of the last phase's buckets the usual one."""
        return self.of_phase(len(self.recipe.adapt.phases)).usual_size(self.resolution)

    @property
    def drawn_size(self) -> Size:
        """(height, width) in px at which the base draws these pictures: with buckets the family's usual shape."""
        return self.usual_size(self.recipe.data.resolution)

    def usual_size(self, px: int) -> Size:
        """Of the buckets of these pictures at ``px`` the one of the family's usual shape; the square without any."""
        if not self.recipe.data.buckets:
            return px, px
        return usual_size(*self._tokens_of(), px, buckets_kept=True)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of a picture, or of a video, at every resolution of the phases."""
        times = self.ae.time.latents(max(1, self.frames))
        return tuple(sorted({times * (phase.resolution // self.ae.factor) ** 2 for phase in self.recipe.adapt.phases}))

    @property
    def converted_config(self) -> dict[str, Any]:
        """Config of the transformer on the new latents."""
        return self.family.convert_config(self.source.config, self.ae.factor, self.ae.channels, self.resolution)

    @cached_property
    def alignment(self) -> Alignment:
        """What the embedder is fitted to, and at which size the base sees the pictures for it.

        Raises:
            RecipeError: the base does not have the target that the recipe asks for.
        """
        return alignment(self.recipe, self.identity, self.ae.grid)

    @cached_property
    def keeps_latents(self) -> bool:
        """Whether the source works on the latents of the new autoencoder already: then nothing has to be aligned.

        Such a source is a bundle, with the same autoencoder: equal tensors, and an equal scale.
        """
        config, latents = read_json(self.source.vae / "config.json"), self.recipe.latents
        channels = self.ae.channels
        if autoencoder_grid(config) != (self.ae.factor, channels) or latents.normalise != "none":
            return False
        if self.family.patch(self.source.config, channels) != 1:
            return False
        scale = latents.scale_override or read_json(self.ae.folder / "config.json").get("scaling_factor")
        return config.get("scaling_factor") == scale and same_tensors(self.source.vae, self.ae.folder)

    @cached_property
    def scheduler(self) -> dict[str, Any]:
        """Scheduler config of the bundle. Training draws t with the same shift as the bundle samples with."""
        base = legacy.current(read_object(self.source.root / "scheduler" / "scheduler_config.json"))
        return scheduler_config(base, self.recipe.adapt.shift, channels=self.ae.channels, tokens=self.tokens)

    @property
    def latents_key(self) -> dict[str, Any]:
        """What latents and text embeddings are made from: the models' hashes, the sizes, the settings."""
        latents = self.recipe.latents
        key = {
            "model": self.family.name,
            "weights": self.source.fingerprint,
            "autoencoder": self.ae.fingerprint,
            "resolutions": self.resolutions,
            "text": latents.text,
            "text_length": self.text_length,
            "scale": latents.scale_override,
            "normalise": latents.normalise,
            "dtype": self.recipe.dtype,
        }
        # as they look when they were written to JSON and read again
        sizes = {str(px): [[*size] for size in found] for px, found in self.buckets.items()}
        shown = self.alignment
        home = {"home": [shown.resolution, shown.side]} if shown.target == "home" and self.is_aligned else {}
        frames = {"frames": self.frames} if self.frames else {}
        return {**key, **home, **frames, **({"buckets": sizes} if sizes else {})}

    @cached_property
    def pictures_root(self) -> Path:
        """The folder that the indexes of pictures are relative to: the user's data may be moved, and the run too."""
        from dcgen_convert.data import given

        if self.recipe.data.kind != "folder":
            return self.folders.data
        if not given.is_plain(self.pictures_from, self.sources_folder):
            return self.sources_folder
        path = self.pictures_from[0].path.absolute()
        return path.parent if path.suffix == given.LIST else path

    @property
    def sources_folder(self) -> Path:
        """Links to the user's data, and what was copied out of shards; absent where one plain folder is read."""
        return self.run.path / names.of_set("sources", self.pictures)

    @cached_property
    def pictures_from(self) -> list[PictureSource]:
        """Where the user's pictures come from."""
        from dcgen_convert.data import given

        return given.parse_all(self.recipe.data.paths, self.frames, self.fps)

    @cached_property
    def taken(self) -> tuple[list[Picture], str]:
        """The user's pictures, and what was taken and left out, in words."""
        from dcgen_convert.data import given

        sources, count = self.pictures_from, self.recipe.data.count
        work, offline = self.sources_folder, self.identity.offline
        return given.take(sources, count, work, offline, self.sieve, edited=bool(self.family.references))

    @property
    def beyond(self) -> Beyond | None:
        """What the base does where it draws larger pictures than it was trained on; None: it draws none."""
        data = self.recipe.data
        return drawable.beyond(self.identity, data.resolution) if data.kind == "synthetic" else None

    @cached_property
    def min_side(self) -> int:
        """Shorter side in px that the user's pictures must have; 0 in a run that was begun when all were taken."""
        if self.recipe.data.min_side is not None:
            return self.recipe.data.min_side
        marker = self.folders.data / MARKER
        begun = read_object(marker)["metrics"].get("min_side", 0) if marker.exists() else self.resolutions[-1]
        return self.resolutions[-1] if begun else 0

    @cached_property
    def sieve(self) -> Sieve:
        """Leaves out the user's pictures that are too small for the largest size that they are used at, and videos
        that are too short.
        """
        from dcgen_convert.data.sieve import Sieve, square

        key, side = f"{self.recipe.data_key(self.pictures)}.min_side", self.resolutions[-1]
        shapes, share = self.buckets.get(side), self.min_side / side
        if shapes is None:
            return Sieve(self.min_side, key, square(self.min_side), self.frames, self.fps)

        def needed(size: tuple[float, float]) -> tuple[float, float]:
            height, width = nearest(shapes, int(size[0]), int(size[1]))
            return width * share, height * share

        return Sieve(self.min_side, key, needed, self.frames, self.fps)

    @cached_property
    def given(self) -> list[Picture]:
        """The user's pictures with the hashes of their bytes."""
        from dcgen_convert.data import contents

        pictures = self.taken[0]
        every = dict.fromkeys(file for picture in pictures for file in self.files_of(picture).values())
        files = [file for file in every if file.is_file() or (self.frames and file.is_dir())]
        known = dict(zip(files, contents.hashes(files), strict=True))
        found = [replace(picture, sha256=known.get(picture.file)) for picture in pictures]
        if not self.family.references:
            return found
        every_hash = (tuple(known[file] for file in one.references if file in known) for one in found)
        return [replace(one, references_sha256=own) for one, own in zip(found, every_hash, strict=True)]

    def references_of(self, picture: Picture) -> tuple[Path, ...]:
        """The references that come with a picture; none for a model that reads none.

        Of a video it is the video itself: the model is given its first frame.
        """
        if not self.family.references:
            return ()
        return (picture.file,) if self.frames else picture.references

    def files_of(self, picture: Picture) -> dict[str, Path]:
        """The files behind the tensors of a row: "z", the picture, and the references of an editing model."""
        given = self.references_of(picture)
        return {"z": picture.file, **dict(zip(reference_keys(len(given)), given, strict=True))}

    def remembered(self, name: str, find: Callable[[Job], T]) -> T:
        """What ``find`` gave when it was asked for ``name`` the first time."""
        if name not in self._found:
            self._found[name] = find(self)
        found: T = self._found[name]
        return found

    @cached_property
    def buckets(self) -> dict[int, list[tuple[int, int]]]:
        """(height, width) in px of every bucket, by the resolution of a phase; empty where all pictures are squares.

        Raises:
            RecipeError: the family or the resolution allows squares only.
        """
        if not self.recipe.data.buckets:
            return {}
        return {px: bucket_sizes(*self._tokens_of(), px) for px in self.resolutions}

    def _tokens_of(self) -> tuple[Family, dict[str, Any], Grid, Grid]:
        """What the sizes of buckets follow from: both latent spaces, and the network of the first one."""
        f, c = autoencoder_grid(read_json(self.source.vae / "config.json"))
        config = self.source.config
        return self.family, config, Grid(f, c, self.family.patch(config, c)), self.ae.grid

    def conditions(self, encoders: Callable[[], Pipeline], side: int) -> Conditions:
        """What encodes the rows of these pictures at the resolution ``side``, with what ``encoders`` gives."""
        from dcgen_convert.stages.conditions import Conditions

        place, shapes = (self.folders.latents, self.pictures_root), self.buckets.get(side, [])
        return Conditions(self.family, encoders, self.text_length, *place, side, shapes)

    def rows(self, resolution: int) -> LatentCache:
        """The latent cache of these pictures. Where the recipe encodes on the fly, the first batch loads the
        encoders.
        """
        from dcgen_convert.data.cache import LatentCache
        from dcgen_convert.stages import source_pipeline

        encoders = cache(partial(source_pipeline.text_encoders, self.source, self.dtype))
        on_the_fly = self.conditions(encoders, resolution).of if self.recipe.latents.text == "encode" else None
        return LatentCache(self.folders.latents, resolution, encode=on_the_fly, key=self.latents_key)

    @property
    def target(self) -> Path:
        """Folder of the autoencoder that the bundle gets: the given one, or what stage `latents` of the first phase's
        pictures rewrote.
        """
        if self.recipe.latents.normalise != "channel":
            return self.ae.folder
        return self.run.path / latents_stage(self.recipe.aligned_set) / autoencoder_files.NORMALISED


def prepare(resolved: Resolved, run: Run, console: Console, crew: Crew = SOLO) -> Job:
    """Find and check everything that the job needs, before anything is written."""
    from dcgen_convert.checkpoint.imported import STAGE, Imported

    recipe = resolved.recipe
    possible.require_even(recipe, run.path, crew.world)
    identity, offline = resolved.identity, resolved.machine.offline
    source = load_source(
        identity.name,
        identity.where,
        revision=recipe.revision or identity.revision,
        offline=offline,
        base=recipe.base,
        loras=recipe.loras,
        home=run.path / STAGE,
    )
    entry = identity.entry
    if entry and entry.family != source.family.name:
        raise InputError(f"{source.root} holds a {source.family.name} model, {entry.name} is a {entry.family}")
    sources.check_few_steps(recipe, source.family, source.index)
    doubt = source.family.doubt(identity.name, {} if source.imported else source.scheduler or {})
    if doubt and not recipe.adapt.phases[-1].consistency:
        console.warn(doubt)
    if recipe.quantize.format != "none":
        targets.check_container(recipe.quantize.container, recipe.quantize.format, source.family)
    parts.check(source.base if isinstance(source, Imported) else source.root, source.index)
    ae = find_autoencoder(recipe.ae, run.path, channels=recipe.ae_channels, offline=offline, axes=source.family.axes)
    job = Job(recipe, identity, source, ae, run, console, crew)
    for number in recipe.sets:
        _ = job.of_set(number).buckets  # refuse what cannot have any
    _ = job.alignment  # refuses a target that the base does not have
    if told := of_bundle(job):
        console.say(told)
    if recipe.quantize.format != "none":
        section = recipe.quantize  # not after days of training
        targets.plan_targets(job.family, job.converted_config, section.dense, section.container, section.format)
    return job


def of_bundle(job: Job) -> str:
    """What a source means that is a bundle of this program; empty for every other one."""
    if not (job.source.root / names.MANIFEST).is_file() or not trust.is_adapter(job.source.index.get("vae")):
        return ""
    f, c = autoencoder_grid(read_json(job.source.vae / "config.json"))
    return (
        f"SOURCE is a bundle: its pictures and its latents (f{f}, {c} channels) are the base. Embedder and head are "
        f"made anew and aligned for f{job.ae.factor} with {job.ae.channels} channels; all other weights go on"
    )


def find_autoencoder(
    name: str, work: Path, *, channels: int | None = None, offline: bool = False, axes: int = 2
) -> Autoencoder:
    """The autoencoder called ``name`` (alias, folder, hub id or single file), its headers checked.

    Args:
        axes: `Family.axes` of the source, which draws pictures or videos.
        work: folder that takes what a single file or a prefix of ``channels`` is rewritten into; what is there already
            is kept.
    """
    from dcgen_convert.networks import autoencoders

    entry = catalog.find_autoencoder(name)
    if autoencoder_files.is_file(name):
        folder, revision = autoencoder_files.folder_of_file(name, work), None
    else:
        folder, revision = resolve_folder(entry.where if entry else name, offline=offline, patterns=AE_PATTERNS)
    config = autoencoders.describe(folder)
    stated = read_json(folder / "config.json")["_class_name"]
    if stated not in (wanted := DEEP[axes]):
        known = [alias for alias, one in catalog.AUTOENCODERS.items() if (one.frames > 1) == (axes == 3)]
        raise InputError(
            f"{name} is a {stated}, a conversion needs an {' or an '.join(wanted[:2])} to draw {NOUNS[axes]}",
            f"known: {', '.join(known)}",
        )
    read_weights(folder)
    if channels and channels != config["latent_channels"]:
        folder = autoencoder_files.prefix_of_folder(folder, channels, work)
    factor, found = autoencoder_grid(config)
    return Autoencoder(name, folder, revision, factor, channels or found, autoencoder_time(config))
