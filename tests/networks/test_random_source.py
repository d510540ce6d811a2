"""Sources and autoencoders of the catalogue with random weights: real sizes on the meta device, small ones on disk."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from dcgen_convert import families
from dcgen_convert.checkpoint import shards
from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.core.errors import InputError
from dcgen_convert.families import catalog, components
from dcgen_convert.families.components import Component, Layout
from dcgen_convert.families.grid import autoencoder_grid
from dcgen_convert.networks import autoencoders, pipelines, random_source, random_weights, synthetic_tokenizers

SOURCES = [name for name, entry in catalog.SOURCES.items() if entry.repo]
ALIASES = [alias for alias, entry in catalog.AUTOENCODERS.items() if entry.repo or entry.given]
WIDTH = 32  # of every text encoder
CUT = {  # class -> what makes it small
    "FluxTransformer2DModel": dict(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        axes_dims_rope=[4, 4, 8],
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
    ),
    "SanaTransformer2DModel": dict(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=WIDTH,
    ),
    "DiTTransformer2DModel": dict(num_layers=2, num_attention_heads=2, attention_head_dim=16, sample_size=8),
    "UNet2DConditionModel": dict(block_out_channels=[32] * 4, cross_attention_dim=WIDTH, layers_per_block=1),
    "CLIPTextModel": dict(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=700
    ),
    "T5EncoderModel": dict(d_model=WIDTH, d_kv=16, d_ff=32, num_layers=2, num_heads=2, vocab_size=728),
    "Gemma2Model": dict(
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=700,
    ),
    "QwenImageTransformer2DModel": dict(
        num_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=[4, 4, 8]
    ),
    "AutoencoderKLQwenImage": dict(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
    "Qwen2_5_VLForConditionalGeneration": dict(
        text_config=dict(
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=700,
            rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e6),
        ),
        vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=WIDTH),
        image_token_id=690,
        video_token_id=691,
        vision_start_token_id=687,
    ),
    "WanTransformer3DModel": dict(
        num_layers=1, attention_head_dim=24, num_attention_heads=2, text_dim=WIDTH, ffn_dim=32
    ),
    "AutoencoderKLWan": dict(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
    "UMT5EncoderModel": dict(d_model=WIDTH, d_kv=16, d_ff=32, num_layers=2, num_heads=2, vocab_size=728),
    "AutoencoderKL": dict(block_out_channels=[32] * 4, layers_per_block=1),
    "AutoencoderDC": dict(
        encoder_block_out_channels=[16, 32, 32, 32, 64, 64],
        decoder_block_out_channels=[16, 32, 32, 32, 64, 64],
        encoder_layers_per_block=[1] * 6,
        decoder_layers_per_block=[1] * 6,
    ),
    **{kind: dict(size=700) for kind in synthetic_tokenizers.BUILDERS},
}


def small(layout: Layout) -> Layout:
    parts = {key: replace(part, config={**part.config, **CUT.get(part.kind, {})}) for key, part in layout.parts.items()}
    return replace(layout, parts=parts)


COUNTED: dict[str, int] = {}  # sources share components


def parameters(part: Component) -> int:
    key = f"{part.kind} {json.dumps(part.config)}"
    if key not in COUNTED:
        COUNTED[key] = sum(value.numel() for value in random_source.model_of(part).parameters())
    return COUNTED[key]


@pytest.mark.parametrize("name", SOURCES)
def test_the_components_have_the_published_sizes(name):
    entry = catalog.SOURCES[name]
    layout = components.layout_of(entry)
    family = families.get(entry.family)
    beside = [part for key, part in layout.parts.items() if part.dtype and key not in family.components]
    assert sum(map(parameters, beside)) == entry.extra_parameters
    assert autoencoder_grid(layout.parts["vae"].config) == (entry.vae_factor, entry.vae_channels)


@pytest.mark.parametrize("alias", ALIASES)
def test_the_deep_autoencoders_have_the_published_sizes(alias):
    """Parameters within 0.5 % of the published number, which is rounded to a million."""
    entry = catalog.AUTOENCODERS[alias]
    part = components.autoencoder_of(entry)
    assert parameters(part) == pytest.approx(entry.parameters, rel=5e-3)
    assert autoencoder_grid(part.config) == (entry.factor, entry.channels)
    assert part.config.get("scaling_factor") == entry.scaling_factor


DRAWN = ["flux-krea", "sana-1.6b", "sana-sprint-1.6b", "sd-1.5", "dit-xl-256", "qwen-image-edit-2511", "wan-1.3b"]


@pytest.mark.parametrize("name", DRAWN)
def test_a_small_one_loads_and_draws_as_the_stock_pipeline_does(name, tmp_path):
    layout = small(components.layout_of(catalog.SOURCES[name]))
    folder = random_source.write_layout(layout, name, tmp_path / name, seed=1)
    source = load_source(name, str(folder))
    pipeline = pipelines.load_pipeline(source, torch.bfloat16)
    assert type(pipeline).__name__ == layout.pipeline
    prompt = "7" if name.startswith("dit") else "a photograph of a red fox in the snow"
    settings = dict(side=64, steps=2, guidance=3.0, length=64)
    given = [[torch.zeros(3, 32, 48)]] if source.family.references else ()
    picture = pipelines.draw(source.family, pipeline, [prompt], [3], **settings, references=given, frames=5)
    assert picture.shape == (1, 3, *(5,) * (source.family.axes == 3), 64, 64)
    assert torch.isfinite(picture).all() and picture.std() > 0.01


@pytest.mark.parametrize(
    ("kind", "special"),
    [
        ("CLIPTokenizer", (49406, 49407, 49407)),
        ("T5Tokenizer", (None, 1, 0)),
        ("GemmaTokenizer", (2, 1, 0)),
        ("Qwen2Tokenizer", (None, 151643, 151643)),
    ],
)
def test_a_tokenizer_of_the_published_size_has_the_published_special_tokens(kind, special, tmp_path):
    part = next(
        part
        for name in ("flux-dev", "sana-1.6b", "qwen-image-edit")
        for part in components.layout_of(catalog.SOURCES[name]).parts.values()
        if part.kind == kind
    )
    synthetic_tokenizers.write(kind, folder=tmp_path, **part.config)
    tokenizer = getattr(transformers, kind).from_pretrained(tmp_path, local_files_only=True)
    assert len(tokenizer) == part.config["size"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == special
    words = ["a", "photograph", "of", "a", "red", "fox", "in", "the", "snow"]
    ids = tokenizer(" ".join(words)).input_ids
    assert max(ids) < len(tokenizer) and len(ids) < 4 * len(words)
    assert tokenizer.unk_token_id is None or kind == "CLIPTokenizer" or tokenizer.unk_token_id not in ids
    assert len(tokenizer("").input_ids) == {"CLIPTokenizer": 2, "Qwen2Tokenizer": 0}.get(kind, 1)
    if kind == "Qwen2Tokenizer":
        marks = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
        assert tokenizer.convert_tokens_to_ids(marks) == [151644, 151652, 151653, 151655]


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path):
    with pytest.raises(InputError, match="at least"):
        synthetic_tokenizers.write("CLIPTokenizer", 100, tmp_path)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_seed_decides_every_byte_and_a_whole_one_is_kept(tmp_path):
    whole = small(components.layout_of(catalog.SOURCES["flux-dev"]))
    layout = replace(whole, parts={key: whole.parts[key] for key in ("text_encoder", "tokenizer", "scheduler")})
    first = random_source.write_layout(layout, "a", tmp_path / "first", seed=1)
    again = random_source.write_layout(layout, "a", tmp_path / "again", seed=1)
    assert contents(first) == contents(again)
    weights = first / "text_encoder" / "model.safetensors"
    before, stamp = weights.read_bytes(), weights.stat().st_mtime_ns
    random_source.write_layout(layout, "a", first, seed=1)
    assert weights.stat().st_mtime_ns == stamp
    random_source.write_layout(layout, "a", first, seed=2)
    assert weights.read_bytes() != before
    (tmp_path / "again" / "model_index.json").unlink()
    (tmp_path / "again.json").unlink()  # a write that was cut off
    random_source.write_layout(layout, "a", again, seed=1)
    assert (again / "model_index.json").exists()


def test_values_keep_their_scale_and_no_two_tensors_are_alike(tmp_path):
    encoder = small(components.layout_of(catalog.SOURCES["sana-1.6b"])).parts["text_encoder"]
    part = replace(encoder, dtype="F32")
    layout = Layout("SanaPipeline", {"text_encoder": part, "text_encoder_2": part})
    folder = random_source.write_layout(layout, "a", tmp_path / "a", seed=0)
    first, second = (load_file(folder / key / "model.safetensors") for key in layout.parts)
    for key, value in first.items():
        assert value.dtype is torch.float32
        if value.ndim == 1:
            assert not value.any()  # Gemma's norms add 1
        else:
            assert value.std() == pytest.approx(value[0].numel() ** -0.5, rel=0.2)
            assert not torch.equal(value, second[key])
    assert not torch.equal(first["layers.0.mlp.gate_proj.weight"], first["layers.1.mlp.gate_proj.weight"])


def test_a_large_tensor_is_streamed_and_no_two_rows_are_alike(tmp_path):
    """40 M numbers (80 MB): more than nine times the pool, of which two float32 copies are held at most."""
    numbers = random_weights.pool(0)
    shape = (4096, 10_000)
    item = random_weights.Drawn("BF16", shape, numbers, random_weights.POOL - 5, 1.0)
    tracemalloc.start()
    shards.write_folder(tmp_path, {"weight": item, "norm": random_weights.Ones("BF16", (9,))}, "model", 50 * 10**6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * 10**6
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"] == {
        "weight": "model-00001-of-00002.safetensors",
        "norm": "model-00002-of-00002.safetensors",
    }
    value = load_file(tmp_path / "model-00001-of-00002.safetensors")["weight"]
    expected = torch.roll(numbers, 5).to(torch.bfloat16)
    assert torch.equal(value.flatten()[: random_weights.POOL], expected)
    assert len(torch.unique(value[:, :8], dim=0)) == len(value)


def test_an_autoencoder_loads_with_its_published_scale(tmp_path, monkeypatch):
    entry = catalog.AUTOENCODERS["dc-ae-f32"]
    part = components.autoencoder_of(entry)
    cut = replace(part, config={**part.config, **CUT["AutoencoderDC"]})
    monkeypatch.setattr(components, "autoencoder_of", lambda _: cut)
    codec = autoencoders.load(random_source.write_autoencoder(entry, tmp_path / "ae", seed=0))
    assert (codec.factor, codec.channels, codec.scale) == (32, 32, 0.3189)
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    latents = codec.encode(pixels)
    assert torch.isfinite(latents).all() and 0.01 < latents.std() < 10
    assert torch.isfinite(codec.decode(latents)).all()


def test_what_cannot_be_had_is_refused_with_what_can():
    with pytest.raises(InputError, match="tiny-flux cannot be written with random weights") as refused:
        components.layout_of(catalog.SOURCES["tiny-flux"])
    assert all(name in refused.value.hint for name in SOURCES)
    with pytest.raises(InputError, match="tiny-dc-ae-f32 cannot be written") as refused:
        components.autoencoder_of(catalog.AUTOENCODERS["tiny-dc-ae-f32"])
    assert all(alias in refused.value.hint for alias in ALIASES)
