"""Key maps against diffusers' own single-file conversions at the published widths, both ways, and sizes read from
shapes.
"""

import math

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

from dcgen_convert import families
from dcgen_convert.checkpoint import keymap
from dcgen_convert.checkpoint.key_tables import TABLES
from dcgen_convert.checkpoint.sizes import SIZES, config_of
from dcgen_convert.core.errors import InputError
from dcgen_convert.families import bases
from dcgen_convert.families.keys import recognise_keys

# Fewer blocks than the published models, but their widths: some of diffusers' conversions know no other.
DEPTH = {
    "num_layers": 2, "num_single_layers": 2, "n_layers": 2, "num_mmdit_layers": 2, "num_single_dit_layers": 2,
}  # fmt: skip
OWN = {"sd3": {"qk_norm": "rms_norm", "dual_attention_layers": [0]}}
UNUSED = {
    "sana": ["pos_embed", "y_embedder.y_embedding"],
    "lumina2": ["norm_final.weight"],
    "zimage": ["norm_final.weight"],
}


def described(family, **more):
    """(config, names and shapes) of a family's published model with two blocks of each kind; ``more`` config values."""
    template = bases.template_of(family)
    config = {
        **template,
        **{key: value for key, value in DEPTH.items() if key in template},
        **OWN.get(family, {}),
        **more,
    }
    with torch.device("meta"):
        model = getattr(diffusers, families.get(family).model_class).from_config(config)
    return config, {name: tuple(value.shape) for name, value in model.state_dict().items()}


def thin(shapes, seed=0):
    """Random whole numbers with the rows of ``shapes`` and one column."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(1 << 20, (*shape[:1], *[1] * (len(shape) - 1)), generator=generator).float()
        for name, shape in shapes.items()
    }


def assemble(stacks, tensors):
    return {
        name: torch.cat([tensors[cut.name][cut.start : cut.stop] for cut in stack.cuts]).reshape(stack.shape)
        for name, stack in stacks.items()
    }


def shapes_of(tensors):
    return {name: tuple(value.shape) for name, value in tensors.items()}


PLAIN = [
    key for key in TABLES if key[0] not in ("sana-sprint", "unet")
]  # diffusers does not know the one, and wants more of the other


@pytest.mark.parametrize("family, layout", PLAIN)
def test_a_map_is_diffusers_conversion_and_its_own_inverse(family, layout):
    _, shapes = described(family)
    table = keymap.find(family, layout)
    tensors = thin(shapes)
    originals = assemble(table.backward(shapes_of(tensors)), tensors)
    unused = UNUSED.get(family, [])
    given = {**originals, **{name: torch.zeros(1) for name in unused}}
    stacks, dropped = table.forward(shapes_of(given))
    mine = assemble(stacks, given)
    assert sorted(dropped) == sorted(unused)
    assert mine.keys() == tensors.keys() and all(torch.equal(mine[name], tensors[name]) for name in tensors)
    convert = SINGLE_FILE_LOADABLE_CLASSES[families.get(family).model_class]["checkpoint_mapping_fn"]
    theirs = convert(dict(given))
    assert theirs.keys() == mine.keys()
    assert all(torch.equal(theirs[name], mine[name]) for name in mine)


def test_the_norms_of_sana_1_5_have_a_place_and_show_in_the_config():
    """diffusers' `from_single_file` drops them; the new names are those of its scripts/convert_sana_to_diffusers.py."""
    config, shapes = described("sana", qk_norm="rms_norm_across_heads")
    tensors = thin(shapes)
    table = keymap.find("sana", "original")
    originals = assemble(table.backward(shapes_of(tensors)), tensors)
    sides = {"attn": "attn1", "cross_attn": "attn2"}
    norms = {
        f"blocks.{i}.{old}.{x}_norm.weight": f"transformer_blocks.{i}.{new}.norm_{x}.weight"
        for i in range(2) for old, new in sides.items() for x in "qk"
    }  # fmt: skip
    assert all(torch.equal(originals[old], tensors[new]) for old, new in norms.items())
    unused = [*UNUSED["sana"], "logvar_linear.weight", "logvar_linear.bias"]
    given = {**originals, **{name: torch.zeros(1) for name in unused}}
    stacks, dropped = table.forward(shapes_of(given))
    assert sorted(dropped) == sorted(unused)
    mine = assemble(stacks, given)
    assert mine.keys() == tensors.keys() and all(torch.equal(mine[name], tensors[name]) for name in tensors)
    convert = SINGLE_FILE_LOADABLE_CLASSES["SanaTransformer2DModel"]["checkpoint_mapping_fn"]
    theirs = convert({name: value for name, value in given.items() if name not in norms})
    assert theirs.keys() == mine.keys() - norms.values() and all(
        torch.equal(theirs[name], mine[name]) for name in theirs
    )
    found = config_of(families.get("sana"), shapes, bases.template_of("sana"))
    assert {key: found[key] for key in config} == config
    assert bases.base_of("sana", found).repo == "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers"
    assert "SANA1.5" not in bases.base_of("sana", config_of(families.get("sana"), described("sana")[1], config)).repo


