"""Before surgery, a family predicts what the stock pipeline's scheduler receives: sign, time, guidance, text, patch
order.
"""

import diffusers
import pytest
import torch

from dcgen_convert import families
from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.networks import pipelines

PROMPTS = {
    "flux": "a small plain red circle in the center on sand",
    "sana": "a large dotted blue ring at the top left at night",
    "dit": "red circle",
}
LENGTH, SIDE, GUIDANCE = 16, 128, 2.5


@pytest.fixture(params=["flux", "sana", "dit"])
def stock(request, weights):
    """(family, pipeline, [(model output given to scheduler.step, timestep, sample)]) of a two-step drawing."""
    source = load_source(f"tiny-{request.param}", str(weights / f"tiny-{request.param}"))
    pipeline = pipelines.load_pipeline(source, torch.float32)
    calls = []
    original = pipeline.scheduler.step

    def record(model_output, timestep, sample, *args, **kwargs):
        calls.append((model_output.clone(), torch.as_tensor(timestep).float(), sample.clone()))
        return original(model_output, timestep, sample, *args, **kwargs)

    pipeline.scheduler.step = record
    pipelines.draw(
        source.family, pipeline, [PROMPTS[request.param]], [3], side=SIDE, steps=2, guidance=GUIDANCE, length=LENGTH
    )
    return source.family, pipeline, calls


def ours(family, pipeline, z, t):
    """The family's prediction at (z, t) under the pipeline's guidance."""
    text = pipelines.encode_text(family, pipeline, [PROMPTS[family.name]], LENGTH)
    with torch.no_grad():
        prediction = family.predict(pipeline.transformer, z, t, text, torch.full((1,), GUIDANCE))
        if family.guidance == "embedded":
            return prediction
        null = pipelines.encode_text(family, pipeline, [""], LENGTH)
        free = family.predict(pipeline.transformer, z, t, null, torch.full((1,), GUIDANCE))
        return free + GUIDANCE * (prediction - free)


def test_prediction_is_what_the_stock_scheduler_receives(stock):
    family, pipeline, calls = stock
    assert len(calls) == 2
    for output, timestep, sample in calls:
        assert output.std() > 0.1  # a trained model: agreement is not agreement on zero
        if family.name == "flux":
            grid = SIDE // 8
            z = diffusers.FluxPipeline._unpack_latents(sample, SIDE, SIDE, pipeline.vae_scale_factor)
            assert z.shape[-1] == grid
            mine = family.tokens(ours(family, pipeline, z, timestep[None] / 1000), 2)
            goal = output
        elif family.name == "sana":
            mine, goal = ours(family, pipeline, sample, timestep[None] / 1000), output
        else:
            t = family.noise_times()[int(timestep)][None]
            alpha = pipeline.scheduler.alphas_cumprod[int(timestep)].double()
            torch.testing.assert_close(
                t / (1 - t), ((1 - alpha) / alpha).sqrt()[None], atol=0, rtol=1e-3
            )  # float32 alphas
            half = sample[:1].double()  # the pipeline carries conditional and unconditional halves
            mine = ours(family, pipeline, (half * (t.square() + (1 - t).square()).sqrt()).float(), t)
            goal = output[:1]
        torch.testing.assert_close(mine, goal, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["flux", "sana", "dit"])
@pytest.mark.parametrize("patch", [1, 2])
def test_tokens_and_untokens_are_inverse_in_the_input_order(name, patch):
    family = families.get(name)
    z = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6)
    tokens = family.tokens(z, patch)
    assert tokens.shape == (2, 24 // patch**2, 3 * patch**2)
    torch.testing.assert_close(family.untokens(tokens, (4, 6), patch, family.in_order), z)
    # element by element: token (row, column), feature (channel, dy, dx)
    assert tokens[1, 1, 0] == z[1, 0, 0, patch]
    assert tokens[0, 0, -1] == z[0, 2, patch - 1, patch - 1]


def test_velocity_of_an_epsilon_family_inverts_the_noising():
    family = families.get("dit")
    z0, eps, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8])

    class Exact:
        """A network that knows epsilon."""

        def __call__(self, x, timestep, class_labels, return_dict):
            return (torch.cat([eps, eps], 1),)

    zt = torch.lerp(z0, eps, t[:, None, None, None])
    v = family.velocity(Exact(), zt, t, {"class_labels": torch.tensor([1, 2])})
    torch.testing.assert_close(v, eps - z0, atol=1e-4, rtol=1e-4)
