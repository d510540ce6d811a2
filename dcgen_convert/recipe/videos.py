"""The frames of a training video: one number for the whole recipe, of families that draw videos.

The new autoencoder makes a latent frame of every `TIME` frames. The base's makes its first one of one frame alone: it
is given fewer frames, so that both make as many latent frames (`Family.base_frames`).
"""

from __future__ import annotations

from dcgen_convert.core.errors import RecipeError
from dcgen_convert.families import Family
from dcgen_convert.families.base import TIME
from dcgen_convert.recipe.schema import Recipe


def frames_of(recipe: Recipe, family: Family) -> int:
    """Frames of a training video, as the new autoencoder takes it; 0 for a family that draws pictures."""
    return (recipe.data.frames or family.default_frames) if family.axes == 3 else 0


def drawn_frames(frames: int) -> int:
    """Frames that the base draws of a training video of ``frames`` frames; 1 of a picture, which has 0.

    Pipelines draw 4 n + 1 frames, and a training video has 4 (n + 1). So one more than these is drawn, and left out:
    three fewer would not do, and a frame that is made up would be learned. Of 80 frames that are the 81 of Wan's own
    training.
    """
    return frames + 1 if frames else 1


def require_frames(recipe: Recipe, family: Family) -> None:
    """RecipeError for frames of a model that draws pictures, and for a number that makes no whole latent frames."""
    frames = recipe.data.frames
    if frames is None:
        return
    if family.axes == 2:
        raise RecipeError(
            f"data.frames is {frames}, and {recipe.source} draws pictures", "leave out data.frames: it is for videos"
        )
    if frames % TIME:
        low, high = frames // TIME * TIME, -(-frames // TIME) * TIME
        raise RecipeError(
            f"data.frames is {frames}, and {TIME} frames make one latent frame",
            f"--set data.frames={low or high}{f' or {high}' if low else ''}",
        )
