"""FID: the Frechet distance of Inception's features, through the package torch-fidelity (extra `eval`)."""

from __future__ import annotations

import os
import pickle
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from dcgen_convert.core.errors import AccessError, InputError
from dcgen_convert.core.files import sha256
from dcgen_convert.evaluation.measure import Distance
from dcgen_convert.evaluation.metrics import frechet
from dcgen_convert.evaluation.pixels import to_uint8
from dcgen_convert.evaluation.weights import NotAtHand, first_line, setting_of

OPTION = "--inception"
FILE = "weights-inception-2015-12-05-6726825d.pth of the release v0.2.0 of toshas/torch-fidelity on GitHub"
AT_ONCE = 32  # pictures


class Fid(Distance):
    """FID (arXiv 1706.08500): Frechet distance of the 2,048 features before Inception's last layer."""

    name = "fid"
    label = "FID"

    def __init__(self, file: Path, device: str, option: str = OPTION) -> None:
        self._file, self._device, self._option = file, device, option

    @cached_property
    def _model(self) -> Any:
        with TemporaryDirectory() as folder:  # the package reads any pickle: it is given a file that holds tensors only
            clean = Path(folder) / "inception.pth"
            torch.save(_tensors(self._file, self._option), clean)
            try:
                model = _extractor()("inception", ["2048"], feature_extractor_weights_path=str(clean))
            except RuntimeError as error:
                raise InputError(
                    f"{self._file}, which {self._option} names, holds other tensors than Inception: "
                    f"{first_line(error)}",
                    f"give {FILE}",
                ) from error
        return model.to(self._device)

    def made_of(self) -> str:
        return sha256(self._file)

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        parts = (to_uint8(part).to(self._device) for part in pictures.split(AT_ONCE))
        return torch.cat([self._model(part)[0].float().cpu() for part in parts])

    def distance(self, a: Tensor, b: Tensor) -> float:
        return frechet(a, b)


def fid(given: str | None, device: str, *, recipe: bool = False) -> Fid:
    """The measure with the weights file that was given. Nothing is ever fetched.

    Args:
        recipe: errors name the setting of the recipe, not the option of the command line.
    Raises:
        NotAtHand: no file was given.
        AccessError: torch-fidelity is not installed, or cannot be imported.
        InputError: the file does not exist.
    """
    option = setting_of(OPTION) if recipe else OPTION
    if given is None:
        with_it = f"--set {option}=FILE" if recipe else f"{option} FILE"
        raise NotAtHand("there are no weights of Inception at hand", f"give {FILE} with {with_it}")
    path = Path(os.path.expanduser(given))
    if not path.is_file():
        raise InputError(f"{given}, which {option} names, is no file", f"give {FILE}")
    _extractor()
    return Fid(path, device, option)


def _extractor() -> Any:
    """The package's class. It is imported with torchvision, whose version must be that of torch."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError, OSError) as error:
        raise AccessError(
            f"fid needs the packages torch-fidelity and torchvision: {first_line(error)}",
            "pip install 'dcgen-convert[eval]'",
        ) from error
    return FeatureExtractorInceptionV3


def _tensors(file: Path, option: str = OPTION) -> dict[str, Tensor]:
    """Name -> tensor, of a weights file. A pickle is read as tensors alone; InputError where it holds more."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        raise InputError(f"{file}, which {option} names, is no file of weights", f"give {FILE}") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"{file}, which {option} names, holds more than tensors", f"give {FILE}")
    return found
