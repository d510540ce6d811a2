"""GenEval's prompts and rules, and the detector on a random tiny model."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch

from dcgen_convert.core.errors import AccessError, InputError
from dcgen_convert.evaluation import geneval, measures
from dcgen_convert.evaluation.geneval import Seen, relations, right
from dcgen_convert.evaluation.geneval_prompts import CLASSES, Demand, Question, read
from dcgen_convert.evaluation.measures import Weights


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("a photo of a bench", Question("single_object", (Demand("bench"),))),
        ("a photo of an orange", Question("single_object", (Demand("orange"),))),
        ("a photo of a tv remote and a dog", Question("two_object", (Demand("tv remote"), Demand("dog")))),
        ("a photo of four wine glasses", Question("counting", (Demand("wine glass", 4),))),
        ("a photo of two knifes", Question("counting", (Demand("knife", 2),))),
        ("a photo of an orange orange", Question("colors", (Demand("orange", color="orange"),))),
        ("a photo of a green hot dog", Question("colors", (Demand("hot dog", color="green"),))),
        (
            "a photo of a dog right of a teddy bear",
            Question("position", (Demand("teddy bear"), Demand("dog", relation="right of"))),
        ),
        (
            "a photo of a purple wine glass and a black apple",
            Question("color_attr", (Demand("wine glass", color="purple"), Demand("apple", color="black"))),
        ),
        ("a photo of a fox", None),
        ("a photo of a red dog and a cat", None),
        ("a bench", None),
    ],
)
def test_what_a_prompt_asks_for(prompt, question):
    assert read(prompt) == question


def test_coco_has_80_classes_in_its_order():
    assert len(set(CLASSES)) == 80
    assert [CLASSES[number] for number in (0, 16, 39, 57, 62, 79)] == [
        "person",
        "dog",
        "bottle",
        "couch",
        "tv",
        "toothbrush",
    ]


def seen(left: int, top: int, right: int, bottom: int, score: float = 0.9) -> Seen:
    mask = torch.zeros(100, 100, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return Seen(score, (left, top, right, bottom), mask)


@pytest.mark.parametrize(
    ("a", "found"),
    [
        ((0, 40, 20, 60), {"left of"}),
        ((80, 40, 100, 60), {"right of"}),
        ((40, 0, 60, 20), {"above"}),
        ((40, 80, 60, 100), {"below"}),
        ((0, 0, 20, 20), {"left of", "above"}),
        ((43, 40, 63, 60), set()),  # 3 px aside, and a tenth of both sizes is 4
        ((40, 40, 60, 60), set()),
        ((46, 40, 66, 60), set()),  # 2 of the 6 px count: less than half
        ((50, 40, 70, 60), {"right of"}),
    ],
)
def test_relations_of_boxes(a, found):
    assert relations(a, (40, 40, 60, 60)) == found


def test_rules():
    def judge(prompt: str, objects: dict[str, list[Seen]], colors: list[str] = []) -> bool:  # noqa: B006
        return right(read(prompt), objects, lambda taken, name: colors[: len(taken)])

    dog, cat = seen(0, 40, 20, 60), seen(80, 40, 100, 60)
    assert judge("a photo of a dog", {"dog": [dog]}) and not judge("a photo of a dog", {"cat": [cat]})
    assert judge("a photo of a dog", {"dog": [dog, cat]})  # more is no fault where nothing is counted
    assert judge("a photo of two dogs", {"dog": [dog, cat]})
    assert not judge("a photo of two dogs", {"dog": [dog]}) and not judge("a photo of two dogs", {"dog": [dog] * 3})
    assert judge("a photo of a dog and a cat", {"dog": [dog], "cat": [cat]})
    assert not judge("a photo of a dog and a cat", {"dog": [dog]})
    assert judge("a photo of a dog left of a cat", {"dog": [dog], "cat": [cat]})
    assert not judge("a photo of a cat left of a dog", {"dog": [dog], "cat": [cat]})
    assert judge("a photo of a red dog", {"dog": [dog]}, ["red"])
    assert not judge("a photo of a red dog", {"dog": [dog]}, ["blue"])
    assert not judge("a photo of a red dog and a red cat", {"dog": [dog]}, ["red"])


class Pure:
    """In the place of a CLIP model: a picture's mean colour, and the colour that a text names."""

    RGB: ClassVar = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}

    def of_pictures(self, pictures):
        self.size = tuple(pictures.shape[-2:])
        return torch.nn.functional.normalize(pictures.mean((-2, -1)) + 0.2, dim=-1)  # GREY has 0.2

    def of_texts(self, texts):
        found = [next((rgb for name, rgb in self.RGB.items() if name in text), (0.0, 0.0, 0.0)) for text in texts]
        return torch.tensor(found)


