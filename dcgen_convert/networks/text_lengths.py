"""Which captions are longer than a model's text encoders read. Only the tokenizers are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dcgen_convert.checkpoint.source import Source

AT_ONCE = 1000  # captions
CLIP = "CLIPTokenizer"


def cut(source: Source, texts: Sequence[str], length: int) -> list[int]:
    """Numbers of the texts of which a part is not read, because they have more tokens than ``length``.

    Beside another text encoder CLIP does not count: it sees the first 77 tokens only, and the other one sees them all.
    A model without a tokenizer, which draws classes, cuts nothing.
    """
    limits = [
        (tokenizer, tokenizer.model_max_length if is_clip else length) for tokenizer, is_clip in _tokenizers(source)
    ]
    found: list[int] = []
    for start in range(0, len(texts), AT_ONCE):
        part = list(texts[start : start + AT_ONCE])
        counts = [[len(ids) for ids in _ids(tokenizer, part)] for tokenizer, _ in limits]
        longer = [any(row[i] > limit for row, (_, limit) in zip(counts, limits, strict=True)) for i in range(len(part))]
        found += [start + i for i, is_longer in enumerate(longer) if is_longer]
    return found


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, truncation=False, verbose=False)["input_ids"]
    return ids


def _tokenizers(source: Source) -> list[tuple[Any, bool]]:
    """The tokenizers that see the whole caption, and whether they are CLIP's."""
    import transformers

    named = {name: kind[1] for name, kind in source.index.items() if name.startswith("tokenizer") and kind and kind[1]}
    others = {name: kind for name, kind in named.items() if not kind.startswith(CLIP)}
    return [
        (getattr(transformers, kind).from_pretrained(source.root / name), kind.startswith(CLIP))
        for name, kind in (others or named).items()
    ]
