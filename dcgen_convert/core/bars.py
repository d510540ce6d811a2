"""Bars and warnings of transformers and diffusers, hidden for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any


@contextmanager
def quieted(logging: Any) -> Iterator[None]:
    """Hide bars and warnings. logging: ``utils.logging`` of transformers or of diffusers."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def quiet_transformers() -> AbstractContextManager[None]:
    """Hide the bars and the reports of transformers: what matters in them is told as an error."""
    from transformers.utils import logging

    return quieted(logging)
