"""What every family must prove, over tiny pipelines with random weights: a new family is one file of facts and one
entry of `tiny_models.TINY`.

B batch, C latent channels, h w latent grid, N tokens, D width, f c factor and channels of the new autoencoder.
"""

import copy
import math
import re
from types import SimpleNamespace

import diffusers
import pytest
import torch
from bundle.conftest import Parts, autoencoder_dc, make_bundle, modules_cache  # noqa: F401 (a fixture)

from dcgen_convert import families
from dcgen_convert.bundle.inspection import inspect
from dcgen_convert.bundle.loading import load, plain_network
from dcgen_convert.bundle.sample import untold_side
from dcgen_convert.checkpoint.merge import merge
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_json
from dcgen_convert.data.images import to_image
from dcgen_convert.families import grid
from dcgen_convert.families.base import reference_keys, references_of
from dcgen_convert.networks import autoencoders, models
from dcgen_convert.planning.arithmetic import matching
from dcgen_convert.planning.quantised import quantised_linears
from dcgen_convert.planning.structures import structure
from dcgen_convert.recipe.schema import Quantize
from dcgen_convert.stages.align_embedder import Problem, affine, as_module, embedding
from dcgen_convert.svdquant import layer, smooth
from dcgen_convert.svdquant.quantize import quantize
from dcgen_convert.svdquant.record import CalibrationSet, read_calls, record_calls
from dcgen_convert.svdquant.runtime import load_dequantised, open_layers
from dcgen_convert.svdquant.settings import QuantSettings
from dcgen_convert.svdquant.targets import plan_targets
from dcgen_convert.train import lora
from dcgen_convert.train.objective import Sampling, draw, drop_text, flow_loss

from .conftest import DEEP, GUIDANCE, SEED, STEPS
from .tiny_parts import Pairs, alive, encoded, keep_states, network_of, reference_latents, reference_pixels, trigflow

LEARNED_SIGMA = ("dit", "pixart")


def latent_of(entry, family, sample):
    """The sampler's state as a latent (1, C, h, w)."""
    sample = sample / (entry.data_sigma or 1.0)
    cells = entry.side // entry.factor
    if sample.ndim == 3:
        return family.untokens(sample, (cells, cells), 2, family.in_order)
    return sample[:1].flatten(1, -4) if sample.ndim > 2 + family.axes else sample[:1]


def grid_of(family, *sides):
    """Sides of a latent: of a video there are two frames more."""
    return sides if family.axes == 2 else (2, *sides)


def text_of(entry, family, pipeline, prompt, channels=None):
    """The condition of a prompt. Of a model that edits its references belong to it: of the entry's pictures as the base
    sees them, or, with the ``channels`` of a deep autoencoder, random latents."""
    text = encoded(entry, family, pipeline, [prompt])
    if channels:
        return text | deep_references(entry, family, channels)
    see = video_latent if family.reference_channels else base_latent
    latents = [see(entry, pipeline, pixels[None]) for pixels in reference_pixels(entry.references)]
    return text | dict(zip(reference_keys(len(latents)), latents, strict=True))


def deep_references(entry, family, channels, rows=1, sides=(2, 2)):
    """Random references in the latents of a deep autoencoder, beside a latent of ``sides`` where both are read as
    one.
    """
    grid = grid_of(family, *sides) if family.reference_channels else None
    return reference_latents(entry.references, channels, rows, grid)


@torch.no_grad()
def video_latent(entry, pipeline, pixels):
    """The condition that the stock pipeline puts behind its mask, (1, C, T, h, w)."""
    side, channels = entry.side, pipeline.vae.config.z_dim
    image = pipeline.video_processor.preprocess(to_image(pixels[0]), height=side, width=side)
    size = dict(height=side, width=side, num_frames=entry.frames)
    _, condition = pipeline.prepare_latents(image, 1, channels, **size, dtype=torch.float32, device="cpu")
    return condition[:, -channels:]


