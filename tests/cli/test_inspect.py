"""inspect reads headers only, and knows a checkpoint by its names and shapes."""

import json
import shutil

import diffusers
import pytest
import torch
from judging import video_bundles
from safetensors.torch import save_file

from dcgen_convert.bundle.inspection import inspect, render
from dcgen_convert.core.errors import InputError
from dcgen_convert.recipe.identity import Identity

SMALL = {
    "FluxTransformer2DModel": dict(
        in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=12, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    ),
    "SanaTransformer2DModel": dict(
        in_channels=32, out_channels=32, num_attention_heads=2, attention_head_dim=8, num_layers=1, caption_channels=12,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, sample_size=8,
    ),
    "DiTTransformer2DModel": dict(
        in_channels=4, out_channels=8, num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=16,
        num_embeds_ada_norm=10,
    ),
}  # fmt: skip
FAMILY = {"FluxTransformer2DModel": "flux", "SanaTransformer2DModel": "sana", "DiTTransformer2DModel": "dit"}


@pytest.mark.parametrize("name", SMALL)
def test_single_files_and_folders_of_the_real_classes(name, tmp_path):
    model = getattr(diffusers, name)(**SMALL[name])
    model.save_pretrained(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "SomePipeline"}))
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    one, folder = inspect(file), inspect(tmp_path)
    assert (one["kind"], one["family"], one["layout"]) == ("checkpoint", FAMILY[name], "diffusers")
    assert (folder["kind"], folder["family"], folder["class"]) == ("pipeline", FAMILY[name], name)
    assert one["bytes"] == 4 * sum(p.numel() for p in model.state_dict().values())
    assert folder["quantisation"] is None
    assert FAMILY[name] in render(folder)


def test_both_networks_of_a_model_are_counted_and_named(tmp_path):
    """Of Wan 2.2 A14B, as a source and as a bundle; numbers from the files of the classes themselves."""
    bundle, source = video_bundles.build("wan-a14b", tmp_path), tmp_path / "source"
    for folder, kind in ((source, "pipeline"), (bundle, "bundle")):
        found = inspect(folder)
        networks = {}
        for name in ("transformer", "transformer_2"):
            state = diffusers.WanTransformer3DModel.from_pretrained(folder, subfolder=name).state_dict()
            networks[name] = {"tensors": len(state), "bytes": 4 * sum(value.numel() for value in state.values())}
        assert (found["kind"], found["family"], found["networks"]) == (kind, "wan-a14b", networks)
        assert found["dtypes"] == {"F32": found["bytes"]}
        for key in ("tensors", "bytes"):
            assert found[key] == sum(own[key] for own in networks.values()) > networks["transformer_2"][key]
        own = "; ".join(f"{name} {one['tensors']} tensors, {one['bytes']:,} bytes" for name, one in networks.items())
        assert f"networks: {own}" in render(found).splitlines()
    assert "networks" not in inspect(source / "transformer_2")
    shutil.rmtree(source / "transformer_2")
    with pytest.raises(InputError, match="transformer_2 holds no safetensors weights"):
        inspect(source)


def test_the_config_of_a_single_flux_file_comes_from_its_shapes(tmp_path):
    model = diffusers.FluxTransformer2DModel(**SMALL["FluxTransformer2DModel"])
    path = tmp_path / "x.safetensors"
    save_file({f"model.diffusion_model.{key}": value for key, value in model.state_dict().items()}, path)
    config = Identity(str(path)).config
    wanted = {key: value for key, value in SMALL["FluxTransformer2DModel"].items() if key != "axes_dims_rope"}
    assert {key: config[key] for key in wanted} == wanted


def test_packed_layers_are_named_by_their_tensors(tmp_path):
    tensors = {
        "blocks.0.a.qweight": torch.zeros(4, 4, dtype=torch.int8),
        "blocks.0.a.wscales": torch.zeros(4, 4).to(torch.float8_e4m3fn),
        "blocks.0.b.qweight": torch.zeros(4, 4, dtype=torch.int32),
        "blocks.0.b.wzeros": torch.zeros(4, 4),
        "blocks.0.c.qweight": torch.zeros(4, 4, dtype=torch.int8),
        "blocks.0.c.wscales": torch.zeros(4, 4, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    found = inspect(tmp_path / "x.safetensors")
    assert found["quantisation"]["layers"] == {"blocks.0.a": "nvfp4", "blocks.0.b": "awq", "blocks.0.c": "int4"}
    assert "12.x" in found["runs_on"]


def test_licences_are_what_the_folder_declares(tmp_path):
    model = diffusers.DiTTransformer2DModel(**SMALL["DiTTransformer2DModel"])
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: my-terms\n---\n# Model\n")
    (tmp_path / "LICENSE.md").write_text("\nMy Terms, version 1\n")
    assert inspect(tmp_path)["licences"] == {
        "license": "other",
        "license_name": "my-terms",
        "LICENSE.md": "My Terms, version 1",
    }


def test_damage_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="truncated"):
        inspect(path)
    with pytest.raises(InputError, match="pickle"):
        inspect(tmp_path / "x.ckpt")
    with pytest.raises(InputError, match="no such"):
        inspect(tmp_path / "none")


def test_flux2_and_chroma_are_not_taken_for_flux(tmp_path):
    keys = {"flux2": "single_stream_modulation.linear.weight", "chroma": "distilled_guidance_layer.in_proj.weight"}
    for family, key in keys.items():
        names = {
            key: torch.zeros(1),
            "double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(1),
            "vector_in.x": torch.zeros(1),
        }
        save_file(names, tmp_path / "x.safetensors")
        assert inspect(tmp_path / "x.safetensors")["family"] == family


@pytest.mark.parametrize(
    "tensors, says",
    [
        (
            {"blocks.0.x.weight": torch.zeros(4, 8, dtype=torch.uint8), "blocks.0.x.weight_scale_2": torch.ones(1)},
            "ComfyUI, on a GPU with nvfp4 kernels",
        ),
        (
            {"blocks.0.x.weight": torch.zeros(4, 8, dtype=torch.int8), "blocks.0.x.weight_scale": torch.ones(4, 1)},
            "ComfyUI, on a GPU with int8 kernels",
        ),
        ({"lora_unet_x.lokr_w1": torch.ones(2, 2), "lora_unet_x.lokr_w2": torch.ones(2, 2)}, "LoKr"),
    ],
)
def test_files_of_other_tools_are_called_by_their_names(tmp_path, tensors, says):
    save_file(tensors, tmp_path / "x.safetensors")
    found = inspect(tmp_path / "x.safetensors")
    assert says in render(found)
    assert (found["kind"] == "lora") == ("LoR" in says or "LoK" in says)
