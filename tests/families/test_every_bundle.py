"""What users do with the bundle of every family, over tiny pipelines with random weights: the lines of its model card
in another process, and the other stock pipelines of its kind.
"""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import diffusers
import pytest
import torch
from bundle.conftest import modules_cache  # noqa: F401 (a fixture)
from PIL import Image

from dcgen_convert.core.files import read_json
from dcgen_convert.networks import processors

from .conftest import DEEP, GUIDANCE, STEPS

DRAWER = """
import json, os, sys, warnings
results = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import numpy
warnings.filterwarnings("error", "invalid value")  # a picture that is not finite
for line in sys.stdin:
    names = {}
    try:
        exec(json.loads(line), names)
        picture = numpy.asarray(names["image"]) / 255
        found = {"size": picture.shape[:2], "std": picture.std(), "ours": any("dcgen" in name for name in sys.modules)}
    except Exception as error:
        found = {"error": repr(error)}
    print(json.dumps(found), file=results, flush=True)
"""


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """draw(code) -> what a process draws with it that knows diffusers and nothing of this package."""
    folder = tmp_path_factory.mktemp("stranger")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(folder)}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with subprocess.Popen([sys.executable, "-c", DRAWER], cwd=folder, env=env, **pipes) as child:

        def draw(code: str) -> dict:
            print(json.dumps(code), file=child.stdin, flush=True)
            return json.loads(child.stdout.readline())

        Image.new("RGB", (40, 30), "teal").save(folder / "picture.png")  # what the card's lines edit
        yield draw
        child.stdin.close()


@pytest.mark.parametrize("converted", DEEP[:2], indirect=True, ids=["f32", "f64"])
def test_the_lines_of_the_model_card_draw_in_a_fresh_process(tiny, converted, bundle, stranger):
    lines = re.search(r"```python\n(.*?)```", (bundle / "README.md").read_text(), re.DOTALL)[1]
    assert lines.count("from_pretrained(") == 1
    if (bundle / processors.NAME).exists() and find_spec("torchvision") is None:
        pytest.skip("the stock class of the processor needs torchvision")
    here = {
        f'"{bundle.name}"': repr(str(bundle)),
        '.to("cuda")': "",
        "torch.bfloat16": "torch.float32",
    }  # this machine has no GPU
    for old, new in here.items():
        lines = lines.replace(old, new)
    found = stranger(lines)
    side = converted[0].side
    assert found.get("size") == [side, side] and found["std"] > 1e-3 and not found["ours"], found


SIBLINGS = {  # other stock pipelines of the families' models, by what they do
    "flux": ("Img2Img", "Inpaint"),
    "flux-kontext": ("Inpaint",),
    "sd3": ("Img2Img", "Inpaint"),
    "zimage": ("Img2Img", "Inpaint"),
    "chroma": ("Img2Img", "Inpaint"),
    "qwenimage": ("Img2Img", "Inpaint"),
    "qwenimage-edit": ("Inpaint",),
    "flux2-klein": ("Inpaint",),
    "sana-sprint": ("Img2Img",),
    "unet": ("Img2Img", "Inpaint"),
    "unet-xl": ("Img2Img", "Inpaint"),
}
LOADS_ONLY = {
    # They ask a stock AutoencoderDC for a name that it does not have.
    ("sd3", "Img2Img"),
    ("sd3", "Inpaint"),
    # It edits a reference, and takes the channels in the autoencoder's config for those of
    # its latent.
    ("flux2-klein", "Inpaint"),
    # diffusers 0.42 asks the transformer for FLUX.1's guidance_embeds, which no Chroma has: it cannot draw with the
    # base model either.
    ("chroma", "Inpaint"),
    # It asks a stock AutoencoderDC for a name that it does not have.
    ("sana-sprint", "Img2Img"),
    # It draws in the size of its picture alone, which must be a PIL image.
    ("qwenimage-edit", "Inpaint"),
    # They take 4 latent channels, or 9 with mask and picture.
    ("unet", "Inpaint"),
    ("unet-xl", "Inpaint"),
}


@pytest.mark.parametrize("converted", DEEP[:1], indirect=True)
def test_img2img_and_inpainting_load_where_stock_ones_exist(tiny, source, converted, bundle):
    """And draw, unless `LOADS_ONLY` says why not."""
    (name, entry), parts, family = tiny, converted[0], source.family
    name = name.removesuffix("-edits")
    stock = source.index["_class_name"].removesuffix("Pipeline")
    assert SIBLINGS.get(name, ()) == tuple(
        task for task in ("Img2Img", "Inpaint") if hasattr(diffusers, f"{stock}{task}Pipeline")
    )
    for task in SIBLINGS.get(name, ()):
        own = processors.without_torchvision(bundle, read_json(bundle / "model_index.json"))
        pipeline = getattr(diffusers, f"{stock}{task}Pipeline").from_pretrained(
            bundle, trust_remote_code=family.bundle_tier == 2, **own
        )
        if (name, task) not in LOADS_ONLY:
            settings = dict(height=parts.side, width=parts.side, steps=STEPS, guidance=GUIDANCE, length=entry.length)
            call = family.pipeline_call(pipeline, [entry.prompt], **settings)
            call |= {"image": torch.rand(1, 3, parts.side, parts.side), "strength": 0.9}
            if task == "Inpaint":
                call["mask_image"] = torch.ones(1, 1, parts.side, parts.side)
            pixels = pipeline(**call, output_type="pt").images
            assert (
                pixels.shape[-2:] == (parts.side, parts.side) and torch.isfinite(pixels).all() and pixels.std() > 1e-3
            )
