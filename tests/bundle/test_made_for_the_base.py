"""What LoRAs, ControlNets and IP-Adapters of the base do on the converted model: the table in docs/bundle.md."""

import re
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import DiffusionPipeline, FluxControlNetModel, FluxControlNetPipeline, FluxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "bundle.md").read_text(encoding="utf-8")

RANK, WIDTH = 4, 32
BLOCKS = {"transformer_blocks.0.attn.to_q": (WIDTH, WIDTH), "single_transformer_blocks.0.proj_mlp": (4 * WIDTH, WIDTH)}
CALL = dict(height=64, width=64, num_inference_steps=2, max_sequence_length=16)


def picture(pipe, **more) -> numpy.ndarray:
    drawn = pipe("a fox", **CALL, **more, generator=torch.Generator().manual_seed(0))
    return numpy.asarray(drawn.images[0]).astype(int)


@pytest.fixture
def converted(bundles):
    """`converted()`: the pipeline of a bundle with 32 channels, whose base has 16 per token."""
    return lambda: DiffusionPipeline.from_pretrained(bundles("flux"), trust_remote_code=True)


@pytest.fixture
def base(parts):
    return lambda: FluxPipeline.from_pretrained(parts("flux").source)


def lora_file(folder, sizes: dict[str, tuple[int, int]], name="lora.safetensors") -> dict[str, torch.Tensor]:
    """Write a LoRA of these linears, (out, in) each; returns module -> what it adds to the weight."""
    noise, tensors = torch.Generator().manual_seed(1), {}
    for module, (out, into) in sizes.items():
        tensors[f"transformer.{module}.lora_A.weight"] = torch.randn(RANK, into, generator=noise)
        tensors[f"transformer.{module}.lora_B.weight"] = 0.3 * torch.randn(out, RANK, generator=noise)
    save_file(tensors, folder / name)
    pairs = {module: [tensors[f"transformer.{module}.lora_{part}.weight"] for part in "BA"] for module in sizes}
    return {module: b @ a for module, (b, a) in pairs.items()}


def with_lora(pipe, folder, name="lora.safetensors"):
    pipe.load_lora_weights(str(folder), weight_name=name)
    return pipe


def test_a_lora_of_blocks_does_on_both_what_it_adds_to_the_weights(converted, base, tmp_path):
    added = lora_file(tmp_path, BLOCKS)
    for pipeline in (converted, base):
        fused = pipeline()
        for module, change in added.items():
            fused.transformer.get_submodule(module).weight.data += change
        drawn, plain = picture(with_lora(pipeline(), tmp_path)), picture(pipeline())
        assert abs(drawn - picture(fused)).max() <= 1 < abs(drawn - plain).max()


def test_a_lora_of_the_head_stops_with_a_size_error(converted, base, tmp_path):
    head = base().transformer.proj_out
    lora_file(tmp_path, BLOCKS | {"proj_out": (head.out_features, head.in_features)})
    with_lora(base(), tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch for proj_out\.lora_B"):
        with_lora(converted(), tmp_path)


def test_a_lora_of_the_embedder_is_padded_without_a_word_where_the_converted_model_has_more_channels(
    converted, base, tmp_path
):
    """diffusers adds zero columns to lora_A: the first channels of another latent get what was meant for the base's."""
    own = base().transformer.x_embedder.in_features
    assert own < converted().transformer.x_embedder.in_features
    lora_file(tmp_path, {"x_embedder": (WIDTH, own)})
    found = with_lora(converted(), tmp_path).transformer.x_embedder.lora_A["default_0"].weight
    assert found[:, :own].any() and not found[:, own:].any()


def test_a_lora_of_the_embedder_widens_a_converted_model_with_fewer_channels_and_it_cannot_draw(converted, tmp_path):
    lora_file(tmp_path, {"x_embedder": (WIDTH, 2 * WIDTH)})  # a base with 64 numbers per token, as FLUX.1
    pipe = with_lora(converted(), tmp_path)
    with pytest.raises(RuntimeError):
        picture(pipe)


def test_the_lines_of_the_page_leave_what_works(converted, tmp_path, monkeypatch):
    lora_file(tmp_path, BLOCKS | {"x_embedder": (WIDTH, 16), "proj_out": (16, WIDTH)})
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    (lines,) = [block for block in blocks if "kept" in block]
    exec(compile(lines, "bundle.md", "exec"), {})
    alone = lora_file(tmp_path, BLOCKS, "alone.safetensors")
    assert len(load_file("blocks.safetensors")) == 2 * len(alone)
    drawn = [picture(with_lora(converted(), tmp_path, name)) for name in ("blocks.safetensors", "alone.safetensors")]
    assert numpy.array_equal(*drawn)


def test_a_controlnet_of_the_base_cannot_read_the_new_latents(converted, base):
    stock = base()
    network = FluxControlNetModel.from_transformer(
        stock.transformer, attention_head_dim=16, num_attention_heads=2, num_layers=1, num_single_layers=1
    )
    hint = Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (64, 64, 3), numpy.uint8))
    FluxControlNetPipeline(**_networks(stock), controlnet=network)("a fox", control_image=hint, **CALL)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        FluxControlNetPipeline(**_networks(converted()), controlnet=network)("a fox", control_image=hint, **CALL)


def _networks(pipe) -> dict:
    return {name: part for name, part in pipe.components.items() if name not in ("image_encoder", "feature_extractor")}


def test_an_ip_adapter_of_the_base_works_and_adds_what_it_adds_in_the_base_s_blocks(converted, base):
    noise = torch.Generator().manual_seed(2)
    text, seen, tokens = 16, 8, 4

    def some(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=noise)

    projection = {"proj.weight": some(tokens * text, seen), "proj.bias": some(tokens * text)}
    projection |= {"norm.weight": torch.ones(text), "norm.bias": torch.zeros(text)}
    own = {f"0.to_{part}_ip.weight": some(WIDTH, text) for part in "kv"}
    own |= {f"0.to_{part}_ip.bias": some(WIDTH) for part in "kv"}
    given = some(1, 1, seen)
    outputs = []
    for pipe in (converted(), base()):
        plain = picture(pipe)
        pipe.load_ip_adapter(
            {"image_proj": projection, "ip_adapter": own}, None, image_encoder_pretrained_model_name_or_path=None
        )
        call = dict(ip_adapter_image_embeds=[given], negative_ip_adapter_image_embeds=[given])
        pipe.set_ip_adapter_scale(0.0)
        assert numpy.array_equal(picture(pipe, **call), plain)
        pipe.set_ip_adapter_scale(1.0)
        assert abs(picture(pipe, **call) - plain).max() > 1
        outputs.append(pipe.transformer.encoder_hid_proj([given])[0])
    assert torch.equal(*outputs)  # the same tokens of the picture, which know no latent
