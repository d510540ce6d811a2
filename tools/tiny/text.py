"""Small frozen text encoders with real tokenizers: CLIP + T5 for tiny-flux, Gemma2 for tiny-sana, UMT5 for tiny-wan,
CLIP for tiny-unet.

The encoders have random weights and are not trained. A caption of the tiny world is clear even without the order of
its words, so the transformers only need different features for different words.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
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
    UMT5Config,
    UMT5EncoderModel,
)

from dcgen_convert.tiny import videos, world

WIDTH = 64
LENGTH = 16  # tokens; the longest caption takes 12
CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation


def words() -> list[str]:
    """All words of the captions, sorted."""
    texts = [name for names in world.ATTRIBUTES.values() for name in names]
    return sorted({word for text in [*texts, "a"] for word in text.split()})


def _bpe(prefix: str, suffix: str) -> tuple[list[str], list[tuple[str, str]]]:
    """(pieces, merges) of a byte-pair encoding in which each word of the captions is one token."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=suffix))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        max_token_length=40,
        initial_alphabet=list(CHARACTERS),
        end_of_word_suffix=suffix,
        show_progress=False,
    )
    tokenizer.train_from_iterator([prefix + word for word in words()] * 4, trainer)
    state = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(state["vocab"], key=state["vocab"].get)
    extra = [c + suffix for c in CHARACTERS if suffix and c + suffix not in state["vocab"]]
    return pieces + extra, [tuple(m) for m in state["merges"]]


def _kept(folder: Path, cls: type, make: Callable[[], Any], **settings: Any) -> Any:
    """The tokenizer in ``folder``. The first call makes it: a second training would number its pieces differently."""
    if not folder.exists():
        make().save_pretrained(folder)
    return cls.from_pretrained(folder, **settings)


def _clip_tokenizer() -> CLIPTokenizer:
    pieces, merges = _bpe("", "</w>")
    vocab = {piece: i for i, piece in enumerate(["<|startoftext|>", "<|endoftext|>", *pieces])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def clip(work: Path, length: int = 77, pooled: bool = True) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """CLIP's text model and tokenizer.

    Args:
        length: tokens to which the tokenizer pads by default.
        pooled: whether the last token must carry the whole caption (tiny-flux), or each token its own word (tiny-unet).
    """
    tokenizer = _kept(work / "clip-tokenizer", CLIPTokenizer, _clip_tokenizer, model_max_length=length)
    torch.manual_seed(1)
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            projection_dim=WIDTH,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if pooled and name.endswith(("v_proj.weight", "out_proj.weight")):
                weight.mul_(12)  # attention must carry the words to the last token
            elif not pooled and name.endswith("token_embedding.weight"):
                weight.mul_(50)  # to std 1, above what attention adds
    return model.eval(), tokenizer


def t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    return _t5(words(), T5Config, T5EncoderModel)


def umt5() -> tuple[UMT5EncoderModel, T5Tokenizer]:
    """Its vocabulary has the words of the motions too. The longest caption of a video takes 15 tokens."""
    moving = {word for phrase in videos.MOTIONS for word in phrase.split()}
    return _t5(sorted({*words(), *moving}), UMT5Config, UMT5EncoderModel)


def _t5(known: list[str], config: type, cls: type) -> tuple[Any, T5Tokenizer]:
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocab += [("▁" + word, -2.0) for word in known] + [(c, -8.0) for c in CHARACTERS]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)
    torch.manual_seed(2)
    model = cls(
        config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=16,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
    # Weak mixing: the pipeline pads without a mask, and the features must not depend on the padded length.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("SelfAttention.o.weight"):
                weight.mul_(0.1)
    return model.eval(), tokenizer


def _gemma_tokenizer() -> GemmaTokenizer:
    pieces, merges = _bpe("▁", "")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    byte_pieces = [f"<0x{i:02X}>" for i in range(256)]
    vocab = {piece: i for i, piece in enumerate([*special, *byte_pieces, *pieces])}
    return GemmaTokenizer(vocab=vocab, merges=merges, model_max_length=300, add_bos_token=True)


def gemma(work: Path) -> tuple[Gemma2Model, GemmaTokenizer]:
    tokenizer = _kept(work / "gemma-tokenizer", GemmaTokenizer, _gemma_tokenizer)
    torch.manual_seed(3)
    model = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=512,
            query_pre_attn_scalar=16,
            sliding_window=512,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
    )
    with torch.no_grad():
        model.embed_tokens.weight.normal_(std=1 / WIDTH**0.5)
    return model.eval(), tokenizer
