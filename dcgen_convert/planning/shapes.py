"""The sizes that every part of a plan starts from: both transformers, both grids, text tokens, trained parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dcgen_convert.data.buckets import Size
from dcgen_convert.families import Family
from dcgen_convert.families.experts import WHOLE, Expert
from dcgen_convert.families.grid import Grid
from dcgen_convert.planning.arithmetic import Trainable, matching, trainable
from dcgen_convert.planning.layers import Layer, Structure
from dcgen_convert.planning.present import most_references
from dcgen_convert.planning.structures import structure
from dcgen_convert.planning.weights import NONE, Amount, beside, of_autoencoder
from dcgen_convert.recipe import alignment, geometry
from dcgen_convert.recipe.alignment import Alignment
from dcgen_convert.recipe.geometry import usual_size
from dcgen_convert.recipe.identity import Identity
from dcgen_convert.recipe.schema import Data, Phase, Recipe
from dcgen_convert.recipe.videos import drawn_frames, frames_of


@dataclass(frozen=True)
class Shapes:
    """Before and after the swap.

    text: tokens per prompt, 0 for class-conditional models; alignment: at which size the base sees the pictures;
    references: most pictures that a row is given beside the text. frames: of a training video; 1: it is a picture.
    experts: the networks of the model, all of the structure `base` and then `converted`. companions: parameters of the
    source's text encoders and autoencoder; codec: weights of the new autoencoder; none where nothing tells them.
    """

    source: Identity
    base: Structure
    converted: Structure
    new: Grid
    text: int
    alignment: Alignment
    references: int = 0
    frames: int = 1
    experts: tuple[Expert, ...] = (WHOLE,)
    companions: int = 0
    codec: Amount = NONE

    @property
    def networks(self) -> int:
        """Number of the networks that the model has."""
        return len(self.experts)

    @property
    def family(self) -> Family:
        return self.source.family

    @property
    def old(self) -> Grid:
        return self.source.grid

    def encoders_beside(self, recipe: Recipe) -> float:
        """Bytes of the text encoders that every rank has in memory while it trains: where embeddings are not stored."""
        return (4.0 if recipe.dtype == "fp32" else 2.0) * self.companions * (recipe.latents.text == "encode")

    def latent_numbers(self, sides: Iterable[int], aligned: bool = True) -> float:
        """Numbers in the latents of one picture, at every one of ``sides``; aligned: and in those of the base, which
        are for the alignment only.
        """
        each = 1 + self.references
        new = each * self.times(self.new) * sum(self.new.c * (side // self.new.f) ** 2 for side in sides)
        old = self.times(self.old) * self.old.c * (self.alignment.side // self.old.f) ** 2
        return new + aligned * each * old

    @property
    def alignment_rows(self) -> tuple[int, int]:
        """Of the regression of the embedder: numbers of a new token, and tokens of a picture of the first phase."""
        inputs = next(layer.inputs for layer in self.converted.layers if layer.name == self.family.embedder)
        return inputs, self.drawn(self.new, self.alignment.resolution)

    def times(self, grid: Grid) -> int:
        """Latent frames of a video on ``grid``; 1 for a picture. The base sees the frames that pipelines draw."""
        return grid.time.latents(self.new.time.shown(self.frames))

    @property
    def drawn_frames(self) -> int:
        """Frames that the base draws of a training video; 1 of a picture."""
        return drawn_frames(self.frames, self.old.time) if self.family.axes == 3 else 1

    def usual_size(self, data: Data, px: int) -> Size:
        """(height, width) in px of what is drawn at ``px`` for pictures of ``data``."""
        return usual_size(self.family, self.source.config, self.old, self.new, px, data.buckets)

    @property
    def conditions(self) -> int:
        """Conditions of a row: its prompt's, and one of the empty prompt where the text encoder sees the references."""
        return 2 if self.family.picture_tokens else 1

    def passes(self, guidance: float) -> int:
        """Forward passes of a denoising step: classifier-free guidance has two."""
        return 2 if self.family.guidance == "cfg" and guidance > 1 else 1

    def trainable(self, phase: Phase) -> Trainable:
        """What a phase trains: LoRA on its targets and the whole embedder and head, or everything."""
        family = self.family
        targets = phase.targets or family.lora_targets
        return trainable(self.converted, phase.mode, phase.rank, targets, (family.embedder, family.head))

    def lora_layers(self, phase: Phase) -> list[Layer]:
        """What gets LoRA in a phase."""
        return matching(self.converted, phase.targets or self.family.lora_targets)

    def tokens(self, phase: Phase) -> int:
        """Image + text tokens per picture that the converted model sees in a phase."""
        return self.seen(self.new, phase.resolution) + self.text

    def drawn(self, grid: Grid, height: int, width: int | None = None, frames: int | None = None) -> int:
        """Tokens of a picture, or of a video, on ``grid``, with sides in px; without ``width`` of a square.

        Args:
            frames: that a pipeline draws; None: those of a training video.
        """
        times = self.times(grid) if frames is None else grid.time.latents(frames)
        return times * grid.tokens(height, width)

    def seen(self, grid: Grid, height: int, width: int | None = None, frames: int | None = None) -> int:
        """Tokens that a model on ``grid`` sees while it draws: the picture's, as `drawn`, and those of its references
        where they have tokens of their own.
        """
        each = 1 if self.family.reference_channels else 1 + self.references
        return self.drawn(grid, height, width, frames) * each


def shapes_of(recipe: Recipe, source: Identity) -> Shapes:
    """The shapes of a conversion, from the configs that the recipe names; no weights.

    Raises:
        InputError: a transformer class that no family handles. AccessError: a hub config that cannot be had.
    """
    config, family = source.config, source.family
    new = geometry.new_grid(recipe.ae, source.offline, recipe.ae_channels, source.reader)
    aligned = alignment.alignment(recipe, source, new)
    base = structure(config, family)
    converted = structure(family.convert_config(config, new.f, new.c, recipe.adapt.phases[-1].resolution), family)
    text = family.condition_length(recipe.latents.text_length or family.text_length) if base.text_width else 0
    frames = max(1, frames_of(recipe, family, new.time))
    return Shapes(
        source, base, converted, new, text, aligned, most_references(recipe, family), frames, source.experts,
        beside(source), of_autoencoder(recipe.ae),
    )  # fmt: skip
