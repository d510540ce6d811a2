"""Peak memory of quantising a random-weight FLUX of at least 4 GB on disk, beside what the bar allows.

`python tests/benchmarks/svdquant_memory.py FOLDER [blocks to quantise]` writes a 4.4 GB source into FOLDER once, at
full width (3072, 15360 into proj_out), and quantises the targets of its first blocks, by default one double and one
single block, each calibrated on four calls of 1024 + 256 tokens. Bar: one block + its Hessians + 1 GB above the
baseline, which is the process after its imports. The block is counted in float32, as a CPU runs it.
"""

import resource
import sys
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch

from dcgen_convert.console import NULL
from dcgen_convert.svdquant.quantize import quantize
from dcgen_convert.svdquant.settings import Settings
from dcgen_convert.svdquant.shards import write_folder
from dcgen_convert.svdquant.skeleton import build
from dcgen_convert.svdquant.source import Entry

CONFIG = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 10,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}


class RandomEntry(Entry):
    """A tensor of noise that is drawn while it is written."""

    def chunks(self):
        torch.manual_seed(zlib.crc32(self.name.encode()))
        yield (torch.randn(self.shape) * 0.02).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()


def write_source(folder: Path) -> None:
    from dcgen_convert.files import write_json
    from dcgen_convert.svdquant.shards import Item

    folder.mkdir(parents=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in build(CONFIG).state_dict().items()}
    items = [
        Item(name, RandomEntry(name, torch.bfloat16, shape, folder, 0, 2 * torch.Size(shape).numel()))
        for name, shape in shapes.items()
    ]
    write_folder(folder, items, 5 * 1000**3)
    write_json(folder / "config.json", CONFIG)


def call(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.zeros(1024), torch.arange(1024) // 32, torch.arange(1024) % 32], 1)
    return {
        "hidden_states": torch.randn(1, 1024, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, 256, 4096, generator=generator),
        "pooled_projections": torch.randn(1, 768, generator=generator),
        "timestep": torch.rand(1, generator=generator),
        "guidance": torch.full((1,), 3.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(256, 3),
    }


def peak_of(work) -> float:
    """GB of resident memory at most while `work()` runs, sampled every 20 ms."""
    process, most, done = psutil.Process(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, process.memory_info().rss)
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    work()
    done.set()
    thread.join()
    return most / 1e9


def main(root: Path, count: int) -> None:
    source = root / "source"
    if not source.exists():
        write_source(source)
    model = build(CONFIG)
    lists = ("transformer_blocks", "single_transformer_blocks")
    wanted = [f"{name}.{index}" for index in range(count) for name in lists]
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    inside = [name for name in linears if any(name.startswith(f"{block}.") for block in wanted)]
    targets = SimpleNamespace(
        svdq=[name for name in inside if ".norm" not in name], awq=[name for name in inside if ".norm" in name]
    )
    block = 4 * max(sum(p.numel() for p in model.get_submodule(path).parameters()) for path in wanted) / 1e9
    hessians = 4 * (3072**2 + 15360**2) / 1e9  # the single block's: one for q, k, v and proj_mlp, one for proj_out
    baseline = psutil.Process().memory_info().rss / 1e9
    began, calls = time.monotonic(), [call(seed) for seed in range(4)]
    settings = Settings(hessian_tokens=4096)
    output = root / f"nvfp4-{int(time.time())}"
    peak = peak_of(lambda: quantize(source, output, targets, settings, calls, NULL))
    size = sum(path.stat().st_size for path in source.iterdir()) / 1e9
    allowed = block + hessians + 1
    print(f"source {size:.2f} GB, {len(inside)} layers quantised in {time.monotonic() - began:.0f} s")
    print(f"peak {peak:.2f} GB, {peak - baseline:.2f} GB above the baseline of {baseline:.2f} GB;", end=" ")
    print(f"allowed {allowed:.2f} GB = block {block:.2f} + Hessians {hessians:.2f} + 1:", end=" ")
    print("met" if peak - baseline <= allowed else "MISSED")
    print(f"ru_maxrss {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