@torch.no_grad()
def base_latent(entry, pipeline, pixels):
    """What the stock pipeline makes of a reference, (1, C, h, w). Qwen-Image's has a frame axis, and FLUX.2's is
    normalised by the statistics of each place of a patch.
    """
    vae = pipeline.vae
    if "z_dim" in vae.config:
        return pipeline._encode_vae_image(pixels.unsqueeze(2), None).squeeze(2)
    latent = vae.encode(pixels).latent_dist.mode()
    if hasattr(vae, "bn"):
        patches = torch.nn.functional.pixel_unshuffle(latent, 2)
        mean, std = vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        return torch.nn.functional.pixel_shuffle((patches - mean[:, None, None]) / std[:, None, None], 2)
    return (latent - vae.config.shift_factor) * vae.config.scaling_factor


def test_velocity_is_what_the_stock_scheduler_receives(tiny, source, stock):
    """Sign, time scale, guidance, text, patch order, to 1e-5; of a model with two networks the one of each time."""
    (_, entry), family, (pipeline, steps, *_) = tiny, source.family, stock
    text, null = (text_of(entry, family, pipeline, prompt) for prompt in (entry.prompt, ""))
    assert any(not torch.equal(text[key], null[key]) for key in family.text_keys)
    g, drawn = torch.full((1,), GUIDANCE), []
    for i, (output, timestep, sample) in enumerate(steps):
        x, goal = latent_of(entry, family, sample), output[:1]
        assert goal.std() > 1e-2  # agreement is not agreement on zero
        if family.prediction == "epsilon":
            t = family.noise_times()[int(timestep)][None]
            z = (x.double() * (t.square() + (1 - t).square()).sqrt()).float()
            step = family.predict  # the scheduler takes epsilon
        elif entry.data_sigma:
            t = timestep.sin() / (timestep.sin() + timestep.cos())
            z, step, goal = x * (t.square() + (1 - t).square()).sqrt(), trigflow(family), goal / entry.data_sigma
        else:
            t, z, step = pipeline.scheduler.sigmas[i][None], x, family.velocity
            if not pipeline.scheduler.timesteps.is_floating_point():  # UniPC gives the network whole thousandths
                t = timestep[None] / 1000

        place = next(place for place, expert in enumerate(source.experts) if expert.low <= t)
        network, guidance = getattr(pipeline, source.experts[place].component), GUIDANCE
        if place:  # the second network has less guidance, as the family tells the pipeline
            size = dict(height=entry.side, width=entry.side, steps=STEPS, guidance=GUIDANCE, length=entry.length)
            guidance = family.pipeline_call(pipeline, [entry.prompt], **size)["guidance_scale_2"]
        drawn.append(network)
        with torch.no_grad():
            mine, free = (step(network, z, t, condition, g) for condition in (text, null))
        if sample.ndim == 3:
            mine, free = family.tokens(mine, 2), family.tokens(free, 2)
        assert (mine - free).abs().max() > 1e-4  # the prompt matters
        mine = mine if not entry.guided else entry.guide(mine, free, guidance)
        torch.testing.assert_close(mine, goal.reshape(mine.shape), atol=1e-5, rtol=1e-5)
    assert len({*map(id, drawn)}) == len(source.experts)  # every network of the model has drawn


