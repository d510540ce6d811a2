"""Tiny random-weight pipelines of the three families, built from the real classes in seconds, without a network.

Every family gives a `Parts`: the base pipeline's folder, a converted transformer, an autoencoder, and the facts.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from dcgen_convert import families
from dcgen_convert.bundle import manifest as manifests
from dcgen_convert.bundle.layout import BundleParts, write_bundle
from dcgen_convert.bundle.scheduler import scheduler_config
from dcgen_convert.checkpoint.licence import licence_of
from dcgen_convert.checkpoint.record import source_record
from dcgen_convert.core.console import NULL
from dcgen_convert.families.base import Family

LETTERS = "abcdefghijklmnopqrstuvwxyz "
README = "---\nlicense: other\nlicense_name: tiny-licence\nlicense_link: LICENSE.md\ntags: [x]\n---\n# base\n"


@dataclass
class Parts:
    """What `write_bundle` takes, and the size in px at which the family's tests draw."""

    family: Family
    source: Path
    transformer: Path
    autoencoder: Path
    channels: int
    factor: int
    side: int


def autoencoder_dc(factor: int, channels: int) -> AutoencoderDC:
    """Random AutoencoderDC f``factor``c``channels`` of under a million parameters."""
    levels = factor.bit_length()
    widths = tuple([8, 8, 16, 16, 32, 32, 32, 32][:levels])
    torch.manual_seed(1)
    return AutoencoderDC(
        latent_channels=channels,
        attention_head_dim=8,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * levels,
        decoder_layers_per_block=(1,) * levels,
        encoder_qkv_multiscales=((),) * levels,
        decoder_qkv_multiscales=((),) * levels,
        encoder_out_shortcut=channels == 32,  # the shortcuts need last width = k x channels
        decoder_in_shortcut=channels == 32,
        scaling_factor=0.4,
    ).eval()


def flux_transformer(channels: int, width: int = 32) -> FluxTransformer2DModel:
    torch.manual_seed(2)
    return FluxTransformer2DModel(
        in_channels=channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=width // 2,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(width // 8, width // 8, width // 4),
        guidance_embeds=True,
    )


def tokenizer_clip() -> CLIPTokenizer:
    symbols = [*LETTERS.strip(), *(f"{letter}</w>" for letter in LETTERS.strip())]
    vocab = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *symbols])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)


def tokenizer_t5() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -1.0) for letter in "▁" + LETTERS.strip())]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=32)


def flux_source(folder: Path) -> None:
    torch.manual_seed(3)
    clip = CLIPTextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    t5 = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            scaling_factor=0.36,
            shift_factor=0.11,
        ),
        text_encoder=CLIPTextModel(clip),
        tokenizer=tokenizer_clip(),
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=tokenizer_t5(),
        transformer=flux_transformer(16),
    ).save_pretrained(folder)


def kontext_source(folder: Path) -> None:
    flux_source(folder)
    FluxKontextPipeline(**FluxPipeline.from_pretrained(folder).components).save_pretrained(folder)


def sana_transformer(channels: int, **options) -> SanaTransformer2DModel:
    torch.manual_seed(4)
    return SanaTransformer2DModel(
        in_channels=channels,
        out_channels=channels,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=32,
        patch_size=1,
        **options,
    )


def sana_source(folder: Path) -> None:
    torch.manual_seed(5)
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS.strip()])}
    gemma = Gemma2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    SanaPipeline(
        tokenizer=GemmaTokenizer(vocab=vocab, merges=[]),
        text_encoder=Gemma2Model(gemma),
        vae=autoencoder_dc(32, 32),
        transformer=sana_transformer(32),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)


def dit_transformer(channels: int, side: int, patch: int) -> DiTTransformer2DModel:
    torch.manual_seed(6)
    return DiTTransformer2DModel(
        in_channels=channels,
        out_channels=2 * channels,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        sample_size=side,
        patch_size=patch,
        num_embeds_ada_norm=1000,
    )


def dit_source(folder: Path) -> None:
    DiTPipeline(
        transformer=dit_transformer(4, 8, 2),
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
        ),
        scheduler=DDIMScheduler(),
    ).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {
        "0": "fish, trout",
        "7": "fox",
    }  # save_pretrained drops it; the published repositories carry it
    (folder / "model_index.json").write_text(json.dumps(index))


def converted(model: torch.nn.Module, family: Family, source: Path, folder: Path, network: str = "transformer") -> Path:
    """Save ``model`` as surgery and alignment leave the ``network`` of the source: its tensors but for embedder and
    head.
    """
    base = type(model).from_pretrained(source, subfolder=network).state_dict()
    fresh = tuple(f"{module}." for module in (family.embedder, family.head))
    own = model.state_dict()
    model.load_state_dict({name: value + 0.01 if name.startswith(fresh) else base[name] for name, value in own.items()})
    model.save_pretrained(folder)
    return folder


