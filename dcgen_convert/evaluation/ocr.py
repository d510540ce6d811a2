"""Whether the words that a caption puts in quotes can be read in the picture, by a text reader that is installed.

Text is what a deep autoencoder loses first.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version

import torch
from PIL import Image
from torch import Tensor

from dcgen_convert.evaluation.measure import Score
from dcgen_convert.evaluation.pixels import to_images
from dcgen_convert.evaluation.weights import NotAtHand, first_line

# Pairs of quotes. A straight single quote inside a word is an apostrophe, a double one after a digit stands for inches.
QUOTED = re.compile(
    r'(?<!\d)"([^"]+)"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»|「([^」]+)」|『([^』]+)』|‘(.+?)’(?!\w)|(?<!\w)\'(.+?)\'(?!\w)'
)
SURE = 4  # letters of a text that is looked for without regard to spaces

Reader = Callable[[Image.Image], str]


class Ocr(Score):
    """Share of the quoted words of a caption that a text reader finds in the picture, 0..1; NaN without quotes.

    Letters and digits count, in any case. A word counts as often as it was asked for and read. A text in quotes of at
    least SURE letters also counts as a whole where the reader saw its letters in a row, as readers lose spaces.
    """

    name = "ocr"
    label = "Quoted words that can be read"

    def __init__(self, read: Reader, program: str = "") -> None:
        self._read, self._program = read, program

    def made_of(self) -> str:
        return self._program

    def scores(self, pictures: Tensor, captions: list[str]) -> Tensor:
        found = []
        for number, caption in enumerate(captions):
            texts = quoted(caption)
            read = self._read(to_images(pictures[number : number + 1])[0]) if texts else ""
            found.append(share(texts, read))
        return torch.tensor(found, dtype=torch.float64)


def quoted(caption: str) -> list[str]:
    """The texts in quotes that have a letter or a digit."""
    texts = (next(filter(None, found.groups())) for found in QUOTED.finditer(caption))
    return [text for text in texts if words(text)]


def words(text: str) -> list[str]:
    """Words of letters and digits alone, in one case: "Don't!" is "dont"."""
    plain = (re.sub(r"[\W_]", "", word) for word in unicodedata.normalize("NFKC", text).casefold().split())
    return [word for word in plain if word]


def share(texts: list[str], read: str) -> float:
    """Share of the words of ``texts`` that stand in what was read; NaN where there are none."""
    seen, whole, right, asked = Counter(words(read)), "".join(words(read)), 0, 0
    for text in texts:
        parts = words(text)
        asked += len(parts)
        joined = "".join(parts)
        if joined in whole and (len(joined) >= SURE or not joined.isascii()):
            right += len(parts)
            seen.subtract(part for part in parts if seen[part] > 0)
            whole = whole.replace(joined, " ", 1)  # each text that was read counts once
            continue
        for part in parts:
            if seen[part] > 0:
                seen[part] -= 1
                right += 1
    return right / asked if asked else float("nan")


def ocr() -> Ocr:
    """The measure with the first reader that is installed: RapidOCR, Tesseract, EasyOCR. Nothing is fetched.

    Raises:
        NotAtHand: none is installed, or the one that is installed does not start.
    """
    for package, make in READERS.items():
        if importlib.util.find_spec(package) and (package != "pytesseract" or shutil.which("tesseract")):
            try:
                return Ocr(make(), f"{package} {version(package)}")
            except Exception as error:  # these packages raise many kinds
                raise NotAtHand(f"{package} does not start: {first_line(error)}", HINT) from error
    raise NotAtHand("no program that reads text in pictures is installed", HINT)


HINT = "pip install rapidocr onnxruntime; or pytesseract with the program tesseract; or easyocr with its models"


def _rapidocr() -> Reader:
    import numpy
    from rapidocr import RapidOCR

    engine = RapidOCR(params={"Global.log_level": "critical"})
    return lambda image: " ".join(engine(numpy.array(image)[..., ::-1]).txts or ())  # it wants blue, green, red


def _tesseract() -> Reader:
    import pytesseract

    return pytesseract.image_to_string


def _easyocr() -> Reader:
    import numpy
    from easyocr import Reader as Engine

    engine = Engine(["en"], download_enabled=False, verbose=False)
    return lambda image: " ".join(engine.readtext(numpy.array(image), detail=0))


READERS: dict[str, Callable[[], Reader]] = {"rapidocr": _rapidocr, "pytesseract": _tesseract, "easyocr": _easyocr}
