"""The settings of training pictures: the recipe's, and those of a phase with data of its own."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dcgen_convert.recipe.kinds import AmountOrZero, Batch, Count, Fraction, Share, Side, Text
from dcgen_convert.recipe.section import Section


class Data(Section):
    """Where the training pictures come from."""

    kind: Literal["synthetic", "folder"] = Field(
        default="synthetic", description="synthetic: drawn by the base model; folder: your images and captions"
    )
    path: Text | tuple[Text, ...] | None = Field(
        default=None,
        description="your pictures, or a list of several sources: a folder, a .jsonl, shards (.tar, .parquet) or "
        "hf://datasets/ORG/NAME; :COLUMN names the captions, =0.7 the share of a source; tiny-world:256, "
        "tiny-edits:128 and tiny-videos:128 draw the tiny world; needed by kind folder",
    )
    prompts: Text = Field(
        default="builtin",
        description="builtin, tiny-world, tiny-edits, tiny-videos, FILE.txt with one prompt per line, FILE:COLUMN of a "
        ".jsonl, .csv, .tsv or .parquet, or hf://datasets/ORG/NAME:COLUMN (synthetic only)",
    )
    sources: Text | None = Field(
        default=None,
        description="for a model that edits: folder of the pictures that the base edits, with the prompts as "
        "instructions. The first prompt edits the first picture, and so on; null: none, as for other models",
    )
    count: Count = Field(default=10_000, description="pictures; a folder is read up to this many")
    steps: Count = Field(default=20, description="denoising steps per synthetic picture")
    guidance: AmountOrZero = Field(
        default=3.5, description="guidance while drawing; 1 disables classifier-free guidance"
    )
    batch: Batch = Field(default=8, description="pictures drawn or encoded at once")
    resolution: Side = Field(default=1024, description="picture side in px")
    min_side: Side | None = Field(
        default=None,
        description="smaller pictures of a folder are left out, in px of the shorter side; null: the largest "
        "resolution that they are used at. A smaller number allows pictures to be enlarged",
    )
    beyond_base: bool = Field(
        default=False,
        description="true: the base model draws larger pictures than it was trained on, with the timestep shift of "
        "the largest of its training; false: such pictures are refused",
    )
    buckets: bool = Field(
        default=False,
        description="true: pictures of a folder keep their shapes, at sizes of about resolution^2 px, and videos that "
        "the base draws have the family's usual shape (9:16 for Wan); false: centre squares",
    )
    frames: Count | None = Field(
        default=None,
        description="frames of a training video: a multiple of 4 for DC-AE-V, one more than a multiple of 8 for "
        "LTX-2's autoencoder; null: 80 and 81 for Wan. For models that draw videos only",
    )
    max_broken: Fraction = Field(
        default=0.01, description="fraction of unreadable pictures tolerated; 0 tolerates none"
    )
    share: Share | None = Field(
        default=None,
        description="share of a budget that the pictures and their latents get; null: what they cost as written",
    )

    @property
    def paths(self) -> tuple[str, ...]:
        """The sources of `path`."""
        return (self.path,) if isinstance(self.path, str) else tuple(self.path or ())


class PhaseData(Section):
    """Pictures of one phase alone. What is null is the recipe's, in section `data`."""

    kind: Literal["synthetic", "folder"] | None = Field(
        default=None, description="synthetic or folder; null: folder where path is given, else the recipe's"
    )
    path: Text | tuple[Text, ...] | None = Field(default=None, description="your pictures, as `data.path`")
    prompts: Text | None = Field(default=None, description="prompts to draw from, as `data.prompts`")
    sources: Text | None = Field(default=None, description="pictures that the base edits, as `data.sources`")
    count: Count | None = Field(default=None, description="pictures; a folder is read up to this many")
    steps: Count | None = Field(default=None, description="denoising steps per synthetic picture")
    guidance: AmountOrZero | None = Field(default=None, description="guidance while drawing")
    resolution: Side | None = Field(default=None, description="picture side in px")
    min_side: Side | None = Field(
        default=None, description="smaller pictures of a folder are left out, as `data.min_side`"
    )
    buckets: bool | None = Field(default=None, description="whether pictures keep their shapes, as `data.buckets`")

    @model_validator(mode="after")
    def _path_is_read(self) -> PhaseData:
        if self.path and self.kind == "synthetic":
            raise ValueError("the data of a phase has kind synthetic and a path: leave one of them out")
        return self

    def over(self, data: Data) -> Data:
        """The settings of ``data``, with those of the phase in their place."""
        own = {key: value for key, value in self.model_dump().items() if value is not None}
        kind = {"kind": "folder"} if self.path else {}
        return Data.model_validate({**data.model_dump(), **kind, **own})