def test_sana_sprint_is_sana_1_5_with_a_guidance_embedder():
    """The names of diffusers' scripts/convert_sana_to_diffusers.py: no `emb` around the timestep embedder,
    `cfg_embedder` beside it.
    """
    _, shapes = described("sana-sprint")
    tensors = thin(shapes)
    sprint = assemble(keymap.find("sana-sprint", "original").backward(shapes_of(tensors)), tensors)
    stacks, dropped = keymap.find("sana-sprint", "original").forward(shapes_of(sprint))
    mine = assemble(stacks, sprint)
    assert (
        not dropped
        and mine.keys() == tensors.keys()
        and all(torch.equal(mine[name], tensors[name]) for name in tensors)
    )
    embedders = {"t_embedder.mlp.0": "timestep_embedder.linear_1", "cfg_embedder.mlp.2": "guidance_embedder.linear_2"}
    for old, new in embedders.items():
        assert torch.equal(sprint[f"{old}.weight"], tensors[f"time_embed.{new}.weight"])
    plain = {
        name.replace("time_embed.", "time_embed.emb.", 1) if "_embedder." in name else name: value
        for name, value in tensors.items()
    }
    plain = {name: value for name, value in plain.items() if "guidance_embedder" not in name}
    sana = assemble(keymap.find("sana", "original").backward(shapes_of(plain)), plain)
    assert sprint.keys() - sana.keys() == {
        f"cfg_embedder.mlp.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")
    }
    assert all(torch.equal(sprint[name], sana[name]) for name in sana)
    assert recognise_keys(sprint) == ("sana-sprint", "original") and recognise_keys(sana) == ("sana", "original")
    assert bases.base_of("sana-sprint", {}).repo == "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers"


def test_stable_diffusion_1_5_is_diffusers_conversion_and_its_own_inverse():
    config, shapes = described("unet")
    assert sum(map(math.prod, shapes.values())) == 859_520_964  # as published
    tensors = thin(shapes)
    table = keymap.find("unet", "original")
    originals = assemble(table.backward(shapes_of(tensors)), tensors)
    assert len(originals) == len(tensors) == 686
    stacks, dropped = table.forward(shapes_of(originals))
    mine = assemble(stacks, originals)
    assert (
        not dropped
        and mine.keys() == tensors.keys()
        and all(torch.equal(mine[name], tensors[name]) for name in tensors)
    )
    convert = SINGLE_FILE_LOADABLE_CLASSES["UNet2DConditionModel"]["checkpoint_mapping_fn"]
    theirs = convert({f"model.diffusion_model.{name}": value for name, value in originals.items()}, config)
    assert theirs.keys() == mine.keys() and all(torch.equal(theirs[name], mine[name]) for name in mine)


@pytest.mark.parametrize("family", SIZES)
def test_sizes_are_read_from_shapes(family):
    config, shapes = described(family)
    template = bases.template_of(family)
    found = config_of(families.get(family), shapes, {**template, **OWN.get(family, {})})
    same = {key: found[key] for key in config if key != "out_channels"}
    assert same == {key: value for key, value in config.items() if key != "out_channels"}
    assert found.get("out_channels") in (config.get("out_channels"), config.get("in_channels"))


def test_unknown_names_are_listed_and_odd_rows_refused():
    table = keymap.find("flux", "bfl")
    with pytest.raises(InputError, match=r"2 tensors have no place in the original layout: strange.weight, vae.x"):
        table.forward({"img_in.weight": (8, 4), "strange.weight": (1,), "vae.x": (2,)})
    with pytest.raises(InputError, match=r"double_blocks.0.img_attn.qkv.weight has 10 rows"):
        table.forward({"img_in.weight": (8, 4), "double_blocks.0.img_attn.qkv.weight": (10, 8)})
    with pytest.raises(InputError, match=r"single_blocks.0.linear1.weight has 20 rows"):
        table.forward({"img_in.weight": (8, 4), "single_blocks.0.linear1.weight": (20, 8)})
    with pytest.raises(InputError, match=r"qkv.weight needs transformer_blocks.0.attn.to_k.weight"):
        table.backward({"transformer_blocks.0.attn.to_q.weight": (8, 8)})
