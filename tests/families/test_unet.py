"""What a U-Net has of its own: neighbourhoods instead of patches, several grids, a LoRA under its own name, and what
is refused.
"""

import json
import shutil

import diffusers
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dcgen_convert import families
from dcgen_convert.bundle.checks import check_structure
from dcgen_convert.bundle.inspection import inspect
from dcgen_convert.checkpoint import keymap
from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import InputError, RecipeError
from dcgen_convert.networks import models
from dcgen_convert.planning import plan
from dcgen_convert.planning.arithmetic import forward_flops
from dcgen_convert.planning.structures import structure
from dcgen_convert.recipe import loading
from dcgen_convert.train import lora
from dcgen_convert.train.ridge import NormalEquations

from .tiny_models import TINY

UNET = families.get("unet")
XL = families.get("unet-xl")
LEVELS = dict(
    down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    block_out_channels=[16, 32, 48],
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet") / "source"
    TINY["unet"].build(folder)
    return folder


@pytest.fixture
def own(source, tmp_path):
    """`own(part, **changes)`: a private copy of the source with other values in a part's config."""

    def change(part: str, **changes):
        folder = tmp_path / "source"
        if not folder.exists():
            shutil.copytree(source, folder)
        path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return folder

    return change


def test_a_convolution_of_any_weights_is_found_again_from_neighbourhoods():
    """The closed form on `head_inputs`, put into the head's shape, is the convolution that made the targets;
    float64, 1e-6.
    """
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(40, 5, 4, 3, generator=generator, dtype=torch.float64)
    wanted = torch.nn.Conv2d(5, 2, 3, padding=1, dtype=torch.float64)
    with torch.no_grad():
        goal = wanted(features)
    equations = NormalEquations(wanted.weight[0].numel(), 2)
    equations.add(UNET.head_inputs(features, 12, {}), goal.flatten(2).transpose(1, 2))
    weight, bias = equations.solve(0.0)
    found = F.conv2d(features, weight.reshape(wanted.weight.shape), bias, padding=1)
    torch.testing.assert_close(found, goal, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("levels", [{}, LEVELS], ids=["two levels", "three levels"])
def test_flops_of_a_plan_are_those_that_torch_counts(source, levels):
    """One forward of 8 x 8 cells and 16 text tokens; the counter knows attention as matrix products."""
    config = {**json.loads((source / "unet" / "config.json").read_text()), **levels}
    model = diffusers.UNet2DConditionModel.from_config(config).eval()
    text = torch.randn(1, 16, config["cross_attention_dim"])
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(1, 4, 8, 8), 5, text)
    assert forward_flops(structure(config), 64, 16) == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_the_stock_pipeline_loads_a_lora_that_stays_apart(source, tmp_path):
    """Linears and convolutions: the same prediction as the network that was trained, to 1e-5."""
    model = models.load(source / "unet", torch.float32)
    lora.add_lora(model, UNET.lora_targets, 2, 4.0, seed=0)
    generator = torch.Generator().manual_seed(3)
    weights = {
        name: 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in model.named_parameters()
        if ".lora_" in name
    }
    model.load_state_dict(weights, strict=False)
    lora.save_export(weights, tmp_path, lora.adapter_metadata(model, "unet"), "unet")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(source)
    z = torch.randn(1, 4, 4, 4, generator=generator)
    text = torch.randn(1, 16, pipeline.unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        before = pipeline.unet(z, 7, text).sample
        pipeline.load_lora_weights(tmp_path)
        found, wanted = pipeline.unet(z, 7, text).sample, model(z, 7, text).sample
    assert (wanted - before).abs().max() > 0.1
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_the_safety_checker_of_stable_diffusion_is_a_stock_component(tmp_path):
    """Its class belongs to a pipeline of diffusers; a library that nobody has is still found."""
    (tmp_path / "safety_checker").mkdir()
    (tmp_path / "safety_checker" / "config.json").write_text("{}")
    assert not check_structure(tmp_path, {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]})
    (found,) = check_structure(tmp_path, {"safety_checker": ["somebodys", "StableDiffusionSafetyChecker"]})
    assert found == "safety_checker needs the code somebodys.py, which is not in its folder"


def resolved(source, sets=(), **flags):
    return loading.load("tiny-flux", flags={"source": str(source), **flags}, sets=["adapt.objective=flow", *sets])


def test_a_plan_says_that_it_is_experimental_and_quantises_nothing(source):
    doc = plan.plan(resolved(source))
    assert doc["status"] == "feasible" and UNET.experimental in doc["notes"]
    assert doc["tokens"][0] == {"resolution": 128, "before": 256, "after": 16, "ratio": 16}
    assert f"note: {UNET.experimental}" in plan.render(doc)
    (problem,) = plan.plan(resolved(source, sets=["quantize.format=nvfp4"]))["problems"]
    assert problem == (
        "no linear of this unet model can be quantised to 4 bits: `nunchaku_lite` and `bfl` of diffusers were tried "
        "with transformers only: use --quantize none"
    )


def test_grids_that_the_levels_do_not_divide_are_refused(own):
    """128 px at f64 are 2 x 2 cells: enough for two levels, not for three."""
    assert resolved(own("unet"), ae="tiny-dc-ae-f64").recipe.ae == "tiny-dc-ae-f64"
    with pytest.raises(RecipeError, match=r"128 px, at f64 2 x 2 cells; unet models .* multiple of 4"):
        resolved(own("unet", **LEVELS), ae="tiny-dc-ae-f64")
    with pytest.raises(RecipeError, match=r"160 px, at f32 5 x 5 cells"):
        resolved(own("unet", **LEVELS), resolution=160)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"prediction_type": "v_prediction"}, "prediction_type v_prediction, only epsilon"),
        ({"beta_schedule": "linear"}, "beta_schedule linear"),
        ({"beta_end": 0.02}, "beta_end 0.02"),
    ],
)
def test_schedules_of_another_kind_are_refused(own, change, text):
    folder = own("scheduler", **change)
    for read in (lambda: resolved(folder), lambda: load_source("unet", str(folder))):
        with pytest.raises(InputError, match=text):
            read()


