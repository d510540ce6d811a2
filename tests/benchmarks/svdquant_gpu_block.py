"""One real-size FLUX double block and one single block (random weights, 3072 wide) on a GPU, scaled to all 57.

`python tests/benchmarks/svdquant_gpu_block.py FOLDER`. Calibration: 16 calls of 4096 + 512 tokens. Bar: the estimate
for 19 double + 38 single blocks is at most 20 GPU-minutes.
"""

import json
import sys
import time
from pathlib import Path

import torch
from svdquant_memory import CONFIG, write_source

from dcgen_convert.core.console import Console
from dcgen_convert.families import QuantTargets
from dcgen_convert.svdquant import quantize as module
from dcgen_convert.svdquant.settings import QuantSettings
from dcgen_convert.svdquant.skeleton import build


def call(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.zeros(4096), torch.arange(4096) // 64, torch.arange(4096) % 64], 1)
    return {
        "hidden_states": torch.randn(1, 4096, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, 512, 4096, generator=generator),
        "pooled_projections": torch.randn(1, 768, generator=generator),
        "timestep": torch.rand(1, generator=generator),
        "guidance": torch.full((1,), 3.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(512, 3),
    }


def main(root: Path) -> None:
    CONFIG.update(num_layers=1, num_single_layers=1)
    if not (root / "source").exists():
        write_source(root / "source")
    inside = [
        name
        for name, layer in build(CONFIG).named_modules()
        if isinstance(layer, torch.nn.Linear) and "transformer_blocks" in name
    ]
    svdq, awq = ([name for name in inside if (".norm" in name) is modulation] for modulation in (False, True))
    targets = QuantTargets(svdq, awq)
    marks = [time.monotonic()]
    finish = module._finish_block

    def timed(*args):
        records = finish(*args)
        torch.cuda.synchronize()
        marks.append(time.monotonic())
        return records

    module._finish_block = timed
    settings, output = QuantSettings(device="cuda"), root / f"nvfp4-{int(time.time())}"
    records = module.quantize(root / "source", output, targets, settings, [call(seed) for seed in range(16)], Console())
    double, single = marks[1] - marks[0], marks[2] - marks[1]
    minutes = (19 * double + 38 * single) / 60
    print(f"{torch.cuda.get_device_name()}: double block {double:.1f} s, single block {single:.1f} s", end=" ")
    print(f"(the first includes reading and loading); 57 blocks {minutes:.1f} min, bar 20")
    print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    print(json.dumps([[r["module"], r.get("error_rtn"), r.get("error"), r["seconds"]] for r in records]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
