"""The verb `serve`: its page draws what `sample` and the base's stock pipeline draw, and asks nobody else."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from conftest import command, environment
from diffusers import FluxPipeline, WanPipeline
from PIL import Image

import dcgen_convert
from dcgen_convert.bundle import sample
from dcgen_convert.bundle.manifest import read
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import InputError, ResourceError
from dcgen_convert.data import videos
from dcgen_convert.families.grid import Grid
from dcgen_convert.judging import halves
from dcgen_convert.judging import page as pages
from dcgen_convert.recipe.identity import Identity

from . import browser, video_bundles
from .video_bundles import FRAMES, HEIGHT, WIDTH

gradio_client = pytest.importorskip("gradio_client", reason="extra serve not installed")

WATCH = """
import os, sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        with open(os.environ["ADDRESSES"], "a") as file:
            print(arguments[0] if event == "socket.getaddrinfo" else arguments[1][0], file=file)
sys.addaudithook(watch)
"""
PROMPT, SEED, STEPS, GUIDANCE = "a large red circle", 7, 3, 2.5


@pytest.fixture(autouse=True, scope="module")
def kept_environment() -> Iterator[None]:
    """A page in this process sets gradio's variables. With them later tests could not start the command as a fork."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def client_of(address: str, folder: Path):
    """gradio's own client. Its answers lie in ``folder``; a busy machine is no failure."""
    return gradio_client.Client(address, verbose=False, download_files=folder, httpx_kwargs={"timeout": 300})


def pixels(file) -> numpy.ndarray:
    return numpy.asarray(Image.open(file))


@pytest.fixture(scope="module")
def expected(bundles, parts, tmp_path_factory) -> dict[str, numpy.ndarray]:
    """What `sample` draws with the bundle, and diffusers with the base."""
    call = dict(seed=SEED, steps=STEPS, guidance=GUIDANCE)
    drawn = sample.sample(bundles("flux"), [PROMPT], tmp_path_factory.mktemp("samples"), NULL, **call)
    pipeline = FluxPipeline.from_pretrained(parts("flux").source)
    side, generator = parts("flux").side, torch.Generator().manual_seed(SEED)
    settings = dict(num_inference_steps=STEPS, guidance_scale=GUIDANCE, max_sequence_length=16, generator=generator)
    base = pipeline(PROMPT, height=side, width=side, **settings)
    return {"converted": pixels(drawn["images"][0]), "base": numpy.asarray(base.images[0])}