@pytest.mark.parametrize(
    "change, text",
    [
        ({"in_channels": 9}, "more channels in than out"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type text_time"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim 256"),
    ],
)
def test_networks_with_further_conditions_are_refused(source, change, text):
    config = json.loads((source / "unet" / "config.json").read_text())
    with pytest.raises(InputError, match=text):
        UNET.convert_config({**config, **change}, 32, 32, 128)


def test_a_file_of_the_original_code_is_the_folder(tmp_path):
    """Stable Diffusion 1.5's four levels in miniature, with all that such a file holds beside the U-Net."""
    TINY["unet"].build(tmp_path / "base")
    torch.manual_seed(3)
    config = json.loads((tmp_path / "base" / "unet" / "config.json").read_text())
    four = {"block_out_channels": [16, 16, 32, 32], "layers_per_block": 2}
    four["down_block_types"] = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    four["up_block_types"] = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    unet = diffusers.UNet2DConditionModel.from_config({**config, **four})
    unet.save_pretrained(tmp_path / "base" / "unet")
    tensors = unet.state_dict()
    stacks = keymap.find("unet", "original").backward({name: tuple(value.shape) for name, value in tensors.items()})
    assert all(len(stack.cuts) == 1 for stack in stacks.values()) and len(stacks) == len(tensors)
    file = {f"model.diffusion_model.{name}": tensors[stack.cuts[0].name] for name, stack in stacks.items()}
    beside = (
        "cond_stage_model.transformer.x",
        "first_stage_model.x",
        "model_ema.decay",
        "alphas_cumprod_prev",
        "betas",
    )
    beside += (
        "sqrt_recipm1_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "posterior_log_variance_clipped",
        "posterior_mean_coef2",
    )
    path = tmp_path / "v1-5-pruned.safetensors"
    save_file({**file, **{name: torch.ones(2) for name in beside}}, path)
    found = inspect(path)
    assert (found["family"], found["layout"]) == (
        "unet",
        "original",
    ) and "6 tensors of noise schedule are left aside" in found["notes"]
    imported = load_source("x", str(path), base=str(tmp_path / "base"), home=tmp_path / "import")
    imported.lay_out(NULL)
    mine = models.load(imported.transformer, torch.float32).state_dict()
    assert mine.keys() == tensors.keys() and all(torch.equal(mine[name], value) for name, value in tensors.items())

    save_file({**file, "model.diffusion_model.label_emb.0.0.weight": torch.ones(2)}, path)  # SDXL
    with pytest.raises(InputError, match="1 tensors have no place in the original layout: label_emb.0.0.weight"):
        load_source("x", str(path), base=str(tmp_path / "base"), home=tmp_path / "import")
    wider = {
        name: value.repeat(1, 2) if ".attn2.to_k." in name else value for name, value in file.items()
    }  # Stable Diffusion 2
    save_file(wider, path)
    with pytest.raises(InputError, match="attn2.to_k.weight is .* its config asks for"):
        load_source("x", str(path), base=str(tmp_path / "base"), home=tmp_path / "import")


