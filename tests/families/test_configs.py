"""Settings by which a stock pipeline or position table would go astray after the swap (sizes, bins, ranges)."""

import inspect
import math
import re

import diffusers
import pytest
import torch

from dcgen_convert import families

SIGMA = dict(
    num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=1, cross_attention_dim=48,
    patch_size=2, caption_channels=16, use_additional_conditions=False,
)  # fmt: skip
CALL = dict(height=1024, width=1024, steps=2, guidance=1.0, length=16)


def test_sana_keeps_the_sample_size_by_which_its_pipeline_picks_resolution_bins():
    """16 would be the bins of 512 px; a size without bins follows the grid."""
    sana = families.get("sana")
    assert sana.convert_config({"sample_size": 32, "in_channels": 32}, 64, 128, 1024)["sample_size"] == 32
    assert sana.convert_config({"sample_size": 24, "in_channels": 32}, 64, 128, 768)["sample_size"] == 12


@pytest.mark.parametrize("name", ["sana", "pixart"])
def test_pictures_are_drawn_at_the_size_that_is_asked_for(name):
    assert families.get(name).pipeline_call(None, ["a"], **CALL)["use_resolution_binning"] is False


@pytest.mark.parametrize("factor, channels", [(32, 32), (64, 128)])
def test_pixart_positions_run_over_the_range_of_the_base(factor, channels):
    """Corner tokens of 1024 px: the base's table ends one fine token later than the coarse one, whose step is
    larger.
    """
    pixart = families.get("pixart")
    base = {**SIGMA, "sample_size": 128, "interpolation_scale": 2}
    new = pixart.convert_config(base, factor, channels, 1024)
    old_model, model = (diffusers.PixArtTransformer2DModel.from_config(config) for config in (base, new))
    fine, coarse = pixart.position_term(old_model, (64, 64)), pixart.position_term(model, (1024 // factor,) * 2)
    ratio, side = factor // 16, 1024 // factor
    step = fine.unflatten(0, (64, 64))[::ratio, ::ratio].flatten(0, 1)  # fine tokens where the coarse ones begin
    assert len(step) == side**2
    torch.testing.assert_close(coarse, step, atol=1e-5, rtol=1e-5)


def test_sd3_keeps_the_side_of_its_position_table():
    config = families.get("sd3").convert_config({"pos_embed_max_size": 192, "in_channels": 16}, 32, 32, 1024)
    assert (config["pos_embed_max_size"], config["sample_size"], config["patch_size"]) == (192, 32, 1)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_what_a_pipeline_draws_that_is_told_no_size(name):
    """Against the pipelines' own code: a constant number of cells, a number of px, or the network's config."""
    family = families.get(name)
    named = (family.pipeline_class, *family.other_pipelines)
    for pipeline in (name for name in named if hasattr(diffusers, name)):  # other names are those of older versions
        kind = getattr(diffusers, pipeline)
        code = inspect.getsource(kind)
        cells = re.search(r"self\.default_sample_size = (\d+)$", code, re.MULTILINE)
        given = inspect.signature(kind.__call__).parameters.get("height")
        px = re.search(r"height = height or (\d+)$", code, re.MULTILINE)
        area = inspect.signature(kind.__call__).parameters.get("max_area")
        side = given.default if given and given.default else int(px[1]) if px else None
        of_reference = re.search(r"calculate_dimensions\((\d+) \* \1, image_size", code)  # that area, in its shape
        if area or of_reference:  # every size is scaled to it
            side, cells = int(of_reference[1]) if of_reference else math.isqrt(area.default), None
        assert (family.default_cells, family.default_px) == (int(cells[1]) if cells else None, side), pipeline
        if (side, cells) == (None, None):
            assert "sample_size" in code
    assert family.untold_side(16, 512) == (family.default_px or 16 * (family.default_cells or 32))


@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (6, 10)])
def test_dit_has_positions_for_every_grid(grid):
    """A base that is asked for its tokens at another size than its own adds what diffusers adds there."""
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8, patch_size=2
    )
    found = families.get("dit").position_term(model, grid)
    table = diffusers.models.embeddings.get_2d_sincos_pos_embed(16, grid, base_size=4, output_type="pt")
    torch.testing.assert_close(found, table.float(), atol=1e-6, rtol=0)
