"""The folders of a run. Each stage writes one folder, which has the name of the stage; no other module spells them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dcgen_convert.core.names import of_set
from dcgen_convert.families.experts import WHOLE, Expert
from dcgen_convert.networks.models import TRANSFORMER

SURGERY, DATA, LATENTS = "surgery", "data", "latents"
ALIGN_EMBEDDER, ALIGN_HEAD = "align-embedder", "align-head"
QUANTIZE, BUNDLE, VERIFY = "quantize", "bundle", "verify"
BEGUN = "begun.json"  # of stage bundle: it writes, or has written, the output folder


def data_stage(number: int) -> str:
    """Name of the stage that makes the pictures of set ``number``."""
    return of_set(DATA, number)


def latents_stage(number: int) -> str:
    """Name of the stage that encodes the pictures of set ``number``."""
    return of_set(LATENTS, number)


def adapt_stage(number: int) -> str:
    """Name of the stage that trains phase ``number`` (the first is 1)."""
    return f"adapt-{number}"


def merge_stage(number: int) -> str:
    """Name of the stage that merges phase ``number`` (the first is 1)."""
    return f"merge-{number}"


@dataclass(frozen=True)
class Folders:
    """Where the stages of one run write.

    Attributes:
        run: the run folder.
        phases: number of phases of adaptation.
        pictures: number of the set whose pictures and latents are meant.
        expert: the network that is meant: each has folders of its own for what is done to it.
    """

    run: Path
    phases: int
    pictures: int = 0
    expert: Expert = WHOLE

    def own(self, stage: str) -> Path:
        """Folder of a stage that every network has for itself."""
        return self.run / self.expert.of(stage)

    @property
    def surgery(self) -> Path:
        return self.own(SURGERY)

    @property
    def data(self) -> Path:
        return self.run / data_stage(self.pictures)

    @property
    def latents(self) -> Path:
        return self.run / latents_stage(self.pictures)

    @property
    def align_embedder(self) -> Path:
        return self.own(ALIGN_EMBEDDER)

    @property
    def align_head(self) -> Path:
        return self.own(ALIGN_HEAD)

    @property
    def quantize(self) -> Path:
        return self.run / QUANTIZE

    def adapt(self, number: int) -> Path:
        return self.own(adapt_stage(number))

    def merge(self, number: int) -> Path:
        return self.own(merge_stage(number))

    def dense_before(self, number: int) -> Path:
        """The dense transformer that phase ``number`` starts from."""
        return (self.surgery if number == 1 else self.merge(number - 1)) / TRANSFORMER

    @property
    def converted(self) -> Path:
        """The dense transformer after the last phase."""
        return self.merge(self.phases) / TRANSFORMER
