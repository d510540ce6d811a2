"""What of a caption must be read, and what counts as read."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from dcgen_convert.core.errors import AccessError, InputError
from dcgen_convert.evaluation import measures, ocr, pixels
from dcgen_convert.evaluation.measures import Weights


@pytest.mark.parametrize(
    ("caption", "texts"),
    [
        ('a sign that says "Hello World" at night', ["Hello World"]),
        ("a neon sign “OPEN” over a door with “24 hours”", ["OPEN", "24 hours"]),
        ("the dog's bowl, labelled 'Rex', and the dogs' house", ["Rex"]),
        ("a shirt with 'don't stop' on it", ["don't stop"]),
        ("a shirt with ‘don’t stop’ on it", ["don’t stop"]),
        ("«Bonjour» und „Guten Tag“ und 「你好」", ["Bonjour", "Guten Tag", "你好"]),
        ('five inches: 5" and "!!!"', []),
        ("a fox in the snow", []),
    ],
)
def test_texts_in_quotes(caption, texts):
    assert ocr.quoted(caption) == texts


@pytest.mark.parametrize(
    ("texts", "read", "share"),
    [
        (["Hello World"], "HELLO, world!", 1.0),
        (["Hello World"], "hello wrld", 0.5),
        (["Hello World"], "HelloWorld", 1.0),  # a reader lost the space
        (["Hello World"], "Hel lo World", 1.0),
        (["Hello World"], "World Hello", 1.0),
        (["Hello World"], "", 0.0),
        (["no no no"], "no no", 2 / 3),
        (["no"], "nobody", 0.0),  # too short to be looked for inside others
        (["cafe", "cafe"], "cafe", 0.5),
        (["café"], "CAFÉ", 1.0),
        (["你好"], "你好吗", 1.0),
        (["don't"], "don’t", 1.0),
        (["Open", "24 hours"], "OPEN 24 hous", 2 / 3),
    ],
)
def test_share_of_words_that_were_read(texts, read, share):
    assert ocr.share(texts, read) == pytest.approx(share)


def test_scores_are_nan_without_quotes():
    measure = ocr.Ocr(lambda image: f"{image.width} px")
    scores = measure.scores(torch.zeros(3, 3, 16, 24), ['"24 px"', "a fox", 'says "hello"'])
    assert scores.dtype == torch.float64 and scores[0] == 1 and math.isnan(scores[1]) and scores[2] == 0
    with pytest.raises(InputError, match="ocr cannot be used: no caption has words in quotes"):
        measures.chosen(["ocr"], Weights(), ["a fox"])


def test_a_reader_that_is_missing_or_broken_is_told(monkeypatch):
    found = {"rapidocr": None, "pytesseract": None, "easyocr": None}
    monkeypatch.setattr(ocr.importlib.util, "find_spec", found.get)
    assert measures.chosen(None, Weights(), ['"hello"'])[1]["ocr"].startswith("no program that reads text")
    with pytest.raises(AccessError, match="no program that reads text in pictures is installed") as caught:
        measures.chosen(["ocr"], Weights(), ['"hello"'])
    assert caught.value.exit_code == 3 and "pip install rapidocr" in caught.value.hint
    found["easyocr"] = True
    monkeypatch.setitem(__import__("sys").modules, "easyocr", None)
    with pytest.raises(AccessError, match="easyocr does not start"):
        measures.chosen(["ocr"], Weights(), ['"hello"'])


def test_drawn_words_are_read():
    pytest.importorskip("rapidocr", reason="no text reader installed")
    image = Image.new("RGB", (512, 512), "white")
    ImageDraw.Draw(image).text((60, 200), "Hello World", fill="black", font=ImageFont.load_default(60))
    pictures = pixels.from_images([image, Image.new("RGB", (512, 512), "white")])
    captions = ['a sign that says "Hello World"', '"Hello"']
    assert measures.chosen(["ocr"], Weights(), captions)[0][0].scores(pictures, captions).tolist() == [1, 0]
