"""Measures with networks: random tiny CLIP and DINOv2 models, against the library's own path and against formulas."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dcgen_convert.core.errors import AccessError, InputError
from dcgen_convert.evaluation import clip, inception, measures, pixels, preparation, tiny_world, weights
from dcgen_convert.evaluation.measures import Weights
from dcgen_convert.tiny import world

TOKENIZER = Path(tiny_world.__file__).parents[1] / "tiny" / "weights" / "tiny-flux" / "tokenizer"
SIDE = 32  # px that the tiny networks see
CAPTIONS = ["a small striped red circle at the top left on grass", "a large plain blue ring in the center at night"]
LONG = " ".join(CAPTIONS * 8)  # more than 77 tokens


def pictures_of(count: int = 5, seed: int = 3, side: tuple[int, int] = (72, 128)) -> torch.Tensor:
    whole = world.draw(world.sample_labels(count, seed), seed, 128)
    return torch.nn.functional.interpolate(whole, size=side, mode="area")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": 238, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
        vision_config={**sizes, "image_size": SIDE, "patch_size": 8},
        projection_dim=16,
    )
    folder = tmp_path_factory.mktemp("clip") / "model"
    torch.manual_seed(0)
    model = CLIPModel(config)
    with torch.no_grad():  # random embeddings are nearly equal; larger weights tell pictures and captions apart
        for parameter in model.parameters():
            parameter.mul_(1 if parameter.ndim == 0 else 4)
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(folder)
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dino") / "model"
    torch.manual_seed(1)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=8)
    Dinov2Model(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 40}, "crop_size": {"height": SIDE, "width": SIDE}, "resample": 3}
    kind = {"image_processor_type": "BitImageProcessor", "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes | kind))
    return folder


def one(name: str, given: Weights, captions: list[str] = CAPTIONS):
    return measures.chosen([name], given, captions)[0][0]


def test_clip_score_against_the_library_one_picture_at_a_time(clip_folder):
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    pictures, captions = pictures_of(3), [*CAPTIONS, LONG]
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPImageProcessorPil.from_pretrained(clip_folder)
    tokenizer, expected = CLIPTokenizer.from_pretrained(clip_folder), []
    for picture, caption in zip(pictures, captions, strict=True):
        values = numpy.clip(picture.double().numpy() * 127.5 + 128, 0, 255).astype(numpy.uint8)
        tokens = tokenizer([caption], truncation=True, max_length=77, return_tensors="pt")
        with torch.no_grad():
            found = model(**tokens, **processor(Image.fromarray(values.transpose(1, 2, 0)), return_tensors="pt"))
        expected.append(found.logits_per_image.item())
    assert tokens.input_ids.shape == (1, 77)
    scores = one("clip", Weights(clip=str(clip_folder))).scores(pictures, captions)
    assert scores.dtype == torch.float64 and scores.tolist() == pytest.approx(expected, rel=1e-5)
    picked = one("pickscore", Weights(pickscore=str(clip_folder))).scores(pictures, captions)
    assert torch.equal(picked, scores)
    assert scores.std() > 0.1, "pictures and captions must make a difference"
    swapped = one("clip", Weights(clip=str(clip_folder))).scores(pictures, captions[::-1])
    assert not torch.allclose(swapped, scores, atol=1e-3)


@pytest.mark.parametrize("name", ["clip", "cmmd", "fd-dinov2"])
def test_one_picture_at_a_time_gives_what_many_give(name, clip_folder, dino_folder, monkeypatch):
    monkeypatch.setattr(clip, "AT_ONCE", 2)
    measure = one(name, Weights(clip=str(clip_folder), dino=str(dino_folder)))
    pictures, captions = pictures_of(5), [CAPTIONS[0], LONG, *CAPTIONS, "red"]
    if measure.kind == "score":
        single = [measure.scores(picture[None], [text]) for picture, text in zip(pictures, captions, strict=True)]
        assert torch.allclose(torch.cat(single), measure.scores(pictures, captions), atol=1e-4)
        return
    a, b = measure.features(pictures), measure.features(pictures_of(4, 9))
    assert a.dtype == torch.float32 and a.shape[0] == 5
    assert torch.allclose(torch.cat([measure.features(picture[None]) for picture in pictures]), a, atol=1e-5)
    apart = measure.distance(a, b)
    assert apart > 0 and measure.distance(b, a) == pytest.approx(apart, rel=1e-6)
    assert measure.distance(a, a) == pytest.approx(0, abs=1e-6 * max(1, apart))


def test_dino_features_against_the_library(dino_folder):
    from transformers import BitImageProcessorPil, Dinov2Model

    model, processor = Dinov2Model.from_pretrained(dino_folder), BitImageProcessorPil.from_pretrained(dino_folder)
    pictures = pictures_of(3)
    with torch.no_grad():
        expected = model(**processor(pixels.to_images(pictures), return_tensors="pt")).pooler_output
    assert torch.allclose(one("fd-dinov2", Weights(dino=str(dino_folder))).features(pictures), expected, atol=1e-5)


@pytest.mark.parametrize("side", [(224, 224), (128, 96), (300, 511), (64, 64)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": {"shortest_edge": 224}, "crop_size": 224},
        {"size": {"height": 50, "width": 70}, "crop_size": {"height": 45, "width": 61}},
        {
            "size": {"shortest_edge": 40},
            "crop_size": {"height": 61, "width": 64},
        },  # black edges
        {"do_center_crop": False, "size": {"height": 30, "width": 20}, "resample": 2},
    ],
    ids=["usual", "stated", "of-shape", "padded", "bilinear"],
)
def test_pictures_are_prepared_as_the_library_does(tmp_path, side, settings):
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(**settings)
    if settings:
        processor.save_pretrained(tmp_path)
    pictures = pictures_of(2, side=side)
    expected = processor(pixels.to_images(pictures), return_tensors="pt").pixel_values
    found = preparation.read(tmp_path, preparation.CLIP)(pictures)
    assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-6)


def test_older_and_newer_forms_of_the_preparation(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"size": 224, "crop_size": 224, "resample": 3}')
    usual = preparation.read(tmp_path / "nowhere", preparation.CLIP)
    assert preparation.read(tmp_path, preparation.CLIP) == usual and usual.shortest == 224 and usual.crop == (224, 224)
    (tmp_path / "preprocessor_config.json").unlink()
    document = {"image_processor": {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}}
    (tmp_path / "processor_config.json").write_text(json.dumps(document))
    assert preparation.read(tmp_path, preparation.CLIP).crop == (336, 336)
    for damaged in (
        '{"image_processor": {"crop_size": 0}}',
        '{"image_processor": {"size": {"shortest_edge": -5}}}',
        '{"image_processor": {"resample": 77}}',
        '{"image_processor": {"size": "large"}}',
        '{"image_processor": {"image_std": [0, 1, 1]}}',
        "[]",
    ):
        (tmp_path / "processor_config.json").write_text(damaged)
        with pytest.raises(InputError, match="processor_config.json"):
            preparation.read(tmp_path, preparation.CLIP)


def changed(folder: Path, copy: Path, **config) -> Path:
    """A copy of a model's folder with other values in its config."""
    shutil.copytree(folder, copy)
    document = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**document, **config}))
    return copy


