"""LoRAs of FLUX in XLabs' names, against the names that diffusers' own converter gives them."""

import torch
from conftest import WEIGHTS
from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers
from safetensors.torch import load_file, save_file

from dcgen_convert.bundle.inspection import inspect
from dcgen_convert.checkpoint import lora

WEIGHTS_OF = load_file(WEIGHTS / "tiny-flux" / "transformer" / "diffusion_pytorch_model.safetensors")
SHAPES = {name: tuple(value.shape) for name, value in WEIGHTS_OF.items()}


def test_every_update_is_fused_as_diffusers_reads_it(tmp_path):
    torch.manual_seed(0)
    tensors = {}
    for (theirs, ours), updates in lora.XLABS.items():
        blocks = {name.split(".")[1] for name in SHAPES if name.startswith(f"{ours}.")}
        for block in blocks:
            for update, linears in updates.items():
                shapes = [SHAPES[f"{ours}.{block}.{linear}.weight"] for linear in linears]
                name = f"{theirs}.{block}.processor.{update}"
                tensors[f"{name}.down.weight"] = torch.randn(4, shapes[0][1])
                tensors[f"{name}.up.weight"] = torch.randn(sum(shape[0] for shape in shapes), 4)
    path = tmp_path / "xlabs.safetensors"
    save_file(tensors, path)
    assert inspect(path)["lora_linears"] == len(tensors) // 2 and not inspect(path).get("notes")
    reference = _convert_xlabs_flux_lora_to_diffusers(dict(tensors))
    expected = {
        name.removeprefix("transformer.").replace(".lora_A", ""): reference[name.replace("lora_A", "lora_B")] @ down
        for name, down in reference.items()
        if "lora_A" in name
    }
    merger = lora.Merger((lora.read(f"{path}:0.5", "flux", SHAPES),))
    changed = {name for name in SHAPES if merger.of(name)}
    assert changed == expected.keys()
    for name, change in expected.items():
        zero = torch.zeros(SHAPES[name])
        torch.testing.assert_close(merger.of(name)(0, zero), 0.5 * change, rtol=1e-5, atol=1e-5)
