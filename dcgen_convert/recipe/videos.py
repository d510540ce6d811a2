"""The frames of a training video: one number for the whole recipe, of families that draw videos.

The new autoencoder is given all of them, the base's those that pipelines draw of them (`Time.shown`). So DC-AE-V, which
makes each latent frame of four frames, is given 80, and Wan's, which makes its first one of one frame alone, 77: both
make 20 latent frames. LTX-2's, which makes one of one frame and then one of eight each, is given 81 and makes 11; Wan's
is given the same 81 and makes 21, one and then two for each of the others.
"""

from __future__ import annotations

from dcgen_convert.core.errors import RecipeError
from dcgen_convert.families import Family
from dcgen_convert.families.grid import Time
from dcgen_convert.recipe.schema import Recipe


def frames_of(recipe: Recipe, family: Family, time: Time) -> int:
    """Frames of a training video, as the new autoencoder takes it; 0 for a family that draws pictures.

    Args:
        time: of the new autoencoder.
    """
    return (recipe.data.frames or time.whole(family.default_frames)) if family.axes == 3 else 0


def drawn_frames(frames: int, base: Time) -> int:
    """Frames that the base draws of a training video of ``frames`` frames; 1 of a picture, which has 0.

    Pipelines of Wan draw 4 n + 1 frames, and a training video for DC-AE-V has 4 (n + 1). So one more than these is
    drawn, and left out: three fewer would not do, and a frame that is made up would be learned. Of 80 frames that are
    the 81 of Wan's own training, which a training video for LTX-2's autoencoder has itself.

    Args:
        base: of the base's autoencoder.
    """
    return 1 + base.frames * -(-(frames - 1) // base.frames) if frames else 1


def require_frames(recipe: Recipe, family: Family, time: Time) -> None:
    """RecipeError for frames of a model that draws pictures, and for a number that makes no whole latent frames."""
    frames = recipe.data.frames
    if frames is None:
        return
    if family.axes == 2:
        raise RecipeError(
            f"data.frames is {frames}, and {recipe.source} draws pictures", "leave out data.frames: it is for videos"
        )
    high = time.whole(frames)
    if frames != high:
        low = high - time.frames
        raise RecipeError(
            f"data.frames is {frames}, and {time.told}",
            f"--set data.frames={f'{low} or ' if low > 0 else ''}{high}",
        )
