"""Quality of whole conversions on the tiny world: runs recipes by the real command and prints one table row for each.

    python tests/benchmarks/conversion.py WORK [NAME ...]

WORK keeps runs and bundles, so that the script goes on where it stopped. Rows, with the options that make them, stand
in ROWS. A row starts from a copy of the run that SHARED names, where there is one: the stages that both have in common
hold.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

PROMPTS = 256
HEAD = (
    "| | minutes | loss start / end | accuracy source / converted / ratio | Frechet source / converted | 4-bit: "
    "accuracy, PSNR |\n"
    "|---|---|---|---|---|---|"
)
HEAD_STEPS = ["--set", "align_head.steps=240", "--set", "adapt.phases.0.steps=960"]  # as many in all
ROWS: dict[str, list[str]] = {
    "tiny-flux f32": ["tiny-flux", "--quantize", "nvfp4"],
    "tiny-flux f64": ["tiny-flux", "--ae", "tiny-dc-ae-f64"],
    "tiny-sana f64": ["tiny-sana"],
    "tiny-dit f32": ["tiny-dit"],
    "long: tiny-flux f32": ["tiny-flux-long", "--quantize", "nvfp4"],
    "long: tiny-flux f64": ["tiny-flux-long", "--ae", "tiny-dc-ae-f64"],
    "long: tiny-sana f64": ["tiny-sana-long"],
    "long: tiny-dit f32": ["tiny-dit-long"],
    "no alignment": ["ablations/no-alignment"],
    "plain flow loss": ["ablations/plain-flow-loss"],
    "full fine-tune": ["ablations/full-finetune"],
    "guidance of the data": ["tiny-flux", "--set", "adapt.data_guidance=3.5"],
    "xavier head": ["tiny-flux", "--set", "align_head.method=xavier", *HEAD_STEPS],
    "adamw embedder": ["tiny-flux", "--set", "align_embedder.method=adamw"],
    "teacher null branch": ["tiny-flux", "--set", "adapt.null_branch=teacher"],
}
SHARED = {"long: tiny-flux f64": "long: tiny-flux f32", "tiny-flux f64": "tiny-flux f32"}
SHARED |= {name: "tiny-flux f32" for name in list(ROWS)[list(ROWS).index("no alignment") :]}


def folder_of(work: Path, name: str) -> Path:
    return work / name.replace(" ", "-").replace(":", "")


def main(work: Path, names: list[str]) -> None:
    print(HEAD)
    for name in names or ROWS:
        options = [*ROWS[name], "--set", f"evaluate.prompts={PROMPTS}"]
        print(row(name, convert(folder_of(work, name), options, folder_of(work, SHARED.get(name, name)))), flush=True)


def convert(folder: Path, options: list[str], shared: Path) -> dict:
    """The result document of a conversion into ``folder``, which starts from a copy of the run in ``shared`` if that
    is there. Trainings and what follows from them are not copied: the rows differ there, and more than ten minutes of
    work are not deleted without being asked for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (shared / "run").exists() and not (folder / "run").exists():
        other = shutil.ignore_patterns("adapt-*", "merge-*", "bundle", "quantize", "verify")
        shutil.copytree(shared / "run", folder / "run", ignore=other)
    command = [sys.executable, "-m", "dcgen_convert.cli", "convert", *options]
    command += ["-o", str(folder / "bundle"), "--run-dir", str(folder / "run"), "-y", "--json"]
    with open(folder / "log.txt", "a") as log:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, check=True)
    return json.loads(done.stdout)


def row(name: str, document: dict) -> str:
    stages = {stage["name"]: stage for stage in document["stages"]}
    seconds = sum(stage["seconds"] for stage in stages.values())
    adapt = next(stage["metrics"] for key, stage in stages.items() if key.startswith("adapt-"))
    metrics = document["metrics"]
    loss = f"{stages['align-head']['metrics']['loss_start']:.3f} / {adapt['evaluation']['after']['mean']:.3f}"
    source, converted = metrics["accuracy_source"], metrics["accuracy_converted"]
    accuracy = f"{source:.3f} / {converted:.3f} / {converted / source:.1%}"
    frechet = f"{metrics['frechet_source']:.1f} / {metrics['frechet_converted']:.1f}"
    four_bit = (
        f"{metrics['accuracy_nvfp4']:.3f}, {metrics['psnr_quantised_db']:.1f} dB" if "accuracy_nvfp4" in metrics else ""
    )
    return f"| {name} | {seconds / 60:.1f} | {loss} | {accuracy} | {frechet} | {four_bit} |"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
