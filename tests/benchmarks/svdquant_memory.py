"""Peak memory of quantising a random-weight FLUX of at least 4 GB on disk, beside what the bar allows.

`python tests/benchmarks/svdquant_memory.py FOLDER [BLOCK ...]` writes a 4.4 GB source into FOLDER once, at full width
(3072, 15360 into proj_out), and quantises every target of the blocks named, by default the first single block, whose
proj_out has the largest Hessian there is (transformer_blocks.0 takes three times as long). Bar: one block + its
Hessians + 1 GB above the baseline, which is the process after its imports. The block is counted in float32, as a CPU
runs it. To spare time: few tokens (two calls of 256 + 64) and one refit; neither changes what is held at once.
"""

import resource
import sys
import threading
import time
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import torch

from dcgen_convert.checkpoint.shards import write_folder
from dcgen_convert.checkpoint.stream import Item
from dcgen_convert.core.console import NULL
from dcgen_convert.core.files import write_json
from dcgen_convert.families import QuantTargets
from dcgen_convert.svdquant import layer
from dcgen_convert.svdquant.quantize import quantize
from dcgen_convert.svdquant.settings import QuantSettings
from dcgen_convert.svdquant.skeleton import build

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


@dataclass(frozen=True)
class Noise(Item):
    """A tensor of noise, made while it is written: pieces of one pool of normal numbers, from places of its own."""

    name: str

    def chunks(self):
        pool, generator = noise(), torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        left = self.size // 2
        while left:
            start = int(torch.randint(len(pool) // 2, (1,), generator=generator))
            piece = pool[start : start + min(left, len(pool) // 2)]
            left -= len(piece)
            yield piece.view(torch.uint8).numpy().tobytes()


@cache
def noise() -> torch.Tensor:
    return (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)


def write_source(folder: Path) -> None:
    folder.mkdir(parents=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in build(CONFIG).state_dict().items()}
    write_folder(folder, {name: Noise("BF16", shape, name) for name, shape in shapes.items()})
    write_json(folder / "config.json", CONFIG)


def call(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.zeros(256), torch.arange(256) // 16, torch.arange(256) % 16], 1)
    return {
        "hidden_states": torch.randn(1, 256, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, 64, 4096, generator=generator),
        "pooled_projections": torch.randn(1, 768, generator=generator),
        "timestep": torch.rand(1, generator=generator),
        "guidance": torch.full((1,), 3.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(64, 3),
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


def inputs(name: str) -> str:
    """What a target reads, as far as its Hessian is concerned: q, k, v and proj_mlp of a block read the same."""
    shared = {
        "to_q": "in",
        "to_k": "in",
        "to_v": "in",
        "proj_mlp": "in",
        "add_q_proj": "text",
        "add_k_proj": "text",
        "add_v_proj": "text",
    }
    return shared.get(name.rpartition(".")[2], name)


def needs(model: torch.nn.Module, block: str, targets: list[str]) -> tuple[float, float]:
    """GB of a block's float32 weights, and of its targets' Hessians: one per tensor that they read."""
    sides = {inputs(name): model.get_submodule(name).in_features for name in targets if name.startswith(f"{block}.")}
    weights = sum(parameter.numel() for parameter in model.get_submodule(block).parameters())
    return 4e-9 * weights, 4e-9 * sum(side**2 for side in sides.values())


def main(root: Path, wanted: list[str]) -> None:
    source = root / "source"
    if not source.exists():
        write_source(source)
    model = build(CONFIG)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    inside = [name for name in linears if any(name.startswith(f"{block}.") for block in wanted)]
    svdq, awq = ([name for name in inside if (".norm" in name) is modulation] for modulation in (False, True))
    targets = QuantTargets(svdq, awq, blocks=("transformer_blocks", "single_transformer_blocks"))
    block, hessians = max(needs(model, path, targets.svdq) for path in wanted)
    baseline = psutil.Process().memory_info().rss / 1e9
    began, calls = time.monotonic(), [call(seed) for seed in range(2)]
    layer.REFITS = 1
    output = root / f"nvfp4-{int(time.time())}"
    peak = peak_of(lambda: quantize(source, output, targets, QuantSettings(), calls, NULL))
    size = sum(path.stat().st_size for path in source.iterdir()) / 1e9
    allowed = block + hessians + 1
    print(f"source {size:.2f} GB, {len(inside)} layers quantised in {time.monotonic() - began:.0f} s")
    print(f"peak {peak:.2f} GB, {peak - baseline:.2f} GB above the baseline of {baseline:.2f} GB;", end=" ")
    print(f"allowed {allowed:.2f} GB = block {block:.2f} + Hessians {hessians:.2f} + 1:", end=" ")
    print("met" if peak - baseline <= allowed else "MISSED")
    print(f"ru_maxrss {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or ["single_transformer_blocks.0"])
