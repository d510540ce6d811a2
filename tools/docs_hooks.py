"""Hooks of the documentation build (mkdocs.yml): equations become MathML, and a page that needs the network fails
the build.
"""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

BLOCK = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)
INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
LOADED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\ssrc=["']?(?:https?:)?//|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preconnect|preload))[^>]*\shref=["']?(?:https?:)?//"""
)


def on_page_content(text: str, **_: object) -> str:
    """Equations as MathML, which browsers draw without any script."""
    text = BLOCK.sub(lambda found: convert(html.unescape(found[1]), display="block"), text)
    return INLINE.sub(lambda found: convert(html.unescape(found[1])), text)


def on_post_page(output: str, page: object, **_: object) -> str:
    """The page as it is.

    Raises:
        PluginError: the page loads something from another host.
    """
    if found := LOADED.search(output):
        raise PluginError(f"{page} loads from another host: {output[found.start() : found.end() + 60]}")
    return output
