"""Tokenizers of the right class and the right number of entries, with a made-up vocabulary; and what prepares pictures
for a text encoder, which has a tokenizer too.

The entries are single characters, pairs of lower-case letters, and groups of four. So a word of English has two or
three tokens, about as many as with a trained vocabulary, and the ids are spread over all of it. Special tokens have the
ids that the published models give them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice, product
from pathlib import Path
from string import ascii_lowercase, digits, punctuation
from typing import Any

from dcgen_convert.core.errors import InputError
from dcgen_convert.networks.processors import for_pictures

END = "</w>"  # CLIP's mark of the last piece of a word
SPACE = "▁"  # as T5 and Gemma write a space
CHARACTERS = [SPACE, *ascii_lowercase, *ascii_lowercase.upper(), *digits, *punctuation]
PAIRS = ["".join(pair) for pair in product(ascii_lowercase, repeat=2)]
STRIDE = 271_829  # has no divisor in common with the number of groups, so each comes once
EXTRA = 100  # T5's sentinels
QWEN = (  # in the order of their ids, the first is 151,643 in the published vocabulary
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
GROUP, PAIR, CHARACTER = -10.0, -8.0, -6.0  # T5's scores are log-probabilities: one large piece beats two small ones


def write(kind: str, size: int, folder: Path, **options: Any) -> None:
    """Write a tokenizer of class ``kind`` with ``size`` entries.

    Args:
        options: of the class, such as model_max_length.

    Raises:
        InputError: ``size`` is too small for the characters, or the class is not known here.
    """
    if kind not in BUILDERS:
        raise InputError(f"no synthetic tokenizer of the class {kind} can be built", f"known: {', '.join(BUILDERS)}")
    made = BUILDERS[kind](size, options)
    entries = len(getattr(made, "tokenizer", made))
    if entries != size:
        raise InputError(f"a {kind} needs at least {entries} entries, {size} were asked for")
    made.save_pretrained(folder)


def groups() -> Iterator[tuple[str, str]]:
    """Two pairs of letters each, in an order that mixes the alphabet."""
    count = len(PAIRS) ** 2
    for number in range(count):
        first, second = divmod(number * STRIDE % count, len(PAIRS))
        yield PAIRS[first], PAIRS[second]


def clip(size: int, options: dict[str, Any]) -> Any:
    """Bytes, bytes that end a word, merges; the two special tokens are the last entries."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    special = ["<|startoftext|>", "<|endoftext|>"]
    characters = list(bytes_to_unicode().values())
    entries = [*characters, *(character + END for character in characters)]
    merges = list(islice(_clip_merges(), max(0, size - len(entries) - len(special))))
    entries += [*map("".join, merges), *special]
    return CLIPTokenizer(vocab=_numbered(entries), merges=merges, **options)


def _clip_merges() -> Iterator[tuple[str, str]]:
    for pair in PAIRS:
        yield pair[0], pair[1]
        yield pair[0], pair[1] + END
    for first, second in groups():
        yield first, second
        yield first, second + END


def gemma(size: int, options: dict[str, Any]) -> Any:
    """Special tokens, bytes for what is no character of its own, characters, merges."""
    from tokenizers.processors import TemplateProcessing
    from transformers import GemmaTokenizer

    entries = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), *CHARACTERS]
    pairs = ((pair[0], pair[1]) for pair in PAIRS)
    merges = list(islice(chain(pairs, groups()), max(0, size - len(entries))))
    tokenizer = GemmaTokenizer(vocab=_numbered([*entries, *map("".join, merges)]), merges=merges, **options)
    first = ("<bos>", tokenizer.bos_token_id)  # as the published one does, every text begins with it
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[first]
    )
    return tokenizer


def t5(size: int, options: dict[str, Any]) -> Any:
    """Special tokens, characters, larger pieces with their scores; the sentinels are the last entries."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    sentinels = [(f"<extra_id_{number}>", 0.0) for number in reversed(range(EXTRA))]
    characters = [(character, CHARACTER) for character in CHARACTERS]
    larger = chain(((pair, PAIR) for pair in PAIRS), (("".join(group), GROUP) for group in groups()))
    room = max(0, size - len(special) - len(characters) - len(sentinels))
    return T5Tokenizer(vocab=[*special, *characters, *islice(larger, room), *sentinels], extra_ids=EXTRA, **options)


def qwen2(size: int, options: dict[str, Any]) -> Any:
    """Bytes and merges; the special tokens are the last entries."""
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = list(bytes_to_unicode().values())
    pairs = ((pair[0], pair[1]) for pair in PAIRS)
    merges = list(islice(chain(pairs, groups()), max(0, size - len(characters) - len(QWEN))))
    vocab = _numbered([*characters, *map("".join, merges)])
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, pad_token=QWEN[0], **options)
    tokenizer.add_special_tokens({"additional_special_tokens": list(QWEN[1:])})
    return tokenizer


def qwen2_processor(size: int, options: dict[str, Any]) -> Any:
    """The tokenizer and what prepares pictures, of the published size: up to 16,384 tokens for each."""
    from transformers import Qwen2VLImageProcessorPil

    most = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}
    return for_pictures()(image_processor=Qwen2VLImageProcessorPil(size=most), tokenizer=qwen2(size, options))


def _numbered(entries: list[str]) -> dict[str, int]:
    return {entry: number for number, entry in enumerate(entries)}


BUILDERS = {
    "CLIPTokenizer": clip,
    "GemmaTokenizer": gemma,
    "T5Tokenizer": t5,
    "Qwen2Tokenizer": qwen2,
    "Qwen2VLProcessor": qwen2_processor,
}