@pytest.fixture(scope="module")
def served(bundles, parts, tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """The page of a bundle beside its base, in a process of its own: (address, the hosts that the process asks)."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "sitecustomize.py").write_text(WATCH)
    env = environment() | {"ADDRESSES": str(folder / "hosts"), "HF_HUB_OFFLINE": "0"}
    env["PYTHONPATH"] = os.pathsep.join([str(folder), env["PYTHONPATH"]])
    call = command("serve", str(bundles("flux")), "--against", str(parts("flux").source), "--port", "0", "--json")
    with open(folder / "stderr", "w") as errors:
        process = subprocess.Popen(call, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        text = ""
        while not text.endswith("}\n"):
            line = process.stdout.readline()
            assert line, (folder / "stderr").read_text()
            text += line
        document = json.loads(text)
        assert document["status"] == "running" and document["base"] == str(parts("flux").source)
        yield document["address"], folder / "hosts"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (folder / "stderr").read_text()
    finally:
        process.kill()


def asked_hosts(file: Path) -> set[str]:
    return set(file.read_text().split()) if file.exists() else set()


def test_a_client_gets_the_pixels_of_sample_and_of_the_base(served, expected, parts, tmp_path):
    address, hosts = served
    client = client_of(address, tmp_path)
    side = parts("flux").side
    fields = [PROMPT, f"{side} x {side}", SEED, STEPS, GUIDANCE, None]
    converted, told, base, base_told = client.predict(*fields, True, api_name="/draw")
    assert numpy.array_equal(pixels(converted), expected["converted"])
    assert numpy.array_equal(pixels(base), expected["base"])
    for text in (told, base_told):
        assert text.startswith(f"{side} x {side} px, {STEPS} steps, seed {SEED}: ") and float(text.split()[-2]) > 0
    alone = client.predict(*fields, False, api_name="/draw")
    assert numpy.array_equal(pixels(alone[0]), expected["converted"]) and alone[2] is None
    with pytest.raises(Exception, match=r"^steps is 2000000000$"):
        client.predict(*fields[:3], 2 * 10**9, *fields[4:], False, api_name="/draw")
    assert asked_hosts(hosts) <= {"127.0.0.1", "localhost"}


@pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium on this machine")
def test_a_browser_draws_the_same_and_asks_nobody_else(served, expected, tmp_path):
    address, hosts = served
    tab = browser.Browser(tmp_path / "profile")
    try:
        tab.open(address)
        for field, value in (("prompt textarea", PROMPT), ("seed input", SEED), ("steps input", STEPS)):
            tab.write(f"#{field}", str(value))
        tab.write("#guidance input", str(GUIDANCE))
        time.sleep(0.5)  # the page takes what is typed at the end of a pause
        tab.run("document.querySelector('#draw').click()")
        tab.until(f"document.querySelector('#base-time').innerText.includes('{STEPS} steps, seed {SEED}')")
        for half in ("converted", "base"):
            picture = tab.bytes_of(tab.until(f"document.querySelector('#{half} img')?.src"))
            assert numpy.array_equal(pixels(io.BytesIO(picture)), expected[half]), half
        tab.write("#steps input", str(2 * 10**9))
        time.sleep(0.5)
        tab.run("document.querySelector('#draw').click()")
        tab.until("document.body.innerText.includes('steps is 2000000000')")
        tab.screenshot(tmp_path / "page.png")
    finally:
        tab.close()
    elsewhere = [asked for asked in tab.requests if not asked.startswith((address, "data:", "blob:"))]
    assert len(tab.requests) > 10 and elsewhere == []
    assert asked_hosts(hosts) <= {"127.0.0.1", "localhost"}


def test_it_listens_on_this_machine_only_and_under_its_own_names(served):
    address, _ = served
    with urllib.request.urlopen(address) as answer:
        assert answer.headers["Content-Security-Policy"] == pages.POLICY and "http:" not in pages.POLICY
    stranger = urllib.request.Request(address, headers={"Host": "stranger.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(stranger)
    port = f":{int(address.rstrip('/').rpartition(':')[2]):04X}"
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    assert {place for place in listening if place.endswith(port)} == {f"0100007F{port}"}
    assert port not in Path("/proc/net/tcp6").read_text()


def test_a_model_that_edits_is_given_the_picture_that_was_uploaded(bundles, tmp_path):
    bundle = bundles("flux-kontext")
    noise = numpy.random.default_rng(0).integers(0, 255, (64, 96, 3), numpy.uint8)
    Image.fromarray(noise).save(tmp_path / "given.png")
    drawn = sample.sample(bundle, ["redder"], tmp_path / "samples", NULL, seed=3, images=[tmp_path / "given.png"])
    page = dcgen_convert.serve(bundle, port=0, quiet=True)
    try:
        assert page.base is None and page.without.startswith("the base 'org/base' is not at hand")
        client = client_of(page.address, tmp_path)
        fields = ["redder", "64 x 64", 3, 2, 3.5]
        picture, _ = client.predict(*fields, gradio_client.handle_file(tmp_path / "given.png"), False, api_name="/draw")
        assert numpy.array_equal(pixels(picture), pixels(drawn["images"][0]))
        with pytest.raises(Exception, match=r"^a flux-kontext model edits a picture, and none was given$"):
            client.predict(*fields, None, False, api_name="/draw")
    finally:
        page.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(page.address)


def test_a_port_that_is_taken_is_one_sentence(bundles):
    with pages.listening(0) as line:
        port = line.getsockname()[1]
        with pytest.raises(ResourceError) as caught:
            dcgen_convert.serve(bundles("flux"), port=port, quiet=True)
    assert caught.value.message == f"port {port} of 127.0.0.1 is taken by another program" and caught.value.hint


def test_without_gradio_it_says_what_to_install(bundles, monkeypatch):
    pages.library.cache_clear()
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match="^the page needs the package gradio, which is not installed$") as caught:
        dcgen_convert.serve(bundles("flux"), port=0, quiet=True)
    assert caught.value.hint == "pip install 'dcgen-convert[serve]'"


@pytest.mark.parametrize("name", ["wan", "wan-a14b"])
def test_videos_stand_side_by_side(name, tmp_path):
    """The bundle's is the file that `sample` writes; the base's shows what its stock pipeline draws, as far as H.264
    keeps noise. Of a model with two networks both draw, the second one with less guidance.
    """
    bundle = video_bundles.build(name, tmp_path)
    call = dict(seed=SEED, steps=2, guidance=4.0)
    (wanted,) = sample.sample(bundle, [PROMPT], tmp_path / "samples", NULL, **call)["images"]
    served = dcgen_convert.serve(bundle, against=tmp_path / "source", port=0, quiet=True)
    try:
        client = client_of(served.address, tmp_path / "answers")
        fields = [PROMPT, f"{WIDTH} x {HEIGHT}", SEED, 2, 4.0, None, True]
        converted, told, base, _ = client.predict(*fields, api_name="/draw")
    finally:
        served.close()
    files = [Path(one["video"] if isinstance(one, dict) else one) for one in (converted, base)]
    assert files[0].read_bytes() == Path(wanted).read_bytes() != files[1].read_bytes()
    assert told.startswith(f"{WIDTH} x {HEIGHT} px, 2 steps, seed {SEED}: ")
    stock = WanPipeline.from_pretrained(tmp_path / "source")
    size = dict(height=HEIGHT, width=WIDTH, num_frames=FRAMES, num_inference_steps=2, guidance_scale=4.0)
    size |= {"guidance_scale_2": 3.0} if name == "wan-a14b" else {}
    generator = torch.Generator().manual_seed(SEED)
    drawn = stock(PROMPT, **size, max_sequence_length=32, generator=generator, output_type="pt").frames[0]
    assert videos.shape(files[1]) == (WIDTH, HEIGHT, FRAMES)
    shown = videos.read(files[1], FRAMES, HEIGHT, WIDTH).mean(0)
    light = torch.stack([shown.flatten(), drawn.movedim(0, 1).mean(0).flatten()])
    assert torch.corrcoef(light)[0, 1] > 0.9


@pytest.mark.parametrize("name", ["flux", "sana", "dit"])
def test_every_size_that_is_offered_fits_and_the_first_is_the_bundle_s_own(bundles, parts, name):
    half, manifest = halves.of_bundle(bundles(name)), read(bundles(name))
    offered = halves.sizes(half, manifest)
    side = parts(name).side
    assert offered[0] == (side, side) and len(set(offered)) == len(offered)
    assert (len(offered) > 1) == (name != "dit")  # which draws one size
    for width, height in offered:
        sample.check_size(half.family, half.config, half.vae, height, width)
        assert width * height <= side**2


def test_sizes_of_a_real_model(bundles):
    half = halves.of_bundle(bundles("flux"))
    offered = halves.sizes(half, {**read(bundles("flux")), "defaults": {"width": 1024, "height": 1024}})
    assert {(1024, 1024), (1152, 864), (864, 1152), (512, 512)} <= {*offered} and len(offered) == 14
    assert all(width % 32 == height % 32 == 0 for width, height in offered)


def test_the_base_draws_what_it_was_trained_for():
    base, converted = Identity("flux-dev", offline=True), Grid(64, 128, 1)
    assert halves.size_of_base((1024, 768), base, converted) == (1024, 768)
    for size in ((4096, 4096), (4096, 2304)):
        width, height = halves.size_of_base(size, base, converted)
        assert width % 64 == height % 64 == 0 and width * height <= base.most_pixels
        assert math.isclose(width / height, size[0] / size[1], rel_tol=0.1)