def test_latent_and_tokens_are_in_the_stock_order_element_by_element(tiny, source, stock):
    """The first state is the noise, the embedder's input our tokens of it."""
    (_, entry), family, (pipeline, steps, embedded, _) = tiny, source.family, stock
    x = latent_of(entry, family, steps[0][2])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(SEED))
    if entry.packed_noise:  # drawn as (1, C p p, h / p, w / p)
        noise = noise.reshape(1, -1, x.shape[2] // 2, x.shape[3] // 2)
        noise = family.untokens(noise.flatten(2).transpose(1, 2), x.shape[2:], 2, family.in_order)
    torch.testing.assert_close(x, noise, atol=1e-6, rtol=1e-6)
    embedder = network_of(pipeline).get_submodule(family.embedder)
    patch = family.patch(network_of(pipeline).config, x.shape[1])
    text = text_of(entry, family, pipeline, entry.prompt)
    with torch.no_grad():
        mine = affine(embedder, family.tokens(family.inputs(x, text), patch))  # (1, N, D)
    theirs = embedded[0].flatten(2).transpose(1, 2) if embedded[0].ndim > 3 else embedded[0]
    if entry.references and not family.reference_channels:  # they follow the picture, one after the other
        with torch.no_grad():
            behind = torch.cat([affine(embedder, family.tokens(one, patch)) for one in references_of(text)], dim=1)
        torch.testing.assert_close(theirs[:, mine.shape[1] :], behind, atol=1e-5, rtol=1e-5)
        theirs = theirs[:, : mine.shape[1]]
    for row in theirs.reshape(-1, *mine.shape[1:]):
        torch.testing.assert_close(row[None], mine, atol=1e-5, rtol=1e-5)


def test_training_shift_is_the_one_that_the_stock_pipeline_samples_with(tiny, source, stock, monkeypatch):
    """sigma' = r sigma / (1 + (r - 1) sigma) at the second step, r by the scheduler's config and the family's rule;
    with a
    DDPM schedule the noise level t / (1 - t) of every step."""
    (_, entry), family, (pipeline, steps, *_) = tiny, source.family, stock
    if family.prediction == "epsilon":
        t, alphas = family.noise_times(), pipeline.scheduler.alphas_cumprod.double()
        torch.testing.assert_close(t / (1 - t), ((1 - alphas) / alphas).sqrt(), atol=0, rtol=1e-3)  # float32 alphas
        return
    if entry.data_sigma:  # no shift, and two angles that are no schedule to train at
        assert "shift" not in pipeline.scheduler.config and not hasattr(pipeline.scheduler, "sigmas")
        return
    monkeypatch.setattr(type(family), "default_steps", STEPS)  # FLUX.2's rule counts them
    z = latent_of(entry, family, steps[0][2])
    tokens = math.prod(family.grid(z.shape[2:], family.patch(pipeline.transformer.config, z.shape[1])))
    r = family.shift(tokens, pipeline.scheduler.config)
    assert pipeline.scheduler.sigmas[1].item() == pytest.approx(
        r * entry.middle / (1 + (r - 1) * entry.middle), rel=1e-4
    )


def test_model_latents_are_those_of_the_stock_pipeline(tiny, source, stock):
    """Scale, shift and statistics: our decoder makes the stock picture of the sampler's last state."""
    (_, entry), (*_, (last, picture)) = tiny, stock
    codec = autoencoders.load(source.vae)
    assert (codec.factor, codec.channels) == grid.autoencoder_grid(autoencoders.describe(source.vae))
    z = latent_of(entry, source.family, last)
    torch.testing.assert_close(picture, codec.decode(z), atol=1e-4, rtol=1e-4)
    # encode undoes decode's arithmetic: the same round trip as the autoencoder's own
    pixels = torch.rand(1, 3, entry.frames, 64, 64) * 2 - 1
    pixels = pixels if codec.frames or codec.axes == 3 else pixels.squeeze(2)
    with torch.no_grad():
        encoded = codec.model.encode(pixels)
        latent = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
        again = codec.model.decode(latent).sample
    pixels, again = (value.squeeze(2) if codec.frames else value for value in (pixels, again))
    torch.testing.assert_close(codec.decode(codec.encode(pixels)), again.clamp(-1, 1), atol=1e-4, rtol=1e-4)


def test_the_family_is_found_from_headers_alone(tiny, source):
    file = next(source.transformer.glob("*.safetensors"))
    one, folder = inspect(file), inspect(source.root)
    assert (one["kind"], one["layout"]) == ("checkpoint", "diffusers")
    assert families.of_pipeline(families.get(one["family"]), source.index) is source.family
    assert (folder["kind"], folder["family"]) == ("pipeline", source.family.name)
    assert folder["autoencoder"]["f"] == tiny[1].factor


def test_parts_that_stay_idle_are_not_loaded(source, stock):
    family, (pipeline, *_) = source.family, stock
    assert {part: pipeline.components[part] for part in family.idle} == dict.fromkeys(family.idle)
    assert all((source.root / part).is_dir() for part in family.idle)


def test_plan_counts_every_parameter(source):
    model = models.load(source.transformer, torch.float32)
    found = structure(source.config, source.family)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    adapted = {layer.name: layer.runs for layer in matching(found, source.family.lora_targets)}
    assert adapted and "once" not in adapted.values()
    modulation = matching(found, source.family.awq_pattern)
    assert all(layer.runs == "once" for layer in modulation)


def test_every_block_linear_is_lora_target_modulation_or_dense(tiny, source):
    family, model = source.family, models.load(source.transformer, torch.float32)
    linears = {path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    blocks = {path for path in linears if family.inside_blocks.match(path)}
    lora, awq, dense = (
        {path for path in linears if re.fullmatch(pattern, path)}
        for pattern in (family.lora_targets, family.awq_pattern, family.dense_pattern)
    )
    left = {path for path in blocks if re.fullmatch(tiny[1].unadapted, path)}
    assert lora and lora | awq | dense | left == blocks and not lora & (awq | left)


def test_surgery_remakes_embedder_and_head_and_nothing_else(tiny, source, converted):
    parts, model = converted
    family, base = source.family, models.load(source.transformer, torch.float32).state_dict()
    fresh = tuple(f"{name}." for name in (family.embedder, family.head))
    state = model.state_dict()
    replaced = read_json(parts.transformer.parent / "surgery.json")["replaced"]  # also where the shape stays as it was
    assert set(replaced) == {name for name in base if name.startswith(fresh)}
    assert set(state) == set(base)
    assert all(torch.equal(value, base[name]) for name, value in state.items() if not name.startswith(fresh))
    embedder, head = (model.get_submodule(name).weight for name in (family.embedder, family.head))
    z = torch.zeros(1, parts.channels, *grid_of(family, 2, 2))
    read = family.inputs(z, deep_references(tiny[1], family, parts.channels))
    assert embedder.flatten(1).shape[1] == family.tokens(read, 1).shape[2]
    assert head.shape[0] == (2 if family.name in LEARNED_SIGMA else 1) * parts.channels
    assert family.patch(model.config, parts.channels) == 1


def test_head_rows_are_latent_channels_and_its_inputs_image_tokens(tiny, source, stock, converted):
    """What the closed-form alignment leans on: one token per latent cell, channel by channel, for texts of any
    length.
    """
    (_, entry), family, (pipeline, *_), (parts, model) = tiny, source.family, stock, converted
    sides = grid_of(family, 2, 4 if "class_labels" not in family.text_keys else 2)
    z = torch.randn(2, parts.channels, *sides, generator=torch.Generator().manual_seed(SEED))
    n = math.prod(sides)
    text = encoded(entry, family, pipeline, [entry.prompt, "a big blue cat" if entry.prompt != "fox" else "0"])
    text = drop_text(text, encoded(entry, family, pipeline, [""]), torch.tensor([True, False]))
    text |= deep_references(entry, family, parts.channels, rows=2, sides=sides[-2:])
    seen = {"embedded": [], "features": [], "written": []}  # a family may split the batch
    embedder, head = (model.get_submodule(name) for name in (family.embedder, family.head))
    hooks = [
        embedder.register_forward_hook(lambda module, args, output: seen["embedded"].append(output)),
        head.register_forward_hook(lambda module, args, output: seen["features"].append(args[0])),
        head.register_forward_hook(lambda module, args, output: seen["written"].append(output)),
    ]
    with torch.no_grad():
        prediction = family.predict(model, z, torch.tensor([0.3, 0.8]), text, torch.ones(2))
    [hook.remove() for hook in hooks]
    seen = {key: torch.cat(parts) for key, parts in seen.items()}
    assert prediction.shape == z.shape
    embedded = seen["embedded"].flatten(2).transpose(1, 2) if seen["embedded"].ndim > 3 else seen["embedded"]
    scale = 1.0
    if family.prediction == "epsilon":
        t = torch.tensor([0.3, 0.8])
        scale = (t.square() + (1 - t).square()).rsqrt()[:, None, None, None]
    mine = affine(embedder, family.tokens(family.inputs(z * scale, text), 1))
    rows = embedded.reshape(-1, embedded.shape[-1])
    step = len(rows) // 2  # a family may pad the tokens of every picture
    for row in range(2):
        torch.testing.assert_close(rows[row * step : row * step + n], mine[row], atol=1e-5, rtol=1e-5)
    whole = seen["written"]
    written = whole[:, :n] if family.references else family.image_tokens(whole, n, text)
    written = written[..., : parts.channels]
    torch.testing.assert_close(written, prediction.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)
    features = family.head_inputs(seen["features"], n, text)
    torch.testing.assert_close(affine(head, features)[..., : parts.channels], written, atol=1e-5, rtol=1e-5)


def test_bundle_loads_in_the_stock_pipeline_and_draws_two_sizes(tiny, converted, bundle):
    """Finite pictures, and the ones that the deep autoencoder alone makes of the sampler's last state."""
    (_, entry), (parts, _), family = tiny, converted, converted[0].family
    pipeline, _ = load(bundle, torch.float32)
    assert type(pipeline).__name__ == family.pipeline_of({"_class_name": type(pipeline).__name__})
    codec, states = autoencoders.load(parts.autoencoder), []
    keep_states(pipeline, states)
    side, cell = parts.side, parts.factor // pipeline.vae.config.get("latent_pack", 1)
    assert family.only_side(network_of(pipeline).config, cell) in (None, side)
    if family.index_side:
        assert untold_side(pipeline, family, 0) == side
    sizes = [(side, side)]
    if "class_labels" not in family.text_keys:  # with classes the stock pipeline draws one size only
        sizes.append((side // 2 if entry.deep_side else side, 2 * side))
    for height, width in sizes:
        settings = dict(height=height, width=width, steps=STEPS, guidance=GUIDANCE, length=entry.length)
        call = family.pipeline_call(pipeline, [entry.prompt], **settings)
        shapes = [(2 * parts.factor, (3 + number) * parts.factor) for number in range(len(entry.references))]
        call |= family.reference_call([pixels[None] for pixels in reference_pixels(shapes)])
        with torch.no_grad():
            pixels = pipeline(**call, generator=torch.Generator().manual_seed(SEED), output_type="pt").images
        assert pixels.shape == (1, 3, height, width) and torch.isfinite(pixels).all() and pixels.std() > 1e-3
        last = states[-1][:1] / (entry.data_sigma or 1.0)
        if last.ndim == 3:
            deep = family.untokens(last, (height // parts.factor, width // parts.factor), 1)
        else:
            deep = last if last.shape[1] == parts.channels else family.collect(last, parts.channels)
        torch.testing.assert_close(pixels * 2 - 1, codec.decode(deep), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("converted", DEEP[:1], indirect=True)
def test_quantisation_reaches_exactly_the_planned_linears(
    tiny, source, stock, converted, bundle, tmp_path, monkeypatch
):
    """Calibrated on what the pipeline gives the transformer; every block linear is 4-bit or dense on purpose, and the
    dequantised model's output is the dense one's to 30 %: both 4-bit formats err by about 10 % per layer of random
    weights.
    """
    (_, entry), family, (encoders, *_), parts = tiny, source.family, stock, converted[0]
    config = family.convert_config(source.config | (entry.wide or {}), parts.factor, parts.channels, parts.side)
    if entry.wide is None:
        with pytest.raises(InputError, match="no linear of this .* can be quantised"):
            plan_targets(family, config, None)
        return
    torch.manual_seed(2)
    dense = alive(getattr(diffusers, family.model_class).from_config(config)).bfloat16()
    dense.save_pretrained(tmp_path / "dense")
    linears = {path for path, module in dense.named_modules() if isinstance(module, torch.nn.Linear)}
    adapted, awq, kept = (
        {path for path in linears if re.fullmatch(pattern, path)}
        for pattern in (family.lora_targets, family.awq_pattern, family.dense_pattern)
    )
    adapted |= {path for path in linears if re.fullmatch(entry.unadapted, path)}  # nothing but LoRA leaves them out
    sizes = SimpleNamespace(family=family, converted=structure(read_json(tmp_path / "dense" / "config.json")))
    plan, problems = quantised_linears(Quantize(format="nvfp4"), sizes)
    assert (plan["w4a4"], plan["w4a16"], plan["impossible"], problems) == (len(adapted - kept), len(awq), {}, [])

    pipeline, _ = load(bundle, torch.float32)
    pipeline.transformer = dense.float().requires_grad_(False)
    settings = dict(side=parts.side, steps=STEPS, guidance=GUIDANCE, length=entry.length)
    with NULL.progress("", 1, "") as bar:
        given = [tmp_path / f"reference-{number}.png" for number in range(len(entry.references))]
        for file, pixels in zip(given, reference_pixels([(parts.side, parts.side)] * len(given)), strict=True):
            to_image(pixels).save(file)
        pictures = CalibrationSet([entry.prompt], SEED, 1, **settings, references=[given] if given else ())
        record_calls(tmp_path / "calls", family, lambda: pipeline, pictures, bar, [(0, 1)])
    targets = plan_targets(family, config, None)
    monkeypatch.setattr(layer, "REFITS", 0)  # in about a second: smoothing and refits have tests of their own
    monkeypatch.setattr(smooth, "COARSE", ())
    monkeypatch.setattr(smooth, "MIXED", ())
    calls, settings = read_calls(tmp_path / "calls"), QuantSettings(rank=16)
    records = quantize(tmp_path / "dense", tmp_path / "4-bit", targets, settings, calls, NULL)
    assert {record["module"] for record in records if "error" in record} == adapted - kept
    written = read_json(tmp_path / "4-bit" / "config.json")["quantization_config"]
    found = [set(written.get(section, {"targets": ()})["targets"]) for section in ("svdq_w4a4", "awq_w4a16")]
    assert found == [adapted - kept, awq] and set(open_layers(tmp_path / "4-bit")[2]) == adapted - kept | awq

    text = text_of(entry, family, encoders, entry.prompt, parts.channels)
    z = torch.randn(1, parts.channels, 2, 2, generator=torch.Generator().manual_seed(SEED))
    once = torch.ones(1)
    with torch.no_grad():
        wanted, got = (
            family.predict(m, z, 0.6 * once, text, once)
            for m in (dense, load_dequantised(tmp_path / "4-bit", torch.float32))
        )
    assert torch.isfinite(got).all() and 1e-4 < (got - wanted).norm() / wanted.norm() < 0.3
    if family.single_file:  # without a branch, opened by diffusers itself
        targets, folder = plan_targets(family, config, None, "bfl"), tmp_path / "plain"
        quantize(tmp_path / "dense", folder, targets, QuantSettings(rank=0), calls, NULL)
        networks = plain_network(folder, family, torch.float32), load_dequantised(folder, torch.float32)
        with torch.no_grad():
            theirs, ours = (family.predict(m, z, 0.6 * once, text, once) for m in networks)
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)
        assert set(targets.svdq) == adapted - kept and 1e-4 < (ours - wanted).norm() / wanted.norm() < 0.3


@pytest.mark.parametrize("converted", DEEP[:1], indirect=True)
def test_alignment_reaches_the_least_squares_optimum_of_the_embedder(tiny, source, converted):
    """Error of the module itself in float64, against a dense solver on the same rows; rel. 1e-3, as ridge 1e-6
    allows.
    """
    (_, entry), (parts, student), family = tiny, converted, source.family
    teacher, channels = models.load(source.transformer, torch.float32), autoencoders.load(source.vae).channels
    cells, fine = parts.side // parts.factor, parts.side // entry.factor
    if "class_labels" in family.text_keys:
        fine = teacher.config.sample_size  # its position table fits one size
    base, deep = ((c, *grid_of(family, side, side)) for c, side in ((channels, fine), (parts.channels, cells)))
    cache = Pairs(base, deep, 2000 // cells**2 + 8, len(entry.references))
    problem = Problem(SimpleNamespace(family=family), teacher, student, cache, "average")
    small = [embedding(folder, family.embedder) for folder in (source.transformer, parts.transformer)]
    read = Problem(SimpleNamespace(family=family), *small, cache, "average")
    for found, wanted in zip(read.rows([0, 1]), problem.rows([0, 1]), strict=True):
        assert torch.equal(found, wanted)  # of the embedder alone, bit by bit
    assert all(model.get_submodule(family.head).weight.is_meta for model in small)
    module = copy.deepcopy(student.get_submodule(family.embedder))
    solved = as_module(module, "module", *problem.equations(8).solve(1e-6, bias=problem.biased))
    module.load_state_dict({key.removeprefix("module."): value for key, value in solved.items()})
    with torch.no_grad():
        x, y = (rows.double().flatten(0, 1) for rows in problem.rows(list(range(len(cache)))))
        left = (affine(module.double(), x) - y).square().mean()
    design = torch.cat([x, torch.ones(len(x), 1)], 1) if module.bias is not None else x
    optimum = (design @ torch.linalg.lstsq(design, y, driver="gelsd").solution - y).square().mean()
    assert optimum * (1 - 1e-9) <= left <= optimum * 1.001 < y.square().mean()


@pytest.mark.parametrize("converted", DEEP[:1], indirect=True)
def test_one_lora_step_changes_exactly_the_planned_tensors_and_merge_reaches_all(
    tiny, source, stock, converted, tmp_path
):
    """A planned tensor stays as it was only where the output does not depend on it; merged weights draw as the
    adapter, to 1e-4.
    """
    (_, entry), family, (pipeline, *_), (parts, _) = tiny, source.family, stock, converted
    model = models.load(parts.transformer, torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    planned = lora.add_lora(model, family.lora_targets, 2, 2.0, SEED)
    assert planned == [path for path, module in model.named_modules() if hasattr(module, "lora_A")]
    trained = dict(lora.trainable(model, [family.embedder, family.head]))
    [value.requires_grad_(True) for value in trained.values()]
    text, null = (text_of(entry, family, pipeline, prompt, parts.channels) for prompt in (entry.prompt, ""))
    z0 = torch.randn(2, parts.channels, *grid_of(family, 2, 2), generator=torch.Generator().manual_seed(SEED))
    text = {key: value.expand(2, *value.shape[1:]) for key, value in text.items()}
    sampling = Sampling("logit-normal", 1.0, (1.0, 1.0), 0.0)
    if family.prediction == "epsilon":
        sampling = Sampling("ddpm", 1.0, (1.0, 1.0), 0.0, family.noise_times())
    draws = draw(SEED, 0, [0, 1], z0.shape[1:], sampling)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    flow_loss(family, model, z0, text, draws, null).backward()
    optimizer.step()

    metadata = lora.adapter_metadata(model, family.component)
    exports = lora.save_export(
        {name: value.detach() for name, value in trained.items()}, tmp_path, metadata, family.component
    )
    done = merge(parts.transformer, tmp_path / "merged", lora=exports["lora"], modules=exports["modules"])
    assert done["merged"] == len(planned) and done["untouched"] == len(before) - len(planned) - done["replaced"]
    merged = models.load(tmp_path / "merged", torch.float32)
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
    remade = {name for name in before if name.rpartition(".")[0] in (family.embedder, family.head)}
    weights = {f"{path}.weight" for path in planned}
    assert remade <= changed <= remade | weights
    with torch.no_grad():
        trained, again = (family.predict(m, z0, draws.t, text, draws.guidance) for m in (model, merged))
        torch.testing.assert_close(again, trained, atol=1e-4, rtol=1e-4)
        for name in weights - changed:
            merged.get_parameter(name).add_(1.0)
        assert torch.equal(family.predict(merged, z0, draws.t, text, draws.guidance), again)


def test_compiling_marks_every_block_and_changes_no_name(source):
    """What compiled blocks compute is measured in tests/benchmarks/compiled.py: compiling takes a minute."""
    model = models.load(source.transformer, torch.float32)
    before = list(model.state_dict())
    models.compile_blocks(source.family, model)
    compiled = [module for module in model.modules() if module._compiled_call_impl is not None]
    assert set(compiled) == set(source.family.block_modules(model)) and list(model.state_dict()) == before