def test_folders_that_cannot_be_used_are_one_sentence(clip_folder, dino_folder, tmp_path):
    def refused(sentence: str, **given: str) -> None:
        name = {"clip": "cmmd", "dino": "fd-dinov2"}.get(next(iter(given)), next(iter(given)))
        for names in ([name], None):  # what the user gave is an error in both cases
            with pytest.raises(InputError, match=sentence) as caught:
                measures.chosen(names, Weights(**given), CAPTIONS)
            assert caught.value.exit_code == 2 and "\n" not in caught.value.message

    refused("holds a model of type dinov2, and --clip needs a CLIP model", clip=str(dino_folder))
    refused("holds a model of type clip, and --dino needs a DINOv2 model", dino=str(clip_folder))
    refused("--clip names .*which does not exist", clip=str(tmp_path / "nowhere"))
    refused("--dino, is a file|--dino names, is a file", dino=str(clip_folder / "config.json"))
    refused("has no config.json", clip=str(tmp_path))
    other = changed(clip_folder, tmp_path / "other")
    (other / "preprocessor_config.json").write_text('{"crop_size": 48, "size": 48}')
    refused(r"prepares pictures of another size, \(48, 48\), than its model takes, 32 px", clip=str(other))
    bare = changed(clip_folder, tmp_path / "bare")
    (bare / "model.safetensors").rename(bare / "pytorch_model.bin")
    refused("has no model.safetensors; pickles are not read", clip=str(bare))
    mute = changed(clip_folder, tmp_path / "mute")
    (mute / "tokenizer.json").unlink()
    refused("has no tokenizer", clip=str(mute))
    with pytest.raises(AccessError, match=r"has no tokenizer, and that of laion/\S+ is not at hand"):
        measures.chosen(None, Weights(pickscore=str(mute)), CAPTIONS)


def test_a_checkpoint_that_is_not_whole_is_refused_when_it_is_loaded(clip_folder, tmp_path):
    def refused(folder: Path, sentence: str) -> None:
        measure = one("clip", Weights(clip=str(folder)))
        with pytest.raises(InputError, match=sentence):
            measure.scores(pictures_of(1), CAPTIONS[:1])

    lacking = changed(clip_folder, tmp_path / "lacking")
    tensors = load_file(lacking / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, lacking / "model.safetensors", {"format": "pt"})
    refused(lacking, "lacks 1 tensors of its CLIPModel, which would be random: visual_projection.weight")
    small = changed(clip_folder, tmp_path / "small", text_config={"vocab_size": 90, "hidden_size": 32})
    refused(small, "does not load|lacks")
    empty = changed(clip_folder, tmp_path / "empty")
    (empty / "tokenizer.json").write_text("{}")
    refused(empty, "the tokenizer in .* does not load")


