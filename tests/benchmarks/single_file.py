"""Time and memory to read a single file, compared with `cp` of the same file.

    python tests/benchmarks/single_file.py FOLDER

The file is a FLUX of at least 4 GB with random weights and tensor names of BFL. The script measures the time to
recognise it, and time and memory to write it as a pipeline folder and to do the surgery. It writes its files into
FOLDER and deletes them again.

Bars: recognised in at most 1 s; import and surgery at 50 % of the throughput of cp; peak memory at most 2 x the largest
tensor + 500 MB. cp is timed alone, and with the fsync that this tool does too. Both run twice, in turns, and the better
run counts. Before each run the disk cache is flushed and the source is dropped from the page cache, so that each run
reads it from the disk. CPU seconds are printed too: on a busy machine or with a faster disk they say more.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import dcgen_convert

TINY = Path(dcgen_convert.__file__).parent / "tiny" / "weights"
CONFIG = {
    "_class_name": "FluxTransformer2DModel", "in_channels": 64, "num_layers": 2, "num_single_layers": 10,
    "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
    "guidance_embeds": True, "axes_dims_rope": [16, 56, 56], "patch_size": 1,
}  # fmt: skip
MB = 1_000_000

# It runs in its own process, so that peak memory is that of the work. The autoencoders of the surgery are loaded before
# the baseline is taken.
WORK = """
import json, resource, sys, time
from pathlib import Path
from types import SimpleNamespace
from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.core.console import NULL
from dcgen_convert.core.journal import Stage
from dcgen_convert.networks import autoencoders
from dcgen_convert.stages import surgery
from dcgen_convert.stages.job import find_autoencoder
file, base, folder = map(Path, sys.argv[1:])
ae = find_autoencoder("tiny-dc-ae-f32", folder)
started = time.perf_counter()
source = load_source("x", str(file), base=str(base), home=folder / "import")
resolved = time.perf_counter() - started
autoencoders.load(ae.folder)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started, cpu = time.perf_counter(), time.process_time()
source.lay_out(NULL)
imported = time.perf_counter() - started
config = source.family.convert_config(source.config, ae.factor, ae.channels, 1024)
job = SimpleNamespace(source=source, family=source.family, ae=ae, converted_config=config, console=NULL)
(folder / "surgery").mkdir()
surgery.run(job, Stage(folder / "surgery"))
total, cpu = time.perf_counter() - started, time.process_time() - cpu
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
times = {"resolve": resolved, "import": imported, "total": total, "cpu": cpu}
print(json.dumps({**times, "before": before * 1024, "peak": peak * 1024}))
"""

RECOGNISE = """
import sys, time
from pathlib import Path
from dcgen_convert.checkpoint.single import read_single
started = time.perf_counter()
single = read_single(Path(sys.argv[1]))
print(time.perf_counter() - started, single.family.name, single.layout, len(single.contents.tensors))
"""


def write_source(path: Path) -> tuple[int, int]:
    """Random bfloat16 weights under BFL's names; (bytes, bytes of the largest tensor)."""
    import diffusers
    import torch

    from dcgen_convert.checkpoint import keymap, stream

    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel.from_config(CONFIG)
    shapes = keymap.find("flux", "bfl").backward(
        {name: tuple(value.shape) for name, value in model.state_dict().items()}
    )
    noise = (torch.randn(stream.CHUNK // 2) * 0.02).bfloat16().view(torch.uint8).numpy().tobytes()

    class Noise(stream.Item):
        def chunks(self):
            for start in range(0, self.size, len(noise)):
                yield noise[: self.size - start]

    items = {name: Noise("BF16", stack.shape) for name, stack in shapes.items()}
    stream.write(path, items)
    return path.stat().st_size, max(item.size for item in items.values())


def write_base(folder: Path) -> None:
    """tiny-flux with the config of a full-width transformer."""
    folder.mkdir()
    for part in (TINY / "tiny-flux").iterdir():
        if part.name != "transformer":
            (folder / part.name).symlink_to(part)
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(CONFIG))


def cold(path: Path) -> None:
    """Flush everything, and take ``path`` out of the page cache."""
    os.sync()
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def copied(source: Path, target: Path) -> tuple[float, float, float]:
    """Seconds of `cp`, of `cp` with its bytes flushed to the disk, and of its CPU time."""
    started, before = time.perf_counter(), os.times()
    subprocess.run(["cp", "--reflink=never", str(source), str(target)], check=True)
    plain, after = time.perf_counter() - started, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    descriptor = os.open(target, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    flushed = time.perf_counter() - started
    target.unlink()
    return plain, flushed, cpu


def child(code: str, *arguments: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return done.stdout.strip().splitlines()[-1]


def main(folder: Path) -> None:
    import shutil

    folder.mkdir(parents=True)
    try:
        file, base = folder / "flux.safetensors", folder / "base"
        size, largest = write_source(file)
        write_base(base)
        seconds, *what = child(RECOGNISE, file).split()
        print(f"{size / 1e9:.2f} GB, largest tensor {largest / MB:.0f} MB")
        print(f"recognised as {' '.join(what)} tensors in {float(seconds):.3f} s")
        runs, copies = [], []
        for turn in range(2):
            cold(file)
            copies.append(copied(file, folder / "copy"))
            cold(file)
            work = folder / f"work-{turn}"
            work.mkdir()
            runs.append(json.loads(child(WORK, file, base, work)))
            shutil.rmtree(work)
        plain, flushed, cpu = (min(column) for column in zip(*copies, strict=True))
        best = min(runs, key=lambda run: run["total"])
        peak = max(run["peak"] for run in runs)
        print(
            f"cp: {size / plain / MB:.0f} MB/s, with fsync {size / flushed / MB:.0f} MB/s "
            f"({np.round(copies, 1).tolist()} s)"
        )
        print(f"import: {size / best['import'] / MB:.0f} MB/s; import + surgery: {size / best['total'] / MB:.0f} MB/s")
        print(f"ratio to cp: {plain / best['total']:.2f}, to cp with fsync: {flushed / best['total']:.2f} (bar 0.50)")
        print(f"CPU: cp {cpu:.1f} s, import + surgery {min(run['cpu'] for run in runs):.1f} s")
        bar = (2 * largest + 500 * MB) / MB
        print(
            f"peak memory: {peak / MB:.0f} MB in all (bar {bar:.0f} MB), of them {best['before'] / MB:.0f} MB before "
            "the work began"
        )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
