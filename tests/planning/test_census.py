"""The plan's memory against a count of every tensor that lives during a real training step on the CPU, bar 10 %.

Counted are the bytes of all storages that operations made since the model was built, at their highest. What the plan
adds for the CUDA context and fragmentation is left out on both sides; AdamW is fused, as on a GPU.
"""

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dcgen_convert import families
from dcgen_convert.planning import memory
from dcgen_convert.planning.arithmetic import Trainable
from dcgen_convert.planning.fit import training
from dcgen_convert.planning.structures import structure
from dcgen_convert.recipe.loading import load
from dcgen_convert.train import lora
from dcgen_convert.train.engine import Engine
from dcgen_convert.train.objective import Sampling, draw, flow_loss, guidance_corrected_loss
from dcgen_convert.train.settings import EngineSettings

FLUX = families.get("flux")
TEXT, SIDE, CHANNELS = 32, 16, 8
CONFIG = dict(
    patch_size=1,
    in_channels=CHANNELS,
    num_layers=1,
    num_single_layers=2,
    attention_head_dim=32,
    num_attention_heads=8,
    joint_attention_dim=64,
    pooled_projection_dim=64,
    guidance_embeds=True,
    axes_dims_rope=(8, 12, 12),
)


class Census(TorchDispatchMode):
    """Bytes of the storages on ``device`` that operations inside it made: `now`, and the highest, `peak`."""

    def __init__(self, device="cpu"):
        super().__init__()
        self.device = device
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.device:
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage) -> None:
        key = storage._cdata
        if key not in self.sizes and storage.nbytes():
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key) -> None:
        self.now -= self.sizes.pop(key)


def measured(adapt, dtype: str, zero: int, full: bool, pictures: int) -> tuple[int, int, int]:
    """(bytes at the peak of the second step, trained parameters, frozen parameters)."""
    generator = torch.Generator().manual_seed(0)
    text = {
        "encoder_hidden_states": torch.randn(pictures, TEXT, 64, generator=generator),
        "pooled_projections": torch.randn(pictures, 64, generator=generator),
    }
    null = {key: torch.zeros_like(value[:1]) for key, value in text.items()}
    shape = (CHANNELS, SIDE, SIDE)
    draws = draw(0, 0, range(pictures), shape, Sampling("logit-normal", 1.0, (1.0, 5.0), 0.0))
    batch = torch.randn(pictures, *shape, generator=generator), text, draws, null
    loss = flow_loss if adapt.objective == "flow" else guidance_corrected_loss
    common = dict(lr=1e-3, warmup=0, schedule="constant", offload="none", clip=1.0, ema=adapt.ema)
    with Census() as census:
        model = FluxTransformer2DModel(**CONFIG)
        if not full:
            lora.add_lora(model, FLUX.lora_targets, 16, 16.0, 0)
        named = lora.trainable(model, ["x_embedder", "proj_out"], everything=full)
        trained = sum(parameter.numel() for _, parameter in named)
        frozen = sum(parameter.numel() for parameter in model.parameters()) - trained
        settings = EngineSettings(
            steps=10,
            batch=pictures,
            micro_batch=pictures,
            dtype=dtype,
            zero=zero,
            checkpointing=adapt.checkpointing,
            **common,
        )
        engine = Engine(model, named, settings)
        for group in engine.state.adam.param_groups:
            group.update(fused=True, foreach=False)
        for _ in range(2):
            census.peak = census.now  # of this step
            engine.step(lambda parts: loss(FLUX, model, *parts), [batch])
        peak = census.peak
        engine.close()
    return peak, trained, frozen


@pytest.mark.parametrize(
    ("zero", "dtype", "full", "pictures", "changes"),
    [
        (0, "fp32", True, 1, {}),
        (1, "bf16", True, 1, {}),
        (1, "fp32", True, 1, {}),
        (2, "fp32", True, 1, {}),
        (2, "fp32", True, 8, {}),
        (3, "fp32", True, 1, {}),
        (2, "bf16", False, 4, {}),
        (3, "bf16", True, 1, {"ema": 0}),
        (2, "fp32", False, 2, {}),
        (2, "bf16", False, 4, {"checkpointing": False}),
        (2, "bf16", False, 2, {"objective": "guidance-corrected"}),
    ],
)
def test_a_step_takes_what_the_plan_says(zero, dtype, full, pictures, changes):
    values = {"objective": "flow", "checkpointing": True, "ema": 0.9, **changes}
    recipe = load(
        "tiny-flux", sets=[f"dtype={dtype}", *(f"adapt.{key}={value}" for key, value in values.items())]
    ).recipe
    peak, trained, frozen = measured(recipe.adapt, dtype, zero, full, pictures)
    shape = structure({**CONFIG, "_class_name": "FluxTransformer2DModel"})
    sizes = SimpleNamespace(
        converted=shape, trainable=lambda _: Trainable(trained, frozen, 0), tokens=lambda _: SIDE * SIDE + TEXT
    )
    what = replace(training(recipe, recipe.adapt.phases[-1], sizes), overlap=False)
    plan = memory.estimate(what, 1, zero, "none", pictures)
    assert plan.weights + plan.grads + plan.optimizer + plan.activations + plan.step == pytest.approx(peak, rel=0.10)
