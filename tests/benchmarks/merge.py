"""CPU time and memory of a merge, compared with PEFT's own `merge_and_unload` + `save_pretrained` in the same run.

    python tests/benchmarks/merge.py FOLDER

The transformer is a FLUX with random weights in bfloat16, in one shard of 1.5 GB, with a LoRA of rank 64 on every
target. Each side runs in a process of its own, three times in turns, and the best run counts. PEFT's time begins when
the model and the LoRA are loaded, so that reading is counted on our side only. The script writes its files into FOLDER
and deletes them again.

Bars: at most 1.1 x PEFT's CPU time; peak memory at most 1 GiB above the largest tensor. Memory does not depend on the
size of a shard, which is why one of 1.5 GB stands for those of 10 GB.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from dcgen_convert import families
from dcgen_convert.checkpoint.headers import read_weights
from dcgen_convert.checkpoint.updates import METADATA

CONFIG = {
    "in_channels": 64, "num_layers": 1, "num_single_layers": 3, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": [16, 56, 56],
    "patch_size": 1,
}  # fmt: skip
RANK, RUNS, MIB = 64, 3, 1 << 20

OURS = """
import json, re, sys, time
from pathlib import Path
import torch
from dcgen_convert.checkpoint.merge import merge
folder = Path(sys.argv[1])
def highest():  # bytes that were resident at the highest, of this process alone
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
torch.ones(64, 64) @ torch.ones(64, 64)
before, cpu = highest(), time.process_time()
merge(folder / "dense", folder / "ours", lora=folder / "lora.safetensors")
cpu = time.process_time() - cpu
print(json.dumps({"cpu": cpu, "peak": highest() - before}))
"""

PEFT = """
import json, sys, time
from pathlib import Path
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from dcgen_convert import families
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
model = FluxTransformer2DModel.from_pretrained(folder / "dense", dtype=torch.bfloat16)
peft = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=families.get("flux").lora_targets))
lora = load_file(folder / "lora.safetensors")
with torch.no_grad():
    for name, parameter in peft.named_parameters():
        if ".lora_" in name:
            parameter.copy_(lora["transformer." + name.removeprefix("base_model.model.").replace(".default.", ".")])
cpu = time.process_time()
peft.merge_and_unload().save_pretrained(folder / "peft", max_shard_size="10GB")
print(json.dumps({"cpu": time.process_time() - cpu}))
"""


def prepare(folder: Path) -> int:
    """Write dense/ and lora.safetensors; returns the bytes of the largest tensor."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    with torch.device("meta"):
        model = FluxTransformer2DModel(**CONFIG).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder / "dense", max_shard_size="10GB")
    targets, lora = families.get("flux").lora_targets, {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and re.fullmatch(targets, name):
            lora[f"transformer.{name}.lora_A.weight"] = torch.randn(RANK, module.in_features) * 0.02
            lora[f"transformer.{name}.lora_B.weight"] = torch.randn(module.out_features, RANK) * 0.02
    settings = {"transformer.r": RANK, "transformer.lora_alpha": RANK}
    save_file(lora, folder / "lora.safetensors", {METADATA: json.dumps(settings)})
    return max(entry.end - entry.start for entry in read_weights(folder / "dense").values())


def measure(code: str, *arguments: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(folder: Path) -> None:
    work = folder / "merge-benchmark"
    work.mkdir(parents=True)
    try:
        largest = prepare(work)
        ours, theirs = [], []
        for _ in range(RUNS):
            ours.append(measure(OURS, str(work)))
            theirs.append(measure(PEFT, str(work), str(RANK)))
        mine, other = (min(run["cpu"] for run in runs) for runs in (ours, theirs))
        peak = max(run["peak"] for run in ours)
        print(f"CPU time: {mine:.2f} s, PEFT {other:.2f} s: {mine / other:.2f} x (bar 1.1)")
        print(f"peak: {peak / MIB:.0f} MiB, {(peak - largest) / MIB:.0f} MiB above the largest tensor (bar 1024)")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
