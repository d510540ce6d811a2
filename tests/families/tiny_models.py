"""Tiny pipelines with random weights, one per family, built from the real classes in about a second and without a
network.

A builder writes a whole diffusers folder; `TINY` names it and says what differs from the common test settings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from bundle.conftest import (
    dit_source,
    flux_source,
    kontext_source,
    sana_source,
    sana_transformer,
    tokenizer_clip,
    tokenizer_t5,
)
from transformers import (
    ByT5Tokenizer,
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from .tiny_editors import flux2_dev, flux2_klein, qwenimage, qwenimage_edit, qwenimage_edit_plus
from .tiny_entry import Tiny, extra_cfg, lowest, rescaled_cfg
from .tiny_later import ernie_image, gemma_tokenizer, ovis_image, prx
from .tiny_parts import (
    DECODER,
    ROPE,
    WIDTH,
    alive,
    byte_tokenizer,
    clip_projection,
    flow,
    glm_tokenizer,
    kl,
    qwen_vae,
    t5,
)
from .tiny_unets import unet, unet_xl


def sana_sprint(folder: Path) -> None:
    sana_source(folder)
    parts = diffusers.SanaPipeline.from_pretrained(folder).components
    parts["transformer"] = alive(sana_transformer(32, guidance_embeds=True, qk_norm="rms_norm_across_heads"))
    parts["scheduler"] = diffusers.SCMScheduler()
    diffusers.SanaSprintPipeline(**parts).save_pretrained(folder)


def sd3(folder: Path) -> None:
    torch.manual_seed(2)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=12,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    diffusers.StableDiffusion3Pipeline(
        transformer=alive(transformer),
        scheduler=flow(shift=3.0),
        vae=kl(16, scaling_factor=1.5, shift_factor=0.06),
        text_encoder=clip_projection(3),
        tokenizer=tokenizer_clip(),
        text_encoder_2=clip_projection(4),
        tokenizer_2=tokenizer_clip(),
        text_encoder_3=t5(),
        tokenizer_3=tokenizer_t5(),
    ).save_pretrained(folder)


def pixart(folder: Path, pipeline: str = "PixArtSigmaPipeline", sample_size: int = 16) -> None:
    torch.manual_seed(2)
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=48,
        sample_size=sample_size,
        patch_size=2,
        caption_channels=WIDTH,
    )
    getattr(diffusers, pipeline)(
        transformer=alive(transformer),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        vae=kl(4, scaling_factor=0.13),
        text_encoder=t5(),
        tokenizer=tokenizer_t5(),
    ).save_pretrained(folder)


def pixart_alpha(folder: Path) -> None:
    pixart(folder, "PixArtAlphaPipeline", 128)


def lumina2(folder: Path) -> None:
    torch.manual_seed(2)
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=16,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(8, 8, 8),
        cap_feat_dim=WIDTH,
    )
    diffusers.Lumina2Pipeline(
        transformer=alive(transformer),
        scheduler=flow(shift=6.0),
        vae=kl(16, scaling_factor=0.4, shift_factor=0.1),
        text_encoder=Gemma2Model(Gemma2Config(**DECODER, num_hidden_layers=2)),
        tokenizer=gemma_tokenizer(),
    ).save_pretrained(folder)


def zimage(folder: Path) -> None:
    torch.manual_seed(2)
    transformer = diffusers.ZImageTransformer2DModel(
        dim=48, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH, axes_dims=[8, 8, 8]
    )
    diffusers.ZImagePipeline(
        transformer=alive(transformer),
        scheduler=flow(shift=3.0),
        vae=kl(16, scaling_factor=0.4, shift_factor=0.1),
        text_encoder=Qwen3Model(Qwen3Config(**DECODER, num_hidden_layers=2)),
        tokenizer=byte_tokenizer(),
    ).save_pretrained(folder)


def hidream(folder: Path) -> None:
    torch.manual_seed(2)
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[WIDTH, WIDTH],
        text_emb_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
        llama_layers=[0, 1],
    )
    diffusers.HiDreamImagePipeline(
        transformer=alive(transformer),
        scheduler=flow(use_dynamic_shifting=True),
        vae=kl(16, scaling_factor=0.4, shift_factor=0.1),
        text_encoder=clip_projection(3),
        tokenizer=tokenizer_clip(),
        text_encoder_2=clip_projection(4),
        tokenizer_2=tokenizer_clip(),
        text_encoder_3=t5(),
        tokenizer_3=tokenizer_t5(),
        text_encoder_4=LlamaForCausalLM(LlamaConfig(**DECODER, num_hidden_layers=2)),
        tokenizer_4=byte_tokenizer(),
    ).save_pretrained(folder)


def chroma(folder: Path) -> None:
    torch.manual_seed(2)
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    diffusers.ChromaPipeline(
        transformer=alive(transformer),
        scheduler=flow(use_dynamic_shifting=True),
        vae=kl(16, scaling_factor=0.4, shift_factor=0.1),
        text_encoder=t5(),
        tokenizer=tokenizer_t5(),
    ).save_pretrained(folder)


def auraflow(folder: Path) -> None:
    torch.manual_seed(2)
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=16,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=32,
        pos_embed_max_size=144,
    )
    diffusers.AuraFlowPipeline(
        transformer=alive(transformer),
        scheduler=flow(shift=1.73),
        vae=kl(4, scaling_factor=0.13),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=40, d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        tokenizer=tokenizer_t5(),
    ).save_pretrained(folder)


def cogview4(folder: Path) -> None:
    torch.manual_seed(2)
    transformer = diffusers.CogView4Transformer2DModel(
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=16,
        condition_dim=8,
        sample_size=16,
    )
    diffusers.CogView4Pipeline(
        transformer=alive(transformer),
        scheduler=flow(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"),
        vae=kl(16, scaling_factor=0.4),
        text_encoder=GlmModel(GlmConfig(**DECODER, num_hidden_layers=2, pad_token_id=0)),
        tokenizer=glm_tokenizer(),
    ).save_pretrained(folder)


def krea2(folder: Path) -> None:
    torch.manual_seed(2)
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=64,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=WIDTH,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        axes_dims_rope=(4, 6, 6),
    )
    text = dict(DECODER, num_hidden_layers=2, rope_parameters=ROPE)
    vision = dict(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=WIDTH, deepstack_visual_indexes=[0]
    )
    diffusers.Krea2Pipeline(
        transformer=alive(transformer),
        scheduler=flow(use_dynamic_shifting=True, max_image_seq_len=6400),
        vae=qwen_vae(),
        text_encoder=Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)),
        tokenizer=byte_tokenizer(),
        text_encoder_select_layers=(1, 2),
    ).save_pretrained(folder)


def hunyuanimage(folder: Path) -> None:
    torch.manual_seed(2)
    transformer = diffusers.HunyuanImageTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1),
        guidance_embeds=True,
        text_embed_dim=WIDTH,
        text_embed_2_dim=WIDTH,
        rope_axes_dim=(8, 8),
    )
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=64,
        block_out_channels=(32, 32, 32, 32, 64, 128),
        layers_per_block=1,
        spatial_compression_ratio=32,
        sample_size=128,
        scaling_factor=0.75,
    )
    text = dict(DECODER, num_hidden_layers=3, rope_parameters=ROPE)
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=WIDTH)
    torch.manual_seed(1)
    glyphs = T5EncoderModel(T5Config(vocab_size=384, d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    diffusers.HunyuanImagePipeline(
        transformer=alive(transformer),
        scheduler=flow(shift=5.0),
        vae=vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=byte_tokenizer(),
        text_encoder_2=glyphs,
        tokenizer_2=ByT5Tokenizer(),
    ).save_pretrained(folder)


def wide(**changes: Any) -> dict[str, Any]:
    """Heads of 64 instead of 16, and what has to change with them."""
    return {"attention_head_dim": 64, **changes}


TINY: dict[str, Tiny] = {
    "flux": Tiny(flux_source, wide(axes_dims_rope=[16, 24, 24]), factor=2, side=64, guided=False),
    "flux-kontext": Tiny(
        kontext_source, wide(axes_dims_rope=[16, 24, 24]), factor=2, side=64, guided=False, references=((32, 48),)
    ),
    "sana": Tiny(
        sana_source, wide(cross_attention_head_dim=64, cross_attention_dim=128), factor=32, middle=lowest(3.0)
    ),
    "sana-sprint": Tiny(
        sana_sprint,
        wide(cross_attention_head_dim=64, cross_attention_dim=128),
        factor=32,
        middle=None,
        data_sigma=0.5,
        guided=False,
    ),
    "dit": Tiny(dit_source, wide(), middle=None, prompt="fox", factor=2, side=16),
    "sd3": Tiny(sd3, wide(caption_projection_dim=128), middle=lowest(3.0)),
    "pixart": Tiny(pixart, wide(cross_attention_dim=128, num_layers=1), middle=None),
    "pixart-alpha": Tiny(pixart_alpha, wide(num_attention_heads=6, cross_attention_dim=384, num_layers=1), middle=None),
    "lumina2": Tiny(
        lumina2,
        dict(
            hidden_size=256,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=128,
            axes_dim_rope=[16, 24, 24],
            num_layers=1,
        ),
        length=256,
        guide=rescaled_cfg,
    ),
    "zimage": Tiny(
        zimage, dict(dim=384, n_heads=6, n_kv_heads=6, axes_dims=[16, 24, 24], n_layers=1), length=96, guide=extra_cfg
    ),
    "chroma": Tiny(chroma, wide(axes_dims_rope=[16, 24, 24])),
    "auraflow": Tiny(auraflow, wide(caption_projection_dim=128), middle=lowest(1.73)),
    "cogview4": Tiny(
        cogview4, wide(time_embed_dim=64, num_layers=1), middle=0.001, prompt="a red fox in the snow", length=48
    ),
    "qwenimage": Tiny(qwenimage, wide(axes_dims_rope=[16, 24, 24], num_layers=1), length=256, guide=rescaled_cfg),
    "qwenimage-edit": Tiny(
        qwenimage_edit,
        wide(axes_dims_rope=[16, 24, 24], num_layers=1),
        length=512,
        guide=rescaled_cfg,
        references=((224, 320),),  # as `small_references` has it
        unadapted=r"transformer_blocks\.\d+\.txt_mlp\.net\.(0\.proj|2)",
    ),
    "qwenimage-edit-plus": Tiny(
        qwenimage_edit_plus,
        wide(axes_dims_rope=[16, 24, 24], num_layers=1),
        length=512,
        guide=rescaled_cfg,
        references=((224, 320), (256, 256)),
        unadapted=r"transformer_blocks\.\d+\.txt_mlp\.net\.(0\.proj|2)",
    ),
    "krea2": Tiny(
        krea2,
        wide(
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=256,
            axes_dims_rope=[16, 24, 24],
            num_layers=1,
        ),
        length=256,
        guide=extra_cfg,
    ),
    "hunyuanimage": Tiny(
        hunyuanimage, wide(rope_axes_dim=[32, 32]), prompt='a sign "hi"', length=256, factor=32, guided=False
    ),
    "hidream": Tiny(hidream, wide(axes_dims_rope=[32, 16, 16]), middle=0.001, side=1024, deep_side=1024),
    "flux2-dev": Tiny(flux2_dev, wide(axes_dims_rope=[16, 16, 16, 16]), length=512, guided=False, packed_noise=True),
    "flux2-klein": Tiny(flux2_klein, wide(axes_dims_rope=[16, 16, 16, 16]), length=96, packed_noise=True),
    "flux2-dev-edits": Tiny(
        flux2_dev,
        wide(axes_dims_rope=[16, 16, 16, 16]),
        length=512,
        guided=False,
        packed_noise=True,
        references=((64, 96), (80, 64)),
    ),
    "flux2-klein-edits": Tiny(
        flux2_klein, wide(axes_dims_rope=[16, 16, 16, 16]), length=96, packed_noise=True, references=((96, 64),)
    ),
    "ovis-image": Tiny(ovis_image, wide(axes_dims_rope=[16, 24, 24]), length=256),
    "ernie-image": Tiny(
        ernie_image,
        dict(hidden_size=128, ffn_hidden_size=128, rope_axes_dim=[16, 24, 24], num_layers=1),
        packed_noise=True,
    ),
    "prx": Tiny(prx, dict(hidden_size=256, num_heads=4, axes_dim=[32, 32], depth=1), middle=lowest(3.0)),
    "unet": Tiny(unet, None, middle=None),
    "unet-xl": Tiny(unet_xl, None, middle=None),
}
