"""Key maps against diffusers' own single-file conversions at the published widths, both ways, and sizes read from shapes."""

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

from dcgen_convert import bases, families
from dcgen_convert.checkpoint import keymap
from dcgen_convert.checkpoint.key_tables import TABLES
from dcgen_convert.checkpoint.sizes import SIZES, config_of
from dcgen_convert.errors import InputError

# Fewer blocks than the published models, but their widths: some of diffusers' conversions know no other.
DEPTH = {
    "num_layers": 2, "num_single_layers": 2, "n_layers": 2, "num_mmdit_layers": 2, "num_single_dit_layers": 2,
}  # fmt: skip
OWN = {"sd3": {"qk_norm": "rms_norm", "dual_attention_layers": [0]}}
UNUSED = {"sana": ["pos_embed", "y_embedder.y_embedding"], "lumina2": ["norm_final.weight"], "zimage": ["norm_final.weight"]}


def described(family):
    """(config, names and shapes) of a family's published model with two blocks of each kind."""
    template = bases.template_of(family)
    config = {**template, **{key: value for key, value in DEPTH.items() if key in template}, **OWN.get(family, {})}
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


@pytest.mark.parametrize("family, layout", TABLES)
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
    with pytest.raises(InputError, match="2 tensors have no place in the original layout: strange.weight, vae.x"):
        table.forward({"img_in.weight": (8, 4), "strange.weight": (1,), "vae.x": (2,)})
    with pytest.raises(InputError, match="double_blocks.0.img_attn.qkv.weight has 10 rows"):
        table.forward({"img_in.weight": (8, 4), "double_blocks.0.img_attn.qkv.weight": (10, 8)})
    with pytest.raises(InputError, match="single_blocks.0.linear1.weight has 20 rows"):
        table.forward({"img_in.weight": (8, 4), "single_blocks.0.linear1.weight": (20, 8)})
    with pytest.raises(InputError, match="qkv.weight needs transformer_blocks.0.attn.to_k.weight"):
        table.backward({"transformer_blocks.0.attn.to_q.weight": (8, 8)})
