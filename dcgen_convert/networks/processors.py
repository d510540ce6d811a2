"""The part of a pipeline that prepares pictures for a text encoder which sees them.

transformers reads the processor of Qwen2-VL with torchvision alone, because of its half for videos. Without that
package the half for pictures does the same work with Pillow.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dcgen_convert.core.files import write_json

VIDEO_FILE = "video_preprocessor_config.json"
NAME, KIND = "processor", "Qwen2VLProcessor"


def without_torchvision(root: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """{"processor": one for pictures alone} of the pipeline folder ``root``, for `from_pretrained`; {} where the stock
    one loads, or there is none.

    Args:
        index: its model_index.json.
    """
    if index.get(NAME) != ["transformers", KIND] or find_spec("torchvision") is not None:
        return {}
    return {NAME: for_pictures().from_pretrained(root / NAME, local_files_only=True)}


@cache
def for_pictures() -> Any:
    """The class of the processor without its half for videos."""
    import transformers

    class Qwen2VLProcessor(transformers.Qwen2VLProcessor):
        __module__ = transformers.Qwen2VLProcessor.__module__  # what is saved names the class that it stands for

        def __init__(
            self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **_: Any
        ) -> None:
            super(transformers.Qwen2VLProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)
            for kind in ("image", "video"):
                token = getattr(tokenizer, f"{kind}_token", None) or f"<|{kind}_pad|>"
                setattr(self, f"{kind}_token", token)
                setattr(self, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(token))

        def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> Any:
            """As in transformers, and what the whole class asks for where there is torchvision."""
            found = super().save_pretrained(save_directory, *args, **options)
            write_json(Path(save_directory) / VIDEO_FILE, {"video_processor_type": "Qwen2VLVideoProcessor"})
            return found

    return Qwen2VLProcessor
