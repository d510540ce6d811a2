"""Quality against compression on the tiny world: one recipe at f32, f64 and f128, a table and its curve.

    PYTHONPATH=. python tests/benchmarks/compression_sweep.py WORK

Run it in the repository's root folder: it needs tools/tiny. It runs recipe `ablations/compression` by the real command
once per autoencoder: the same pictures, steps and prompts. f128 does not ship: where WORK has no dc-f128c512, it is
trained there first (about a quarter of an hour of one core). WORK keeps runs and bundles, so that the script goes on
where it stopped. The table goes to stdout and WORK/table.md, the curve to WORK/compression.svg.
"""

from __future__ import annotations

import sys
from pathlib import Path

from conversion import convert
from step_speed import measured

from dcgen_convert.evaluation.charts import line_file
from dcgen_convert.evaluation.tiny_world import judge
from dcgen_convert.families import catalog
from dcgen_convert.networks import autoencoders
from dcgen_convert.tiny import world
from tools.tiny import assemble, parts

PART = "dc-f128c512"
RECIPE = "ablations/compression"
BATCH = 16  # pictures per step when its time is taken
HEAD = (
    "| | image tokens | drawn pictures, round trip: accuracy, PSNR | the base's pictures, round trip: accuracy, "
    "Frechet "
    "| converted: accuracy, of the base's, Frechet | one step |\n|---|---|---|---|---|---|"
)


def main(work: Path) -> None:
    if not (work / PART / "config.json").exists():
        parts.make(work, PART, print)
    aliases = {"f32": "tiny-dc-ae-f32", "f64": "tiny-dc-ae-f64"}
    spelled = aliases | {"f128": str(work / PART)}
    folders = {name: catalog.AUTOENCODERS[alias].folder for name, alias in aliases.items()} | {"f128": work / PART}
    lines, curves = [HEAD], {"the base's pictures, round trip": [], "converted": []}
    for name, ae in spelled.items():
        metrics = convert(work / name, [RECIPE, "--ae", ae], work / "f32")["metrics"]
        codec = autoencoders.load(folders[name])
        accuracy, psnr = assemble.round_trip(codec, judge())
        before, after, tokens, _ = measured(work / name / "run", BATCH)
        source, converted = metrics["accuracy_source"], metrics["accuracy_converted"]
        width, wide = (world.SIDE / count**0.5 for count in tokens)  # px of a token's side
        for line, value in zip(curves.values(), (metrics["accuracy_round_trip"], converted), strict=True):
            line[:] = line or [(width, source)]
            line.append((wide, value))
        lines.append(
            f"| {name}c{codec.channels} | {tokens[0]} to {tokens[1]} | {accuracy.mean():.1%}, {psnr:.1f} dB "
            f"| {metrics['accuracy_round_trip']:.1%}, {metrics['frechet_round_trip']:.0f} "
            f"| {converted:.1%}, {converted / source:.1%}, {metrics['frechet_converted']:.0f} | {before / after:.2f} "
            "x faster |"
        )
        print("\n".join(lines if len(lines) == 2 else lines[-1:]), flush=True)
    lines.append(f"\nThe base itself: {source:.1%}, Frechet distance {metrics['frechet_source']:.0f}.")
    print(lines[-1])
    (work / "table.md").write_text("\n".join(lines) + "\n")
    (work / "compression.svg").write_text(
        line_file(curves, x_label="px of a token's side (the base: 16)", y_label="attribute accuracy")
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
