"""The sections `evaluate` and `watch` of a recipe: how the pictures are judged, at the end and while a phase trains."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dcgen_convert.recipe.kinds import CountOrZero, Pictures, PicturesOrZero, Text
from dcgen_convert.recipe.section import Section


class Evaluate(Section):
    prompts: PicturesOrZero = Field(default=16, description="fixed-seed pictures drawn after each stage; 0 disables")
    metrics: Literal["tiny-world", "none"] | tuple[Text, ...] = Field(
        default="none",
        description="names of measures, [clip, cmmd]: verify compares base and bundle with them, as the verb evaluate "
        "does; tiny-world: attribute accuracy and Frechet distance; none disables",
    )
    clip: Text | None = Field(default=None, description="CLIP model of the measures, folder or hub id; null: the usual")
    dino: Text | None = Field(default=None, description="DINOv2 model, folder or hub id; null: the usual")
    pickscore: Text | None = Field(default=None, description="PickScore model, folder or hub id; null: the usual")
    inception: Text | None = Field(default=None, description="file of the Inception weights of the FID; null: none")
    detector: Text | None = Field(
        default=None, description="Mask2Former model of geneval, folder or hub id; null: the usual"
    )
    reference: Text | None = Field(
        default=None,
        description="folder of pictures, or mjhq:FOLDER, that the measures compare with too; null disables",
    )

    @model_validator(mode="after")
    def _enough_to_judge(self) -> Evaluate:
        if self.metrics not in ("none", ()) and self.prompts == 1:
            named = self.metrics if isinstance(self.metrics, str) else ", ".join(self.metrics)
            raise ValueError(f"prompts is 1, and metrics {named} compares at least 2 pictures: give 2, or 0 for none")
        return self

    @property
    def measures(self) -> tuple[str, ...]:
        """The measures that are named; none where there is nothing to measure."""
        return self.metrics if isinstance(self.metrics, tuple) and self.prompts else ()


class Watch(Section):
    """What is measured and drawn while a phase trains. It changes nothing in the training."""

    evaluate_every: CountOrZero = Field(
        default=1000, description="steps between held-out losses at fixed noise levels; 0 disables"
    )
    grid_every: CountOrZero = Field(
        default=1000,
        description="steps between grids of pictures with fixed seeds; each is drawn after a checkpoint; 0 disables",
    )
    pictures: Pictures = Field(default=8, description="held-out captions drawn in a grid")
    metrics: Literal["none"] | tuple[Text, ...] = Field(
        default="none",
        description="names of measures, [clip, cmmd], that judge the pictures of every grid, as the verb evaluate "
        "does; their networks are those of `evaluate`; none disables",
    )

    @model_validator(mode="after")
    def _enough_to_judge(self) -> Watch:
        if self.measures and self.pictures == 1:
            raise ValueError(
                f"pictures is 1, and metrics {', '.join(self.measures)} compares at least 2: give 2, or metrics none"
            )
        if self.measures and not self.grid_every:
            raise ValueError(
                f"grid_every is 0, and metrics {', '.join(self.measures)} judges the pictures of the grids: give both "
                "or neither"
            )
        return self

    @property
    def measures(self) -> tuple[str, ...]:
        """The measures that are named."""
        return self.metrics if isinstance(self.metrics, tuple) else ()
