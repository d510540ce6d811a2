"""What CLIP models measure: CLIP score, PickScore (a CLIP model trained on people's choices), and CMMD."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcgen_convert.core.bars import quiet_transformers
from dcgen_convert.core.errors import AccessError, InputError
from dcgen_convert.core.files import read_object
from dcgen_convert.evaluation import preparation, weights
from dcgen_convert.evaluation.kernel import cmmd
from dcgen_convert.evaluation.measure import Distance, Score

CLIP = weights.Needed("a CLIP model", "clip", "--clip", "openai/clip-vit-large-patch14")
PICKSCORE = weights.Needed("a PickScore model", "clip", "--pickscore", "yuvalkirstain/PickScore_v1")
PICKSCORE_TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the model's repository has none of its own
TOKENS = 77  # a longer caption is cut, as the authors' code does
SIDE = 224  # px that a model takes whose config does not say it
AT_ONCE = 32  # pictures


class Tower:
    """A CLIP model that is loaded when it is used first. Several measures may share it.

    Args:
        folder: with config.json and model.safetensors.
        tokenizer: folder with the tokenizer.
    """

    def __init__(self, folder: Path, tokenizer: Path, device: str) -> None:
        self.folder, self.device, self._tokenizer_folder = folder, device, tokenizer
        self.prepared = preparation.read(folder, preparation.CLIP)
        config = read_object(folder / "config.json").get("vision_config")
        side = config.get("image_size", SIDE) if isinstance(config, dict) else SIDE
        if self.prepared.shape != (side, side):
            raise InputError(
                f"{folder} prepares pictures of another size, {self.prepared.shape}, than its model takes, {side} px",
                weights.FETCH,
            )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of its files and its tokenizer's."""
        return weights.fingerprint_of(self.folder, self._tokenizer_folder)

    @cached_property
    def model(self) -> Any:
        from transformers import CLIPModel

        return weights.load(CLIPModel, self.folder, self.device)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import CLIPTokenizer

        folder, most = self._tokenizer_folder, self.model.config.text_config.vocab_size
        try:
            with quiet_transformers():
                tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # tokenizers raises its own kinds, bare Exception among them
            reason = weights.first_line(error)
            raise InputError(f"the tokenizer in {folder} does not load: {reason}", weights.FETCH) from error
        if len(tokenizer) > most:
            raise InputError(
                f"the tokenizer in {folder} has {len(tokenizer):,} entries, but the model in {self.folder} {most:,}",
                "give a folder whose parts belong together",
            )
        return tokenizer

    @torch.no_grad()
    def of_pictures(self, pictures: Tensor) -> Tensor:
        """Embeddings of length 1, (B, D) float32 on the CPU."""
        parts = []
        for part in pictures.split(AT_ONCE):
            found = self.model.get_image_features(self.prepared(part).to(self.device)).pooler_output
            parts.append(torch.nn.functional.normalize(found.float(), dim=-1).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def of_texts(self, texts: list[str]) -> Tensor:
        """The same of texts, which are cut after TOKENS tokens."""
        length = min(TOKENS, self.model.config.text_config.max_position_embeddings)
        parts = []
        for start in range(0, len(texts), AT_ONCE):
            tokens = self.tokenizer(
                texts[start : start + AT_ONCE], padding=True, truncation=True, max_length=length, return_tensors="pt"
            ).to(self.device)
            found = self.model.get_text_features(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
            parts.append(torch.nn.functional.normalize(found.float(), dim=-1).cpu())
        return torch.cat(parts)

    def agreement(self, pictures: Tensor, captions: list[str]) -> Tensor:
        """exp(logit_scale) times the cosine of each picture and its caption, (B,) float64."""
        both = self.of_pictures(pictures).double() * self.of_texts(captions).double()
        return self.model.logit_scale.double().exp().cpu() * both.sum(-1)


class ClipScore(Score):
    """How well a picture agrees with its caption: 100 times the cosine of their CLIP embeddings (arXiv 2104.08718).

    The factor is the model's own exp(logit_scale), which is 100 for the models of OpenAI.
    """

    name = "clip"
    label = "CLIP score: agreement with the caption"

    def __init__(self, tower: Tower) -> None:
        self._tower = tower

    def made_of(self) -> str:
        return self._tower.fingerprint

    def scores(self, pictures: Tensor, captions: list[str]) -> Tensor:
        return self._tower.agreement(pictures, captions)


class PickScore(ClipScore):
    """Which of two pictures people would choose for a caption (arXiv 2305.01569). Only differences mean something."""

    name = "pickscore"
    label = "PickScore: which picture people would choose"


class Cmmd(Distance):
    """CMMD (arXiv 2401.09603): `kernel.cmmd` of CLIP's picture embeddings."""

    name = "cmmd"
    label = "CMMD: distance of two sets of pictures"

    def __init__(self, tower: Tower) -> None:
        self._tower = tower

    def made_of(self) -> str:
        return self._tower.fingerprint

    def features(self, pictures: Tensor) -> Tensor:
        return self._tower.of_pictures(pictures)

    def distance(self, a: Tensor, b: Tensor) -> float:
        return cmmd(a, b)


def clip(given: str | None, device: str, *, fetch: bool, asked: bool, recipe: bool = False) -> Tower:
    """The CLIP model that was given, or the usual one; errors as `weights.find`."""
    folder = weights.find(given, CLIP, fetch=fetch, asked=asked, recipe=recipe)
    if not _has_tokenizer(folder):
        raise InputError(f"{folder} has no tokenizer (tokenizer.json or vocab.json)", f"{CLIP.usual} has one")
    return Tower(folder, folder, device)


def pickscore(given: str | None, device: str, *, fetch: bool, asked: bool, recipe: bool = False) -> Tower:
    """The PickScore model that was given, or the usual one. Its tokenizer may lie in another repository."""
    folder = weights.find(given, PICKSCORE, fetch=fetch, asked=asked, recipe=recipe)
    tokenizer: Path | None = folder
    if not _has_tokenizer(folder):
        tokenizer = weights.cached(PICKSCORE_TOKENIZER, weights.TOKENIZER, fetch and (asked or given is not None))
    if tokenizer is None or not _has_tokenizer(tokenizer):
        kind = weights.NotAtHand if given is None else AccessError
        raise kind(
            f"{folder} has no tokenizer, and that of {PICKSCORE_TOKENIZER} is not at hand",
            f"hf download {PICKSCORE_TOKENIZER} --include '*.json' '*.txt'",
        )
    return Tower(folder, tokenizer, device)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