@pytest.mark.parametrize("kohya", [False, True])
def test_a_lora_is_fused_as_diffusers_fuses_it(source, tmp_path, kohya):
    """On attention, feed-forward and a 3 x 3 convolution, in diffusers' names and in those of kohya's scripts."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(source)
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    tensors, generator = {}, torch.Generator().manual_seed(4)
    attention = "down_blocks.0.attentions.0.transformer_blocks.0"
    modules = [
        f"{attention}.attn1.to_q",
        f"{attention}.attn2.to_out.0",
        f"{attention}.ff.net.0.proj",
        "mid_block.resnets.0.conv1",
    ]
    for module in modules:
        rows, *inputs = before[f"{module}.weight"].shape
        down = torch.randn(4, *inputs, generator=generator)
        up = 0.1 * torch.randn(rows, 4, *[1] * (len(inputs) - 1), generator=generator)
        if kohya:
            start = "lora_unet_" + module.replace(".", "_")
            tensors |= {
                f"{start}.lora_down.weight": down,
                f"{start}.lora_up.weight": up,
                f"{start}.alpha": torch.tensor(4.0),
            }
        else:
            tensors |= {f"unet.{module}.lora_A.weight": down, f"unet.{module}.lora_B.weight": up}
    save_file(tensors, tmp_path / "lora.safetensors")
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    pipeline.fuse_lora(lora_scale=0.5)
    pipeline.unload_lora_weights()
    wanted = pipeline.unet.state_dict()
    imported = load_source("x", str(source), loras=[f"{tmp_path / 'lora.safetensors'}:0.5"], home=tmp_path / "import")
    imported.lay_out(NULL)
    found = models.load(imported.transformer, torch.float32).state_dict()
    changed = {name for name, value in found.items() if not torch.equal(value, before[name])}
    assert changed == {f"{module}.weight" for module in modules} and found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_network_that_is_told_the_size_hears_of_pixels_before_and_after_the_conversion(tmp_path):
    """What the stock pipeline tells it of 64 x 128 px: cells of 8 px, and of 32."""
    TINY["unet-xl"].build(tmp_path)
    source, pipeline = load_source("xl", str(tmp_path)), diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path)
    assert source.family is XL
    size, dim = (64, 128), pipeline.text_encoder_2.config.projection_dim
    wanted = pipeline._get_add_time_ids(size, (0, 0), size, torch.float32, dim)
    text = XL.encode_text(pipeline, ["a fox", ""], 16)
    assert text["text_embeds"][0].any() and not any(value[1].any() for value in text.values())
    for factor, config in ((8, source.config), (32, XL.convert_config(source.config, 32, 32, 128))):
        model, told = diffusers.UNet2DConditionModel.from_config(config), []
        model.register_forward_pre_hook(
            lambda module, args, given, told=told: told.append(given["added_cond_kwargs"]["time_ids"]), with_kwargs=True
        )
        z = torch.zeros(2, config["in_channels"], *(side // factor for side in size))
        assert XL.predict(model, z, torch.full((2,), 0.5), text).shape == z.shape
        torch.testing.assert_close(told[0], wanted.expand(2, -1), atol=0, rtol=0)