def build_parts(root: Path, name: str) -> Parts:
    source, transformer, autoencoder = root / "source", root / "transformer", root / "autoencoder"
    factor, channels = (64, 128) if name == "sana" else (32, 32)
    side = 2 * factor
    {"flux": flux_source, "flux-kontext": kontext_source, "sana": sana_source, "dit": dit_source}[name](source)
    model = {
        "flux": lambda: flux_transformer(32),
        "flux-kontext": lambda: flux_transformer(32),
        "sana": lambda: sana_transformer(128),
        "dit": lambda: dit_transformer(32, 2, 1),
    }[name]()
    converted(model, families.get(name), source, transformer)
    autoencoder_dc(factor, channels).save_pretrained(autoencoder)
    (source / "README.md").write_text(README)
    (source / "LICENSE.md").write_text("Terms of the tiny licence.\n")
    return Parts(families.get(name), source, transformer, autoencoder, channels, factor, side)


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """`parts(name)`: the Parts of a family, built once."""
    cache: dict[str, Parts] = {}

    def get(name: str) -> Parts:
        if name not in cache:
            cache[name] = build_parts(tmp_path_factory.mktemp(name), name)
        return cache[name]

    return get


def manifest_of(parts: Parts, **changes) -> dict:
    record = dict(
        recipe={"name": "tiny", "quantize": {"format": "none"}},
        family=parts.family.name,
        sources={
            "base": source_record("org/base", parts.source, "abc"),
            "autoencoder": source_record("ae", parts.autoencoder),
        },
        autoencoder={"name": "ae", "factor": parts.factor, "channels": parts.channels, "scaling_factor": 0.4},
        defaults={"height": parts.side, "width": parts.side, "steps": 2, "guidance": 3.5, "text_length": 16},
        seed=0,
        licence={"base": licence_of(parts.source), "autoencoder": licence_of(parts.autoencoder)},
        times={"data": 1.0},
        metrics={"flow_loss": {"before": 1.25, "after": 0.5}},
    )
    return manifests.build(**(record | changes))


def make_bundle(
    parts: Parts, output: Path, *, shift="model", transformer: Path | None = None, length: int = 16, **options
) -> Path:
    """A bundle of ``parts`` through the public functions, as a conversion makes it; ``length`` text tokens."""
    base = json.loads((parts.source / "scheduler" / "scheduler_config.json").read_text())
    manifest = manifest_of(parts)
    manifest["defaults"]["text_length"] = length
    tokens = ((parts.side // parts.factor) ** 2,)
    force = options.pop("force", False)
    whole = BundleParts(
        family=parts.family,
        source=parts.source,
        transformer=transformer or parts.transformer,
        autoencoder=parts.autoencoder,
        scheduler=scheduler_config(base, shift, channels=parts.channels, tokens=tokens),
        **options,
    )
    return write_bundle(output, whole, manifest, NULL, force=force)


@pytest.fixture(scope="session")
def bundles(parts, tmp_path_factory):
    """`bundles(name)`: an untouched bundle of a family, shared; tests that damage one take `own_bundle`."""
    cache: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in cache:
            cache[name] = make_bundle(parts(name), tmp_path_factory.mktemp("bundle") / f"tiny-{name}")
        return cache[name]

    return get


@pytest.fixture
def own_bundle(bundles, tmp_path):
    """`own_bundle(name)`: a private copy."""
    return lambda name: Path(shutil.copytree(bundles(name), tmp_path / "bundle"))


@pytest.fixture(scope="session")
def quantised(parts, tmp_path_factory):
    """`quantised(precision)`: (bundle, its dense twin) of a FLUX of width 128 whose block linears are 4-bit."""
    from dcgen_convert.svdquant.quantize import quantize
    from dcgen_convert.svdquant.settings import QuantSettings

    cache: dict[str, tuple[Path, Path]] = {}

    def get(precision: str) -> tuple[Path, Path]:
        if precision not in cache:
            flux, root = parts("flux"), tmp_path_factory.mktemp(precision)
            model = flux_transformer(flux.channels, width=128).bfloat16()
            model.save_pretrained(root / "dense")
            linears = {
                name: (module.out_features, module.in_features)
                for name, module in model.named_modules()
                if isinstance(module, torch.nn.Linear)
            }
            targets = flux.family.quant_targets(linears)
            quantize(root / "dense", root / "4-bit", targets, QuantSettings(precision, calibration="none"), [], NULL)
            cache[precision] = (
                make_bundle(flux, root / "bundle", transformer=root / "4-bit"),
                make_bundle(flux, root / "twin", transformer=root / "dense"),
            )
        return cache[precision]

    return get


@pytest.fixture(autouse=True)
def modules_cache(monkeypatch, tmp_path_factory):
    """In-bundle code goes to a cache of this test run, not to the user's."""
    import diffusers.utils.dynamic_modules_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
