"""What the stages measured, in words: the table of the model card. The manifest holds every figure by its name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from dcgen_convert.evaluation import speed, words
from dcgen_convert.evaluation.rows import BASE, CEILING, CONVERTED, FLOOR, values
from dcgen_convert.evaluation.rows import words as words_of
from dcgen_convert.evaluation.summary import STAGE


def rows(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, value) of every figure that a reader of the card can use; only what was measured."""
    metrics, recipe = manifest["metrics"], manifest["recipe"]
    return [
        *_autoencoder(metrics.get("latents", {})),
        *_training(metrics, recipe),
        *_quantised(metrics.get("quantize", {}), metrics.get("verify", {})),
        *_compared(metrics.get("verify", {})),
        *_evaluated(_evaluation(metrics)),
        *speed.rows(metrics.get("benchmark", {})),
    ]


def _evaluation(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the verb `evaluate` measured, else what stage `verify` did with `evaluate.metrics`; empty for neither."""
    found: Mapping[str, Any] = metrics.get(STAGE) or metrics.get("verify", {}).get("evaluation") or {}
    return found


def results(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `evaluate` measured, in the form of the hub's metadata (`model-index`): a dict of each result's fields."""
    found = _evaluation(manifest["metrics"])
    prompts = f"{found.get('prompts')}, {found.get('count')} prompts"
    return [
        {
            "dataset_name": prompts,
            "dataset_type": "prompts",
            "metric_type": name,
            "metric_value": float(f"{value:.6g}"),
            "metric_name": words_of(row)[name],
        }
        for row in found.get("measures", [])
        for name, value in values([row]).items()
    ]


SETS = {BASE: "base model", CONVERTED: "this model", FLOOR: "the base with other seeds", CEILING: "autoencoder alone"}


def _evaluated(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for row in found.get("measures", []):
        of = f"{row['label']} ({row['better']} is better; {found['count']} prompts)"
        sets = {name: row[name] for name in SETS if name in row}
        if row["kind"] == "distance" and sets:
            yield f"{of}: distance to the base model's pictures", _shown(sets)
        elif sets:
            yield of, _shown(sets) + _interval(row)
        if "to_reference" in row:
            name = (found.get("reference") or {}).get("name")
            yield f"{of}: distance to the pictures of {name}", _shown(row["to_reference"])


def _shown(sets: Mapping[str, float]) -> str:
    return ", ".join(f"{SETS[name]} {value:.4g}" for name, value in sets.items())


def _interval(row: Mapping[str, Any]) -> str:
    if "difference" not in row:
        return ""
    return f"; difference {row['difference']:+.3g}, in 95 % of resamplings {row['low']:+.3g} to {row['high']:+.3g}"


def _autoencoder(latents: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    value = _mean(latents.get("roundtrip_psnr_db"))
    if value is not None:
        yield words.ROUND_TRIP, f"{value:.1f} dB"
    value = _mean(latents.get("psnr_bf16_target_db"))
    if value is not None:
        yield words.BFLOAT16, f"{value:.1f} dB"


def _training(metrics: Mapping[str, Any], recipe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    phases = (recipe.get("adapt") or {}).get("phases") or []
    for stage, record in metrics.items():
        found = re.fullmatch(r"(adapt|merge)-(\d+)(?:-(\w+))?", stage)
        if found is None or not isinstance(record, Mapping):
            continue
        number = int(found[2])
        side = f", {phases[number - 1]['resolution']} px" if number <= len(phases) else ""
        own = f" (network {found[3]})" if found[3] else ""
        side += own
        before, after = (_mean((record.get("evaluation") or {}).get(when)) for when in ("before", "after"))
        if before is not None and after is not None:
            yield (
                f"Training, phase {number}{side}: loss on pictures that were kept apart, before and after",
                f"{before:.4g} and {after:.4g}",
            )
        early = record.get("ended")
        if isinstance(early, Mapping):
            yield (
                f"Training, phase {number}{side}: ended early, because its part of the budget was spent",
                f"step {early.get('step')} of {early.get('of')}",
            )
        gap = record.get("gap")
        if isinstance(gap, list) and gap:
            yield (
                f"After phase {number}{own}: distance of the last block's tokens from the base model's (0 % is equal)",
                f"{gap[-1]:.1%}",
            )


def _quantised(quantize: Mapping[str, Any], verify: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "svdq" in quantize:
        yield (
            "Linear layers in 4 bits, of them AWQ",
            f"{quantize['svdq'] + quantize.get('awq', 0)}, {quantize.get('awq', 0)}",
        )
    layers = [record for record in quantize.get("layers", []) if isinstance(record, Mapping)]
    for key, what in (("error", "output"), ("weight_error", "weight")):
        errors = sorted(record[key] for record in layers if isinstance(record.get(key), int | float))
        if errors:
            yield (
                f"Relative error of a 4-bit layer's {what}: median and worst",
                f"{errors[len(errors) // 2]:.2%} and {errors[-1]:.2%}",
            )
            break
    value = _mean(verify.get("psnr_quantised_db"))
    if value is not None:
        yield words.QUANTISED, f"{value:.1f} dB"


def _compared(verify: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    kinds = {
        "accuracy_": (words.ACCURACY, "{:.1%}"),
        "motion_": (words.MOTION, "{:.1%}"),
        "edit_accuracy_": (words.EDITED, "{:.1%}"),
        "preservation_": (words.KEPT, "{:.1%}"),
        "frechet_": (words.FRECHET, "{:.4g}"),
    }
    for prefix, (what, form) in kinds.items():
        found = {key.removeprefix(prefix): value for key, value in verify.items() if key.startswith(prefix)}
        if found:
            yield (
                what,
                ", ".join(f"{words.PICTURES_OF.get(key, key)} {form.format(value)}" for key, value in found.items()),
            )


def _mean(value: Any) -> float | None:
    """A number, or the mean that a record of figures holds."""
    if isinstance(value, Mapping):
        value = value.get("mean")
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
