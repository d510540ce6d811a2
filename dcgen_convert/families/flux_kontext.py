"""FLUX.1 Kontext, which edits a picture by an instruction: the network of FLUX.1 dev with a second picture.

The reference follows the target in the token sequence. Both go through the same embedder; the first number of a
position tells them apart. Source: diffusers 0.42 pipeline_flux_kontext.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

from dcgen_convert.families.base import CallSettings, Network, Pipeline, Text, references_of
from dcgen_convert.families.flux import Flux
from dcgen_convert.families.tensors import token_ids

if TYPE_CHECKING:
    from torch import Tensor


class FluxKontext(Flux):
    name = "flux-kontext"
    pipeline_class = "FluxKontextPipeline"
    told_by_pipeline = True  # its config is the one of FLUX.1 dev
    references = 1
    layouts = {}  # and so are its tensor names
    official_layout = False
    comfyui = False  # the nodes know no reference
    recipe = "flux-kontext"
    default_cells = None
    default_px = 1024  # it scales every size to the area of its `max_area`
    default_steps = 28
    default_guidance = 2.5

    def predict(self, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        import torch

        patch, pictures = self.patch(model.config, z.shape[1]), (z, *references_of(text))
        tokens = [self.tokens(picture, patch) for picture in pictures]  # (B, N, C p p) and (B, M, C p p)
        ids = [token_ids(picture.shape[2] // patch, picture.shape[3] // patch, z) for picture in pictures]
        ids[1][:, 0] = 1
        output = self.run(model, torch.cat(tokens, dim=1), torch.cat(ids), t, text, guidance)
        return self.untokens(output[:, : tokens[0].shape[1]], z.shape[2:], patch)

    def pipeline_call(
        self, pipeline: Pipeline | None, prompts: list[str], **settings: Unpack[CallSettings]
    ) -> dict[str, Any]:
        call = super().pipeline_call(pipeline, prompts, **settings)
        # Of itself the pipeline would draw about a megapixel, and enlarge the reference to one of its preferred sizes.
        return {**call, "max_area": settings["height"] * settings["width"], "_auto_resize": False}
