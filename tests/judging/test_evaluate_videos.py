"""The verb `evaluate` on bundles of videos that are wider than high, drawn from text, and from a picture and text.

References: the stock pipelines called by hand, the autoencoder on its own, numbers computed from the files.
"""

import math

import diffusers
import pytest
import torch
from families.tiny_videos import VIDEOS

from dcgen_convert import families
from dcgen_convert.bundle import loading
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.pixels import to_image
from dcgen_convert.data import images, prompts, videos
from dcgen_convert.judging.evaluating import evaluate
from dcgen_convert.judging.order import SEED, Asked
from dcgen_convert.networks.autoencoder_dc_video import AutoencoderDCVideo
from dcgen_convert.tiny import videos as world

from . import video_bundles
from .video_bundles import FRAMES, HEIGHT, WIDTH

STEPS, COUNT, GUIDANCE = 2, 2, 4.0
SIZE = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
FIRST = 1009  # seed of the first video
SECOND = {"wan-a14b": {"guidance_scale_2": 3.0}}  # what the stock pipeline is told of the second network


@pytest.fixture(scope="module", params=["wan", "wan-image", "wan-a14b", "wan-image-a14b"])
def made(request, tmp_path_factory):
    """(name, root with source and autoencoder, bundle)."""
    root = tmp_path_factory.mktemp(request.param)
    return request.param, root, video_bundles.build(request.param, root)


def asked(made, output, **changes):
    name, root, bundle = made
    metrics = ("temporal-difference", "motion-accuracy", *(["first-frame"] if name.startswith("wan-image") else []))
    given = {"prompts": "tiny-videos", "count": COUNT, "metrics": metrics, "steps": STEPS, "guidance": GUIDANCE}
    return Asked(bundle, output, against=str(root / "source"), seed=FIRST, **{**given, **changes})


def clips(output, title):
    """The videos of a set in the order of their seeds, (COUNT, 3, FRAMES, HEIGHT, WIDTH)."""
    (folder,) = (output / "pictures").glob(f"{title}-" + "[0-9a-f]" * 12)
    files = sorted(folder.glob("*.mkv"))
    assert [videos.shape(file) for file in files] == [(WIDTH, HEIGHT, FRAMES)] * COUNT
    return torch.stack([videos.read(file, FRAMES, HEIGHT, WIDTH) for file in files])


def test_videos_of_the_bundles_own_shape(made, tmp_path):
    name, root, bundle = made
    document = evaluate(asked(made, tmp_path), NULL)
    values = {row["measure"]: row for row in document["measures"]}
    assert document["sides"] == {"converted": HEIGHT, "measured": HEIGHT, "base": HEIGHT}
    assert {model["width"] for model in document["models"].values()} == {WIDTH}
    texts = prompts.make("tiny-videos", COUNT, FIRST + SEED)
    firsts = [
        world.draw(torch.tensor([world.parse(text)]), FIRST + SEED + number, FRAMES, HEIGHT)[0, :, 0]
        for number, text in enumerate(texts)
    ]
    files = sorted((tmp_path / "edited").rglob("*.png"))
    assert len(files) == (COUNT if name.startswith("wan-image") else 0)
    given = [images.read_pixels(file, HEIGHT, WIDTH) for file in files]
    for file, first in zip(files, firsts, strict=bool(files)):
        torch.testing.assert_close(images.read_pixels(file, HEIGHT), first, atol=1.01 / 255, rtol=0)

    stock = getattr(diffusers, families.get(name).pipeline_class).from_pretrained(root / "source")
    for title, pipeline in (("converted", loading.load(bundle)[0]), ("base", stock)):
        pipeline.set_progress_bar_config(disable=True)
        networks, called = [getattr(pipeline, part) for part in families.get(name).components], set()
        for network in networks:
            network.register_forward_hook(lambda network, *_, called=called: called.add(network))
        found = clips(tmp_path, title)
        for number, text in enumerate(texts):
            call = {"image": to_image(given[number])} if given else {}
            drawn = pipeline(
                prompt=[text], **call, **SIZE, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="pt",
                **SECOND.get(name, {}),
                max_sequence_length=VIDEOS[name].length, generator=[torch.Generator().manual_seed(FIRST + number)],
            ).frames[0]  # fmt: skip
            shown = drawn.movedim(0, 1) * 2 - 1
            torch.testing.assert_close(found[number], shown, atol=1.02 / 255, rtol=0)
        assert called == set(networks)
        levels = (found * 127.5 + 127.5).round()
        moved = (levels[:, :, 1:] - levels[:, :, :-1]).abs().double().mean()
        assert values["temporal-difference"][title] == pytest.approx(moved.item(), rel=1e-6)
        if given:
            errors = (found[:, :, 0] - torch.stack(given)).double().square().mean((1, 2, 3))
            kept = (10 * torch.log10(4 / errors)).mean().item()
            assert values["first-frame"][title] == pytest.approx(kept, rel=1e-6)

    autoencoder = AutoencoderDCVideo.from_pretrained(root / "autoencoder")
    base = clips(tmp_path, "base")
    with torch.no_grad():  # frame stands on frame, also where the pipeline's pictures have grey frames after them
        again = autoencoder.decode(autoencoder.encode(base).latent_dist.mode()).sample.clamp(-1, 1)
    torch.testing.assert_close(clips(tmp_path, "round-trip"), again, atol=1.02 / 255, rtol=0)
    assert evaluate(asked(made, tmp_path), NULL)["pictures"]["converted"]["drawn"] == 0


def test_what_is_refused(made, tmp_path):
    name, *_ = made
    if name.endswith("a14b"):
        return
    if name == "wan":
        with pytest.raises(InputError, match="the measure first-frame cannot be used: the videos were drawn from text"):
            evaluate(asked(made, tmp_path, metrics=("first-frame",)), NULL)
        return
    for kind, why in (("builtin", "builtin gives no pictures"), ("tiny-edits", "tiny-edits gives no pictures")):
        with pytest.raises(InputError, match=f"draws videos from a picture, and {why}"):
            evaluate(asked(made, tmp_path, prompts=kind), NULL)
    with pytest.raises(InputError, match="the measure unchanged cannot be used: no instruction is one of"):
        evaluate(asked(made, tmp_path, metrics=("unchanged",)), NULL)
    pictures = tmp_path / "pictures"
    images.write(torch.linspace(-1, 1, 48).expand(3, 40, 48), (pictures.mkdir(), pictures / "a.png")[1])
    (tmp_path / "texts.txt").write_text("the fox runs\nthe fox sleeps\n")
    own = {"prompts": str(tmp_path / "texts.txt"), "sources": str(pictures), "metrics": ("first-frame", "colour")}
    found = evaluate(asked(made, tmp_path / "own", **own), NULL)
    assert math.isfinite(found["values"]["first-frame"]) and found["count"] == COUNT
