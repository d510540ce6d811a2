"""How strongly a LoRA file means its updates: dW = strength up @ down, where a tensor `alpha` does not say it.

    tensor alpha                            alpha / rank
    metadata `lora_adapter_metadata`        as PEFT: alpha / r, or alpha / sqrt(r) with use_rslora. rank_pattern and
    adapter_config.json beside the file     alpha_pattern name modules that differ (PEFT 0.21 tuners/lora/layer.py)
    metadata alpha, lora_alpha, ...         alpha / rank
    nothing                                 1

The first that is there counts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dcgen_convert.checkpoint.updates import METADATA
from dcgen_convert.core.errors import InputError

Number = TypeVar("Number", int, float)
CONFIG = "adapter_config.json"
ALPHAS = ("alpha", "lora_alpha", "network_alpha", "ss_network_alpha")  # names of alpha in a file's metadata
# Settings of PEFT under which the weights are no plain LoRA.
OTHER_KINDS = (
    "alora_invocation_tokens",
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "use_dora",
    "use_qalora",
)
CHANGE_THE_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")  # init_lora_weights that also change the base model
MOST_REPEATS = 3  # quantifiers in a module pattern; more could take for ever


@dataclass(frozen=True)
class Stated:
    """What a file states for all its updates.

    Attributes:
        alpha: None: not stated.
        rank: None: not stated; the tensors tell it anyway.
        rslora: whether alpha is divided by the root of the rank.
        alphas, ranks: pattern of a module's name -> its own alpha or rank.
        config: the adapter_config.json that was read, if one was.
    """

    alpha: float | None = None
    rank: int | None = None
    rslora: bool = False
    alphas: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    config: Path | None = None

    def alpha_of(self, module: str, rank: int, path: Path) -> float | None:
        """alpha of ``module``, whose tensors have ``rank``; InputError when another rank is stated."""
        stated = _of(self.ranks, module, self.rank)
        if stated is not None and stated != rank:
            raise InputError(
                f"{self.config or path} says rank {stated} for {module}, whose tensors in {path.name} have {rank}",
                "do they belong together?",
            )
        return _of(self.alphas, module, self.alpha)


def stated(path: Path, metadata: Mapping[str, Any], names: Iterable[str]) -> Stated:
    """What the metadata of the LoRA file ``path`` states, or the adapter_config.json beside it.

    Args:
        names: of its tensors.

    Raises:
        InputError: damaged, or settings of another kind than plain LoRA.
    """
    beside = path.with_name(CONFIG)
    try:
        if METADATA in metadata:
            found = json.loads(metadata[METADATA])
            return _of_config(
                {key.rpartition(".")[2]: value for key, value in found.items() if "text_encoder" not in key}, path
            )
        if beside.is_file() and any(".lora_A." in name for name in names):
            return _of_config(json.loads(beside.read_text(encoding="utf-8-sig")), beside)
        alphas = {float(metadata[key]) for key in ALPHAS if metadata.get(key) not in (None, "None", "")}
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError, re.error) as error:
        where = path if METADATA in metadata or not beside.is_file() else beside
        raise InputError(f"{where} has damaged LoRA metadata: {error}", "fetch it again") from error
    if len(alphas) > 1:
        raise InputError(f"the metadata of {path} state several alphas: {sorted(alphas)}", "keep the right one")
    return Stated(alpha=next(iter(alphas), None))


def _of_config(config: Mapping[str, Any], where: Path) -> Stated:
    """A LoraConfig of PEFT."""
    odd = [key for key in OTHER_KINDS if config.get(key)]
    if str(config.get("peft_type") or "LORA").upper() != "LORA":
        odd.append(f"peft_type {config['peft_type']}")
    if str(config.get("init_lora_weights")).lower().startswith(CHANGE_THE_BASE):
        odd.append(f"init_lora_weights {config['init_lora_weights']}")
    if odd:
        raise InputError(f"{where} uses {odd[0]}: only plain LoRA can be merged")
    rank = config.get("r")
    return Stated(
        alpha=_finite(config["lora_alpha"]) if config.get("lora_alpha") is not None else None,
        rank=None if rank is None else int(rank),
        rslora=bool(config.get("use_rslora")),
        alphas=_patterns(config.get("alpha_pattern"), _finite),
        ranks=_patterns(config.get("rank_pattern"), int),
        config=where if where.name == CONFIG else None,
    )


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"alpha is {value}")
    return number


def _patterns(found: Any, number: Callable[[Any], Number]) -> dict[str, Number]:
    patterns = {str(key): number(value) for key, value in dict(found or {}).items()}
    for key in patterns:
        if len(re.findall(r"[*+?{]", key)) > MOST_REPEATS or re.search(r"\)[*+{]", key):
            raise ValueError(f"the pattern {key!r} is too complex")
        re.compile(key)
    return patterns


def _of(patterns: Mapping[str, Number], module: str, default: Number | None) -> Number | None:
    """The value of the first pattern that ``module`` ends with, as PEFT matches it."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
