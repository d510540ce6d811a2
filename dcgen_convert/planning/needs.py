"""What a run folder holds, part by part: which stage writes it, which stages read it, and when nothing needs it.

`dcgen-convert clean`, the setting `keep` and the disk of a plan all follow this one table. Small records (JSON, curves,
grids of pictures) are no parts: reports, cards and `verify` read them, and they are never removed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import chain
from typing import Literal

from dcgen_convert.core.names import TRANSFORMER, of_set
from dcgen_convert.families.experts import WHOLE, Expert
from dcgen_convert.networks.autoencoder_files import NORMALISED
from dcgen_convert.recipe.schema import Recipe

Keep = Literal["all", "resume", "bundle"]
# Begin the names of the stages that every network of a model has.
OF_EVERY_NETWORK = ("surgery", "align-embedder", "align-head", "adapt-", "merge-")


@dataclass(frozen=True)
class Part:
    """Files of one stage that are needed together.

    Attributes:
        stage: writes them.
        kind: of content; a stage has at most one part of a kind.
        holds: what they are, in words.
        files: patterns of their paths in the folder of the stage.
        readers: the stages that read them. None: only the stage itself goes on from them.
        use: what they are good for when all readers are done, in words.
    """

    stage: str
    kind: str
    holds: str
    files: tuple[str, ...]
    readers: tuple[str, ...]
    use: str

    def has(self, output: str) -> bool:
        """Whether an output of the stage belongs to the part."""
        return any(fnmatch(output, pattern) for pattern in self.files)

    def waiting(self, done: Collection[str]) -> list[str]:
        """The stages that must still read it: the stage itself while it is unfinished, then its readers."""
        return [name for name in dict.fromkeys((self.stage, *self.readers)) if name not in done]

    def removable(self, done: Collection[str], keep: Keep) -> bool:
        """Whether ``keep`` allows to remove it when the stages ``done`` are done."""
        if keep == "all" or self.waiting(done):
            return False
        return keep == "bundle" or not self.readers


def stages(recipe: Recipe, imported: bool, experts: Sequence[Expert] = (WHOLE,)) -> list[str]:
    """Names of the stages in order; ``imported``: the source is written as a pipeline folder first.

    What is done to every network of the model is a stage for each of ``experts``.
    """
    phases = [f"{name}-{number}" for number, _ in enumerate(recipe.adapt.phases, 1) for name in ("adapt", "merge")]
    quantised = ["quantize"] if recipe.quantize.format != "none" else []
    first = ["import"] if imported else []
    every = [
        *first,
        "surgery",
        *(of_set(stage, number) for number in recipe.sets for stage in ("data", "latents")),
        "align-embedder",
        "align-head",
        *phases,
        *quantised,
        "bundle",
        "verify",
    ]
    return [name for stage in every for name in _of_networks(stage, experts)]


def parts(recipe: Recipe, imported: bool, experts: Sequence[Expert] = (WHOLE,)) -> list[Part]:
    """What the stages of a conversion leave in its run folder, in order. An output belongs to the first that has it.

    experts: as in `stages`.
    """
    found = []
    for part in _of_one_network(recipe, imported):
        for one in experts if part.stage.startswith(OF_EVERY_NETWORK) else (WHOLE,):
            reading = (one,) if one.name else experts
            readers = (_of_networks(name, reading) for name in part.readers)
            found.append(replace(part, stage=one.of(part.stage), readers=tuple(chain.from_iterable(readers))))
    return found


def _of_networks(stage: str, experts: Sequence[Expert]) -> list[str]:
    """The stage, or where every network has it, that of each of ``experts``."""
    return [expert.of(stage) for expert in experts] if stage.startswith(OF_EVERY_NETWORK) else [stage]


def _of_one_network(recipe: Recipe, imported: bool) -> list[Part]:
    """`parts` of a model that has one network."""
    names = stages(recipe, imported)
    adapts = tuple(name for name in names if name.startswith("adapt-"))
    merges = tuple(name for name in names if name.startswith("merge-"))
    quantise = tuple(name for name in names if name == "quantize")
    drawing = tuple(of_set("data", n) for n in recipe.sets if recipe.data_of(n).kind == "synthetic")
    weights, tensors = (f"{TRANSFORMER}/*.safetensors",), ("*.safetensors",)
    from_source = ("surgery", *drawing, "align-embedder", *merges, "bundle", "verify")
    steps, again = "more steps of this training", "--from a stage that reads them"
    found = [
        Part("surgery", "weights", "the transformer with new first and last layers, untrained", weights,
             ("align-embedder", "align-head", "adapt-1", "merge-1"), again),
        *_of_pictures(recipe, (*adapts, *quantise, "bundle", "verify")),
        Part("align-embedder", "layers", "the new first layer", tensors, ("align-head",), again),
        Part("align-head", "checkpoints", "checkpoints of its training", ("training/*.safetensors", "start.safetensors",
             "training/*checkpoint.json"), (), steps),
        Part("align-head", "layers", "the new first and last layers, aligned", tensors, ("adapt-1",), again),
    ]  # fmt: skip
    if imported:
        every = ("transformer/*.safetensors", "unet/*.safetensors")
        found.insert(0, Part("import", "weights", "the source's transformer", every, from_source, again))
    for number, (adapt, merge) in enumerate(zip(adapts, merges, strict=True), 1):
        last = number == len(adapts)
        following = (*quantise, "verify" if quantise else "bundle") if last else (adapts[number], merges[number])
        found += [
            Part(adapt, "checkpoints", "checkpoints of its training", ("checkpoints/*",), (), steps),
            Part(adapt, "layers", "the trained LoRA and layers", ("export/*.safetensors",), (merge,), again),
            Part(merge, "weights", "the converted transformer in 16 bits", tensors, following, again),
        ]
    if quantise:
        found += [
            Part("quantize", "calls", "what the transformer was given for the calibration", ("calls/*",), (),
                 "the repair of a damaged 4-bit file"),
            Part("quantize", "weights", "the converted transformer in 4 bits", tensors, ("bundle",), again),
        ]  # fmt: skip
    return found


def _of_pictures(recipe: Recipe, users: tuple[str, ...]) -> list[Part]:
    """What the stages of every set of pictures leave; ``users`` of the autoencoder that the first one rewrites."""
    found = []
    for number in recipe.sets:
        data, latents, first = of_set("data", number), of_set("latents", number), number == recipe.aligned_set
        every = [n for n, _ in enumerate(recipe.adapt.phases, 1)]
        trained = [f"adapt-{n}" for n in every if recipe.set_of(n) == number]
        aligned = ("align-embedder", "align-head"), [f"merge-{n}" for n in every]  # a merge measures the gap there
        readers = (*aligned[0], *trained, *aligned[1]) if first else (*trained,)
        found.append(Part(data, "pictures", "the training pictures", ("pictures/*",), (latents,),
                          "more pictures, or another autoencoder"))  # fmt: skip
        if first:
            others = tuple(of_set("latents", n) for n in recipe.sets if n != number)
            rewritten = (f"{NORMALISED}/*.safetensors",)
            found.append(Part(latents, "autoencoder", "the autoencoder with rescaled channels", rewritten,
                              (*others, *users), "--from a stage that reads them"))  # fmt: skip
        tensors = ("*.safetensors",)
        found.append(Part(latents, "latents", "latents and text embeddings", tensors, readers, "more training"))
    return found


def part_of(known: Collection[Part], stage: str, output: str) -> Part | None:
    """The part that an output of a stage belongs to; None: it is a record."""
    return next((part for part in known if part.stage == stage and part.has(output)), None)


def peak(
    sizes: dict[tuple[str, str], float],
    recipe: Recipe,
    imported: bool,
    until: str | None = None,
    experts: Sequence[Expert] = (WHOLE,),
) -> float:
    """Bytes at the peak, when ``keep`` of the recipe removes parts as the walk goes on.

    Args:
        sizes: (stage, kind of part) -> bytes. A kind that is no part stays until the end.
        until: the last stage that runs; None: all.
        experts: as in `stages`.
    """
    known, names = parts(recipe, imported, experts), stages(recipe, imported, experts)
    names = names[: names.index(until) + 1] if until in names else names
    held: dict[tuple[str, str], float] = {}
    highest = 0.0
    for number, name in enumerate(names, 1):
        held |= {key: size for key, size in sizes.items() if key[0] == name}
        highest = max(highest, sum(held.values()))
        for part in known:
            if part.removable(names[:number], recipe.keep):
                held.pop((part.stage, part.kind), None)
    return highest