def test_a_colour_is_that_of_the_object_alone():
    from PIL import Image

    image = Image.new("RGB", (100, 100), "blue")
    image.paste("red", (10, 20, 20, 70))
    one = seen(10, 20, 40, 70)
    one.mask[:, 20:] = False  # within the box, but not of the object
    tower = Pure()
    assert geneval.Colors(tower)(image, [one], "dog") == ["red"] and tower.size == (50, 30)
    assert geneval.Colors(tower)(image, [seen(40, 0, 90, 90)], "dog") == ["blue"]


def test_other_prompts_leave_it_out():
    assert measures.chosen(None, Weights(), ["a fox"])[1]["geneval"] == "no caption is a prompt of GenEval"
    with pytest.raises(AccessError, match="there is no Mask2Former model at hand"):
        measures.chosen(["geneval"], Weights(), ["a photo of a dog"])


def test_the_detector_against_the_librarys_own_reading(tmp_path):
    pytest.importorskip("scipy", reason="extra eval not installed")
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessorPil,
        SwinConfig,
    )

    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, num_labels=80, hidden_dim=32, mask_feature_size=32, feature_size=32, num_queries=12,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, encoder_feedforward_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        model.class_predictor.weight.normal_(std=1.5)
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"height": 64, "width": 64}, "do_center_crop": false}')
    picture = torch.rand(1, 3, 384, 384, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = geneval.detector(str(tmp_path), "cpu", fetch=False, asked=True)(picture, 0.2)
    processor = Mask2FormerImageProcessorPil(size={"height": 64, "width": 64})
    from dcgen_convert.evaluation.pixels import to_images

    with torch.no_grad():
        outputs = model(processor(to_images(picture), return_tensors="pt").pixel_values)
    expected = processor.post_process_instance_segmentation(
        outputs, threshold=0.2, target_sizes=[(384, 384)], return_binary_maps=True
    )[0]
    assert expected["segments_info"], "the model must see something"
    pairs = {(CLASSES[info["label_id"]], round(info["score"], 3)) for info in expected["segments_info"]}
    assert {(name, round(one.score, 3)) for name, objects in found.items() for one in objects} == pairs
    masks = [one.mask for objects in found.values() for one in objects]
    apart = [min(int((mask != other.bool()).sum()) for other in expected["segmentation"]) for mask in masks]
    assert max(apart) <= 3  # of 147,456 pixels: processors round differently, and some pixels lie on the edge
    for objects in found.values():
        for one in objects:
            left, top, beyond, below = one.box
            assert one.mask[top:below, left:beyond].sum() == one.mask.sum()
            assert one.mask[top].any() and one.mask[below - 1].any() and one.mask[:, left].any()
    measure = geneval.GenEval(geneval.detector(str(tmp_path), "cpu", fetch=False, asked=True), Pure())
    scores = measure.scores(picture.expand(2, -1, -1, -1), ["a photo of a dog", "a fox"])
    assert scores[0] in (0, 1) and math.isnan(scores[1])
    Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**{**config.to_dict(), "num_labels": 3})).save_pretrained(
        tmp_path
    )
    with pytest.raises(InputError, match="no detector of the 80 classes of COCO"):
        geneval.detector(str(tmp_path), "cpu", fetch=False, asked=True)


def test_a_clip_model_is_no_detector(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(InputError, match="--detector needs a Mask2Former model"):
        measures.chosen(None, Weights(detector=str(tmp_path)), ["a photo of a dog"])
