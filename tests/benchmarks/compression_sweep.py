"""Quality against compression on the tiny world: one recipe with one autoencoder after another, a table and its curve.

    PYTHONPATH=. python tests/benchmarks/compression_sweep.py WORK [--side 128 | 256] [OPTION ...]

Run it in the repository's root folder: it needs tools/tiny. By the real command, once per autoencoder, from the same
pictures, with as many steps, judged on the same prompts: recipe `ablations/compression` at f32, f64 and f128, or with
--side 256 the recipe `tiny-flux-256` at f32, f64, f128 and f256. f128 and f256 do not ship: where WORK has none they
are trained there first (6 and 5 minutes of one core). Every OPTION is one of `dcgen-convert convert`. WORK keeps runs
and bundles, so that the script goes on where it stopped. The table goes to stdout and WORK/SIDE.md, the curve to
WORK/SIDE.svg.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from conversion import PROMPTS, convert
from step_speed import measured

from dcgen_convert.evaluation import tiny_world
from dcgen_convert.evaluation.charts import line_file
from dcgen_convert.networks import autoencoders
from tools.tiny import assemble, parts

SHIPPED = {"f32": "tiny-dc-ae-f32", "f64": "tiny-dc-ae-f64"}
TRAINED = {"f128": "dc-f128c512", "f256": "dc-f256c2048"}
RECIPES = {
    128: ("ablations/compression", ("f32", "f64", "f128")),
    256: ("tiny-flux-256", ("f32", "f64", "f128", "f256")),
}
BATCH = 16  # pictures per step when its time is taken
HEAD = (
    "| | image tokens | drawn pictures, round trip: accuracy, PSNR | held-out loss | converted: accuracy, Frechet "
    "| one step |\n|---|---|---|---|---|---|"
)


def main(work: Path, side: int, options: list[str]) -> None:
    recipe, names = RECIPES[side]
    lines, curves, base = [HEAD], {"drawn pictures, round trip": [], "converted": []}, ""
    for name in names:
        if name in TRAINED and not (work / TRAINED[name] / "config.json").exists():
            parts.make(work, TRAINED[name], print)
        ae, folder = SHIPPED.get(name) or str(work / TRAINED[name]), work / f"{side}-{name}"
        call = [recipe, "--ae", ae, "--set", f"evaluate.prompts={PROMPTS}", *options]
        document = convert(folder, call, work / f"{side}-f32")
        metrics = document["metrics"]
        (losses,) = (one["metrics"]["evaluation"] for one in document["stages"] if one["name"] == "adapt-1")
        codec = autoencoders.load(folder / "bundle" / "vae")
        accuracy, psnr = assemble.round_trip(codec, tiny_world.judge(), side)
        before, after, tokens, _ = measured(folder / "run", BATCH)
        width, wide = (side / count**0.5 for count in tokens)  # px of a token's side
        if not base:  # beside f32 the base may be drawn at a size that it was not trained on
            base = f"\nThe base: {metrics['accuracy_source']:.1%}, {metrics['frechet_source']:.0f}."
            curves["converted"].append((width, metrics["accuracy_source"]))
        for line, value in zip(curves.values(), (accuracy.mean().item(), metrics["accuracy_converted"]), strict=True):
            line.append((wide, value))
        lines.append(
            f"| {name}c{codec.channels} | {tokens[0]} to {tokens[1]} | {accuracy.mean():.1%}, {psnr:.1f} dB "
            f"| {losses['before']['mean']:.3f} to {losses['after']['mean']:.3f} | {metrics['accuracy_converted']:.1%}, "
            f"{metrics['frechet_converted']:.0f} | {before / after:.2f} x faster |"
        )
        print("\n".join(lines if len(lines) == 2 else lines[-1:]), flush=True)
    lines.append(base)
    print(lines[-1])
    (work / f"{side}.md").write_text("\n".join(lines) + "\n")
    (work / f"{side}.svg").write_text(
        line_file(curves, x_label=f"px of a token's side (the base: {width:g})", y_label="attribute accuracy")
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--side", type=int, choices=RECIPES, default=128)
    known, rest = parser.parse_known_args()
    main(known.work.resolve(), known.side, rest)
