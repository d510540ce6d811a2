"""Wan 2.2 T2V A14B, which draws videos from text with two networks: one for much noise, one for less.

Their noise levels meet at `boundary_ratio` of model_index.json, .875. Its authors draw with guidance 4 in the first
network and 3 in the second. Source: diffusers 0.42 pipeline_wan.py; Wan-Video/Wan2.2 wan_t2v_A14B.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

from dcgen_convert.core.errors import InputError
from dcgen_convert.families.base import CallSettings, Pipeline
from dcgen_convert.families.experts import Expert
from dcgen_convert.families.wan import Wan


class WanA14B(Wan):
    name = "wan-a14b"
    told_by_pipeline = True  # its networks have the config of Wan 2.1 14B
    layouts: ClassVar[dict[str, tuple[str, ...]]] = {}  # a file holds one of the two networks and does not say which
    further = (Wan.second,)
    expert_names = ("high", "low")
    recipe = "wan-2.2-a14b-480p"
    default_steps = 40
    default_guidance = 4.0
    lessened: ClassVar[float] = 2 / 3  # of the guidance beyond 1, in the second network: 4 becomes 3, and 1 stays 1

    def experts(self, index: Mapping[str, Any]) -> tuple[Expert, ...]:
        boundary = index.get("boundary_ratio")
        if not isinstance(boundary, float) or not 0 < boundary < 1:
            raise InputError(
                f"the model_index.json of this {self.name} model has the boundary_ratio {boundary!r}, which must lie "
                "between 0 and 1",
                "fetch the checkpoint again",
            )
        first, second = self.expert_names
        return Expert(first, self.component, boundary, 1.0), Expert(second, self.second, 0.0, boundary)

    def pipeline_call(
        self, pipeline: Pipeline | None, prompts: list[str], **settings: Unpack[CallSettings]
    ) -> dict[str, Any]:
        call = super().pipeline_call(pipeline, prompts, **settings)
        return {**call, "guidance_scale_2": round(1 + self.lessened * (settings["guidance"] - 1), 4)}
