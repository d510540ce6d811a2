"""The parts of a pipeline that transformers loads: text encoders and tokenizers.

transformers fills a tensor that a checkpoint lacks, or calls by another name, with random numbers, and only warns. A
tokenizer without its vocabulary loads too, and reads every word as unknown. Here both are errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dcgen_convert.checkpoint import trust
from dcgen_convert.checkpoint.agreement import some
from dcgen_convert.core.bars import quiet_transformers
from dcgen_convert.core.errors import InputError, ResourceError

OLDEST = (5, 8)  # transformers; older versions load text encoders of newer ones with random weights
# Tensors that older versions saved and newer ones work out themselves.
COMPUTED = re.compile(r"(^|\.)(position_ids|inv_freq|masked_bias)$")
# The other half of a larger model, of which the pipeline takes the text encoder.
OTHER_HALF = re.compile(r"^(decoder|lm_head|logit_scale|text_projection|vision_model|visual_projection)\b")
SENTENCE = "a photograph of a red circle and a small blue house on a table"
FETCH = "fetch the checkpoint again"


def check(root: Path, index: Mapping[str, Any]) -> None:
    """Load every text encoder without memory and every tokenizer of the pipeline folder ``root``.

    Only headers of weights are read.

    Args:
        index: its model_index.json.

    Raises:
        InputError: a text encoder lacks tensors or has others, or a tokenizer knows no words.
        ResourceError: the installed transformers is too old.
    """
    import diffusers
    import transformers

    getattr(diffusers, str(index.get("_class_name")), None)  # PRX's pipeline gives transformers its text encoder
    require_version(transformers.__version__)
    for part, (library, name) in trust.components(index).items():
        cls = getattr(transformers, name, None) if library == "transformers" else None
        if not isinstance(cls, type):
            continue
        if issubclass(cls, transformers.PreTrainedModel):
            _check_model(cls, root / part)
        elif issubclass(cls, transformers.PreTrainedTokenizerBase):
            _check_tokenizer(cls, root / part)


def require_version(version: str) -> None:
    """ResourceError when transformers is too old."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST:
        raise ResourceError(
            f"transformers {version} is too old: it loads text encoders of newer versions with random weights",
            f"pip install 'transformers>={'.'.join(map(str, OLDEST))}'",
        )


def _check_model(cls: Any, folder: Path) -> None:
    """InputError unless the tensors in ``folder`` are those that its config asks for."""
    try:
        with quiet_transformers():
            _, info = cls.from_pretrained(
                folder,
                device_map="meta",
                attn_implementation="eager",  # whatever the config says: it may name code on the hub
                output_loading_info=True,
                use_safetensors=True,
                local_files_only=True,
            )
    except (ImportError, ValueError, RuntimeError, OSError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder} does not load: {_first_line(error)}", FETCH) from error
    lost = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    surplus = [key for key in info["unexpected_keys"] if not (COMPUTED.search(key) or OTHER_HALF.match(key))]
    if lost:
        renamed = f", but has {some(surplus)}" if surplus else ""
        raise InputError(
            f"{folder} lacks {len(lost)} tensors of its {cls.__name__}, which would be random: {some(lost)}{renamed}",
            f"{FETCH}, or install the version of transformers that saved it",
        )
    if surplus:
        raise InputError(
            f"{folder} has {len(surplus)} tensors that its {cls.__name__} does not ask for: {some(surplus)}",
            "is its config the right one?",
        )


def _check_tokenizer(cls: Any, folder: Path) -> None:
    """InputError for a tokenizer that knows no words."""
    try:
        with quiet_transformers():
            tokenizer = cls.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            found = set(tokenizer(SENTENCE).input_ids) - set(tokenizer.all_special_ids)
            empty = set(tokenizer("").input_ids)
    except Exception as error:  # tokenizers raises its own kinds, bare Exception among them
        raise InputError(f"the tokenizer {folder} does not load: {_first_line(error)}", FETCH) from error
    if len(found - empty) < 2:  # what a tokenizer without its vocabulary leaves: unknown words, and perhaps spaces
        raise InputError(
            f"the tokenizer {folder} knows no words: its vocabulary of {len(tokenizer)} entries is not whole", FETCH
        )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
