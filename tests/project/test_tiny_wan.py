"""The program that makes the miniatures of videos: it goes on where it was stopped, and what it writes runs."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from torch import nn

from dcgen_convert.networks import autoencoders
from dcgen_convert.tiny import videos

sys.path.insert(0, str(Path(__file__).parents[2]))  # the programs are no part of the package
from tools.tiny import assemble, loop, text, video_autoencoders, wan
from tools.tiny.video_autoencoders import Phase

AUTOENCODERS = {"kl-wan": (1, 5), "dc-ae-v-f32t4c32": (1, 8)}  # frames that the phases of its training see
PROBES = 4


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 3, 1)])

    def forward(self, x):
        return self.blocks[1](self.blocks[0](self.inside(x).relu()).relu())


def fitted(steps: int, file: Path | None, most: int = 10**9) -> dict[str, torch.Tensor]:
    """Weights after ``steps`` steps. The process dies in step ``most``."""
    torch.manual_seed(3)
    model, made = Layers(), []

    def loss_of(generator):
        made.append(1)
        if len(made) > most:
            raise KeyboardInterrupt
        x = torch.randn(4, 3, 8, 8, generator=generator)
        return (model(x).float() - x.roll(1, 3)).square().mean()

    training = loop.Training(steps, 4, 1e-2, 5, half=True, orthogonal=True)
    return loop.optimise(model, loss_of, training, lambda line: None, file).state_dict()


def test_a_stopped_training_ends_as_one_that_was_not(tmp_path, monkeypatch):
    """Bit for bit: weights, both optimisers, their rates, the average and the random numbers go on."""
    monkeypatch.setattr(loop, "EVERY", 0)
    wanted, file = fitted(9, None), tmp_path / "part-phase-0.state"
    with pytest.raises(KeyboardInterrupt):
        fitted(9, file, most=4)
    assert torch.load(file, weights_only=True)["step"] == 4
    for _ in range(2):  # a phase that is done is not trained again
        found = fitted(9, file)
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_orthogonal_steps_are_those_of_torch_and_a_convolution_counts_as_a_matrix():
    """Weights after 3 steps to 3 % of the way: torch's iterations run in bfloat16."""
    torch.manual_seed(0)
    start, gradients = torch.randn(16, 4, 3, 3), torch.randn(3, 16, 4, 3, 3)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.flatten(1).clone())
    one = loop.Orthogonal([ours], lr=0.01, weight_decay=1e-3)
    other = torch.optim.Muon([theirs], lr=0.03, weight_decay=1e-3 / 3, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.flatten(1).clone()
        one.step()
        other.step()
    way = theirs.detach() - start.flatten(1)
    assert (ours.detach().flatten(1) - theirs.detach()).norm() < 0.03 * way.norm()


def test_a_new_autoencoder_of_wan_codes_frame_by_frame():
    """Of a still video every latent frame and every frame is that of the picture, to 1e-5; not so of a moving one."""
    model = video_autoencoders.new_model("kl-wan", 1)
    labels = videos.sample_labels(1, 2)
    labels[:, -1] = list(videos.MOTIONS).index("growing")
    moving = videos.draw(labels, 2, 5, 64)
    still = moving[:, :, :1].expand(-1, -1, 5, -1, -1)
    with torch.no_grad():
        one, same, other = (model.encode(clip).latent_dist.mode() for clip in (still[:, :, :1], still, moving))
        picture, seen = (model.decode(z).sample for z in (one, same))
    torch.testing.assert_close(same, one.expand_as(same), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen, picture.expand_as(seen), atol=1e-5, rtol=0)
    assert (other[:, :, 1] - other[:, :, 0]).abs().max() > 0.01 and picture.std() > 1e-3


def test_what_a_deep_autoencoder_learns_of_pictures_it_knows_of_still_videos():
    """Every frame of a still video is then the picture's, to 1e-5; and the frames of a moving one are not alike."""
    model = video_autoencoders.new_model("dc-ae-v-f32t4c32", 1)
    still = video_autoencoders.Still(model)
    for weight in still.parameters():
        weight.data.add_(0.05 * torch.randn_like(weight))
    picture = videos.draw(videos.sample_labels(2, 2), 2, 1, 64)
    with torch.no_grad():
        z = still.encode(picture)
        wanted = still.decode(z)
        still.moving(model)
        found = model.encoder(picture.expand(-1, -1, 12, -1, -1))
        torch.testing.assert_close(found, z.expand_as(found), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.decoder(found), wanted.expand(-1, -1, 12, -1, -1), atol=1e-5, rtol=1e-5)
        assert (model.encoder(videos.draw(videos.sample_labels(1, 2), 2, 8, 64)).diff(dim=2).abs() > 1e-3).any()
    assert wanted.std() > 0.05 and wanted.shape == picture.shape


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Autoencoders after two steps of each phase."""
    work = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video_autoencoders, "PROBES", PROBES)
        for name, frames in AUTOENCODERS.items():
            patch.setitem(video_autoencoders.PHASES, name, [Phase(2, 1, 1e-3, 64, number) for number in frames])
            video_autoencoders.train(name, 1, work, lambda line: None).save_pretrained(work / name)
    return work


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_configs_say_how_large_latents_are(work, name):
    """Of the same videos: mean and standard deviation of each channel (Wan), the mean square of all (DC-AE-V)."""
    codec, seed = autoencoders.load(work / name), video_autoencoders.PROBE
    z = codec.encode(videos.draw(videos.sample_labels(PROBES, seed), seed)[:, :, : 13 if name == "kl-wan" else 16])
    assert z.shape == ((PROBES, 16, 4, 16, 16) if name == "kl-wan" else (PROBES, 32, 4, 4, 4))
    if name == "kl-wan":
        channels = z.transpose(0, 1).flatten(1)
        torch.testing.assert_close(channels.std(1), torch.ones(16), atol=0.01, rtol=0)
        torch.testing.assert_close(channels.mean(1), torch.zeros(16), atol=0.01, rtol=0)
    assert abs(z.square().mean() - 1) < 0.01
    assert codec.decode(z[:1]).shape == (1, 3, 13, 128, 128)


def test_latents_are_made_once(work, monkeypatch):
    monkeypatch.setattr(wan, "PART", 2)
    labels, lines = videos.sample_labels(5, 4), []
    z = wan.latents(work, labels, 4, 5, lines.append)
    assert z.shape == (5, 16, 2, 16, 16) and len(lines) == 3
    exact = autoencoders.load(work / "kl-wan").encode(videos.draw(labels[4:], 4 + 2 * 2)[:, :, :5])
    assert (z[4:] - exact).square().mean() < 4e-3  # of a variance of 1
    (work / "wan-latents-5-4" / "0001.safetensors").unlink()
    assert torch.equal(wan.latents(work, labels, 4, 5, lines.append), z) and len(lines) == 4


def test_every_word_of_a_caption_is_one_token():
    _, tokenizer = text.umt5()
    for row in videos.sample_labels(60, 8).tolist():
        caption = videos.caption(row)
        tokens = tokenizer(caption).input_ids
        assert len(tokens) == len(caption.split()) + 2 <= text.LENGTH  # a comma and the end
        assert tokenizer.unk_token_id not in tokens


def test_what_it_writes_is_drawn_with_by_the_stock_pipeline(work, tmp_path, monkeypatch):
    phases = (wan.Phase(1, 1e-3, 2.0, 2, 1, 4, 0), wan.Phase(1, 1e-3, 2.0, 2, 5, 4, 1))
    monkeypatch.setattr(wan, "PHASES", phases)
    lines = []
    wan.train(work, lines.append).save_pretrained(work / "wan")
    assert sum(line.startswith("step 1 loss") for line in lines) == len(phases)
    assemble.write(work, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny-dc-ae-v", "tiny-wan"]
    assert not list(tmp_path.rglob("*.py"))
    assert autoencoders.load(tmp_path / "tiny-dc-ae-v").channels == 32
    pipeline = WanPipeline.from_pretrained(tmp_path / "tiny-wan")
    drawn = pipeline(
        videos.caption([0] * 7),
        height=128,
        width=128,
        num_frames=5,
        num_inference_steps=2,
        max_sequence_length=text.LENGTH,
        output_type="pt",
    ).frames
    assert drawn.shape == (1, 5, 3, 128, 128) and drawn.isfinite().all()
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert size < 10e6
