"""Quality against compression on the tiny world: one recipe with one autoencoder after another, a table and its curve.

    PYTHONPATH=. python tests/benchmarks/compression_sweep.py WORK [--side 128 | 256] [OPTION ...]

Run it in the repository's root folder: it needs tools/tiny. By the real command, once per autoencoder, from the same
pictures, with as many steps, judged on the same prompts: recipe `ablations/compression` at f32, f64 and f128, or with
--side 256 the recipe `tiny-flux-256` at f32, f64, f128 and f256. f128, and from f64 on those for 256 px, do not ship:
where WORK has none they are trained there first (some 6 minutes of one core each). Every OPTION is one of
`dcgen-convert convert`. WORK keeps runs and bundles, so that the script goes on where it stopped. The table goes to
stdout and WORK/SIDE.md, the curve to WORK/SIDE.svg.
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

AUTOENCODERS = {  # of each side: shipped ones, and parts of tools/tiny in the order in which they are trained
    128: {"f32": "tiny-dc-ae-f32", "f64": "tiny-dc-ae-f64", "f128": "dc-f128c512"},
    256: {"f32": "tiny-dc-ae-f32", "f64": "dc-f64c128-256px", "f128": "dc-f128c512-256px", "f256": "dc-f256c2048"},
}
RECIPES = {128: "ablations/compression", 256: "tiny-flux-256"}
BATCH = 16  # pictures per step when its time is taken
HEAD = (
    "| | image tokens | drawn pictures, round trip: accuracy, PSNR | held-out loss | converted: accuracy, Frechet "
    "| one step |\n|---|---|---|---|---|---|"
)


def main(work: Path, side: int, options: list[str]) -> None:
    recipe = RECIPES[side]
    lines, curves, base = [HEAD], {"drawn pictures, round trip": [], "converted": []}, ""
    for name, ae in AUTOENCODERS[side].items():
        trained, folder = ae in parts.NAMES, work / f"{side}-{name}"
        if trained and not (work / ae / "config.json").exists():
            parts.make(work, ae, print)
        call = [recipe, "--ae", str(work / ae) if trained else ae, "--set", f"evaluate.prompts={PROMPTS}", *options]
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
