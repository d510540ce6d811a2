"""What the licences of known models say about pictures that they draw and models that are made from them.

A short reading of texts that their authors may change, and no legal advice. A licence that is not here is unknown.
"""

from __future__ import annotations

from dataclasses import dataclass

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Terms:
    """outputs: may pictures of the model train another one? derived: may a converted model be published, and sold?

    url: the text itself.
    """

    outputs: str
    derived: str
    url: str


_FREE = "no limit on what drawn pictures are used for"
_NOTICE = "may be published and used commercially, with the licence and a note of the changes"
_RAIL = Terms(
    "may train another model, which then counts as derived",
    "may be published and used commercially, with the same limits of use passed on",
    "https://huggingface.co/spaces/CompVis/stable-diffusion-license",
)

TERMS = {
    "apache-2.0": Terms(_FREE, _NOTICE, "https://www.apache.org/licenses/LICENSE-2.0"),
    "mit": Terms(
        _FREE,
        "may be published and used commercially, with the licence and the copyright notice",
        "https://opensource.org/license/mit",
    ),
    "cc-by-nc-4.0": Terms(
        "the licence does not name them; the model itself may be used for non-commercial purposes only",
        "may be published with attribution, for non-commercial purposes only",
        "https://creativecommons.org/licenses/by-nc/4.0/legalcode",
    ),
    "flux-1-dev-non-commercial-license": Terms(
        "must not train, fine-tune or distil a model that competes with FLUX.1 [dev]",
        "may be published under the same licence, for non-commercial purposes only; commercial use needs another "
        "licence from Black Forest Labs",
        "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
    ),
    "stabilityai-ai-community": Terms(
        "must not create or improve a foundational model, other than this one and those derived from it",
        "may be published with the licence and its attribution; commercial use is free below 1 million US dollars of "
        "yearly revenue",
        "https://stability.ai/community-license-agreement",
    ),
    "creativeml-openrail-m": _RAIL,
}
DECLARED = {  # hub id -> licence, as declared when this was written
    "Qwen/Qwen-Image": "apache-2.0",
    "Qwen/Qwen-Image-Edit": "apache-2.0",
    "Qwen/Qwen-Image-Edit-2509": "apache-2.0",
    "Qwen/Qwen-Image-Edit-2511": "apache-2.0",
    "fal/AuraFlow-v0.3": "apache-2.0",
    "Alpha-VLLM/Lumina-Image-2.0": "apache-2.0",
    "lodestones/Chroma1-HD": "apache-2.0",
    "stabilityai/stable-diffusion-3-medium-diffusers": "stabilityai-ai-community",
    "stabilityai/stable-diffusion-3.5-medium": "stabilityai-ai-community",
    "stabilityai/stable-diffusion-3.5-large": "stabilityai-ai-community",
}