def test_measures_without_their_weights_are_left_out_or_refused_with_exit_code_3():
    found, left_out = measures.chosen(None, Weights(), ["a fox"])
    assert not {"clip", "cmmd", "fd-dinov2", "pickscore", "fid"} & {each.name for each in found}
    assert left_out["clip"] == (
        "there is no CLIP model at hand (give one with --clip FOLDER or REPO; openai/clip-vit-large-patch14 fits)"
    )
    for name, words in {"clip": "--clip", "fd-dinov2": "facebook/dinov2-large", "pickscore": "PickScore_v1"}.items():
        with pytest.raises(AccessError) as caught:
            measures.chosen(["colour", name], Weights(), ["a fox"])
        assert caught.value.exit_code == 3 and words in caught.value.hint
    with pytest.raises(AccessError, match="org/clip, which --clip names, is not in the local cache"):
        measures.chosen(None, Weights(clip="org/clip"), ["a fox"])


def test_a_model_in_the_hubs_cache_is_used_without_the_network(clip_folder, tmp_path, monkeypatch):
    """Also where the cache has been filled for less before: a snapshot with a tokenizer alone is no model."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--openai--clip-vit-large-patch14"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    shutil.copy(clip_folder / "tokenizer.json", snapshot)
    assert weights.cached(clip.CLIP.usual, weights.FILES, fetch=False) is None
    assert weights.cached(clip.CLIP.usual, weights.TOKENIZER, fetch=False) is not None
    shutil.copytree(clip_folder, snapshot, dirs_exist_ok=True)
    found, left_out = measures.chosen(None, Weights(), CAPTIONS)
    assert {"clip", "cmmd"} <= {each.name for each in found} and "pickscore" in left_out
    assert measures.chosen(["clip"], Weights(clip="openai/clip-vit-large-patch14"), CAPTIONS, offline=True)[0]


def test_one_clip_model_serves_both_of_its_measures(clip_folder):
    score, distance = measures.chosen(["clip", "cmmd"], Weights(clip=str(clip_folder)), CAPTIONS)[0]
    pictures = pictures_of(2)
    score.scores(pictures, CAPTIONS)
    assert distance._tower is score._tower
    assert math.isclose(distance.features(pictures)[0].norm().item(), 1, rel_tol=1e-5)


def test_fid_names_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(AccessError, match="no weights of Inception at hand") as caught:
        measures.chosen(["fid"], Weights(), CAPTIONS)
    assert "--inception FILE" in caught.value.hint
    file = tmp_path / "inception.pth"
    with pytest.raises(InputError, match="which --inception names, is no file"):
        measures.chosen(None, Weights(inception=str(file)), CAPTIONS)
    torch.save({"fc.weight": torch.zeros(2)}, file)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # as if it were not installed
    with pytest.raises(AccessError, match="fid needs the packages torch-fidelity and torchvision") as caught:
        measures.chosen(["fid"], Weights(inception=str(file)), CAPTIONS)
    assert "dcgen-convert[eval]" in caught.value.hint


class Harmful:
    def __reduce__(self):
        return print, ("code of a stranger",)


def test_weights_of_inception_are_read_as_tensors_alone(tmp_path, capsys):
    file = tmp_path / "inception.pth"
    torch.save({"fc.weight": Harmful()}, file)
    with pytest.raises(InputError, match="is no file of weights"):
        inception._tensors(file)
    assert "stranger" not in capsys.readouterr().out
    torch.save({"fc.weight": torch.ones(2), "name": "x"}, file)
    with pytest.raises(InputError, match="holds more than tensors"):
        inception._tensors(file)
    save_file({"fc.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    assert inception._tensors(tmp_path / "a.safetensors")["fc.weight"].tolist() == [1, 1]


def test_fid_through_torch_fidelity(tmp_path, monkeypatch):
    """With random weights: features are the package's own, and the distance is that of the formula."""
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="extra eval not installed")
    torch.manual_seed(0)
    with monkeypatch.context() as patch:  # the class can only be made with a file
        patch.setattr(extractor, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(extractor.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        stock = extractor.FeatureExtractorInceptionV3("stock", ["2048"])
    file = tmp_path / "inception.pth"
    torch.save(stock.state_dict(), file)
    measure = one("fid", Weights(inception=str(file)))
    pictures = pictures_of(3, side=(64, 64))
    features = measure.features(pictures)
    with torch.no_grad():
        expected = torch.cat([stock(pixels.to_uint8(picture[None]))[0] for picture in pictures])
    assert features.shape == (3, 2048) and torch.allclose(features, expected, rtol=1e-4, atol=1e-5)
    assert measure.distance(features, features) == pytest.approx(0, abs=1e-4)
    torch.save({"fc.weight": torch.zeros(2)}, file)
    with pytest.raises(InputError, match="holds other tensors than Inception"):
        one("fid", Weights(inception=str(file))).features(pictures)
