"""`quantize` of a model that edits: its calibration draws edits of the pictures that it is given."""

import json
import shutil

import pytest
import torch
from bundle.conftest import flux_transformer
from conftest import run_cli
from diffusers import FluxKontextPipeline
from families.tiny_models import TINY
from safetensors.torch import load_file

from dcgen_convert.api.calls import quantisation
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import InputError
from dcgen_convert.data import edit_prompts, images
from dcgen_convert.quantization import Drawing, Request, SourceQuantisation
from dcgen_convert.svdquant.record import CALLS, read_calls

SIDE = 64


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Kontext of a width that 4-bit formats can hold."""
    folder = tmp_path_factory.mktemp("kontext") / "source"
    TINY["flux-kontext"].build(folder)
    flux_transformer(16, width=128).save_pretrained(folder / "transformer")
    return folder


@pytest.fixture
def rows(tmp_path):
    lines = []
    for number in range(3):
        pixels = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(number)) * 2 - 1
        images.write(pixels, tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": "no.png", "source": f"{number}.png", "caption": f"edit {number}"}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path / "rows.jsonl"


def request_of(source, output, **drawing):
    section = quantisation("nvfp4", 16, 3, None, "diffusers", False)
    return Request(str(source), output, section, Drawing(resolution=SIDE, steps=1, seed=3, **drawing))


def test_each_call_holds_the_reference_of_its_instruction(source, rows, tmp_path):
    """The last 256 tokens of a picture, packed by diffusers' pipeline from its own encoder: bf16 on both sides."""
    request = request_of(source, tmp_path / "q", prompts=str(rows))
    work = SourceQuantisation.of(request, NULL)
    work.prepare()
    work.record()
    (call,) = (load_file(file) for file in read_calls(request.work_folder / CALLS))
    [tokens] = [value for value in call.values() if value.shape[:2] == (3, 512)]
    pipeline = FluxKontextPipeline.from_pretrained(source)
    edits = edit_prompts.make(str(rows), None, 3, 3, most=1, folder=tmp_path, side=SIDE)
    assert sorted(edit.text for edit in edits) == ["edit 0", "edit 1", "edit 2"]
    for place, edit in enumerate(edits):
        assert edit.files[0].name == f"{edit.text.split()[1]}.png"
        with torch.no_grad():
            z = pipeline.vae.encode(images.read_pixels(edit.files[0], SIDE)[None]).latent_dist.mode()
        z = (z - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
        wanted = pipeline._pack_latents(z, 1, 4, 32, 32)[0]
        apart = [(tokens[row, 256:].float() - wanted).square().mean().item() for row in range(3)]
        assert apart[place] < 1e-3 < 10 * min(one for row, one in enumerate(apart) if row != place)

    before = work.call
    images.write(torch.zeros(3, SIDE, SIDE), rows.parent / "1.png")
    assert SourceQuantisation.of(request, NULL).call != before
    shutil.rmtree(request.work_folder)


def test_the_card_shows_edits_in_both_forms(source, rows):
    call = ["quantize", str(source), "--prompts", "rows.jsonl", "--calibration", "2", "--steps", "1", "--rank", "16"]
    done = run_cli(*call, "--resolution", str(SIDE), "-o", "q", cwd=rows.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    card = (rows.parent / "q" / "README.md").read_text()
    assert "the picture that is edited" in card and "this bundle (NVFP4)" in card


def test_what_cannot_be_edited_is_refused_and_leaves_nothing(source, rows, tmp_path):
    for given, message in (
        ({}, "nothing says how"),
        ({"prompts": "builtin"}, "builtin gives captions"),
        ({"prompts": str(rows), "sources": str(tmp_path)}, "says itself which pictures are edited"),
    ):
        request = request_of(source, tmp_path / "q", **given)
        with pytest.raises(InputError, match=message):
            SourceQuantisation.of(request, NULL).prepare()
        assert not (request.work_folder / CALLS).exists()
