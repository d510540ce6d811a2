"""The package ftfy, with which some stock pipelines clean prompts without asking whether it is there."""

from __future__ import annotations

from importlib.util import find_spec

from dcgen_convert.core.errors import ResourceError


def require_ftfy(pipeline: str) -> None:
    """ResourceError when ftfy is missing; ``pipeline`` is the class that calls it."""
    if find_spec("ftfy") is None:
        raise ResourceError(
            f"the stock {pipeline} cleans prompts with the package ftfy, which is not installed",
            "pip install 'dcgen-convert[video]'",
        )
