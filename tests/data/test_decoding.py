"""Pictures as every viewer shows them, and damaged files as one sentence.

References: plain pictures of the same scene, little CMS by hand for profiles, Pillow's function for the orientation.
"""

import io
import os
import struct
import warnings
import zlib

import numpy
import pytest
from PIL import Image, ImageCms, ImageDraw, ImageOps, PngImagePlugin

from dcgen_convert.core.errors import InputError
from dcgen_convert.data import decoding, images


def scene(mode="RGB", size=(40, 24)) -> Image.Image:
    """Neither its sides nor its corners look alike."""
    image = Image.new("RGB", size, (200, 90, 30))
    draw = ImageDraw.Draw(image)
    draw.rectangle([2, 2, 12, 8], fill=(20, 60, 220))
    draw.ellipse([20, 10, 36, 20], fill=(240, 230, 40))
    return image.convert(mode)


def apart(a: Image.Image, b: Image.Image) -> int:
    """Largest difference in grey levels."""
    assert a.mode == b.mode == "RGB" and a.size == b.size
    return int(numpy.abs(numpy.asarray(a, int) - numpy.asarray(b, int)).max())


def decoded(image: Image.Image, path, **options) -> Image.Image:
    image.save(path, **options)
    return decoding.decode(path)[0]


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation, suffix, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if suffix in ("jpg", "webp", "avif") else {}
    path = tmp_path / f"x.{suffix}"
    shown = decoded(scene(), path, exif=exif.tobytes() if suffix != "tif" else exif, **options)
    with Image.open(path) as image:
        reference = ImageOps.exif_transpose(image).convert("RGB")
    assert apart(shown, reference) == 0
    assert images.size_of(path) == shown.size == ((24, 40) if orientation > 4 else (40, 24))


def test_damaged_exif_data_are_no_damaged_picture(tmp_path):
    reference = decoded(scene(), tmp_path / "a.jpg")
    scene().save(tmp_path / "b.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert apart(decoding.decode(tmp_path / "b.jpg")[0], reference) == 0


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "jp2"])
def test_sixteen_bits_of_grey_are_divided(suffix, tmp_path):
    grey = scene("L")
    deep = Image.fromarray(numpy.asarray(grey).astype("uint16") * 257)
    assert apart(decoded(deep, tmp_path / f"x.{suffix}"), grey.convert("RGB")) == 0


def test_transparent_sixteen_bits_of_grey(tmp_path):
    values = numpy.full((8, 8), 30_000, "uint16")
    values[:, :4] = 7
    shown = decoded(Image.fromarray(values), tmp_path / "x.png", transparency=7)
    assert numpy.asarray(shown)[0, 0].tolist() == [255] * 3 and numpy.asarray(shown)[0, 7].tolist() == [117] * 3


@pytest.mark.parametrize("mode", ["I", "F"])
def test_grey_without_a_known_white_is_refused(mode, tmp_path):
    scene("L").convert(mode).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match=r"x.tif cannot be read: .*nothing says what white is"):
        decoding.decode(tmp_path / "x.tif")


@pytest.mark.parametrize(
    "mode, suffix", [("RGBA", "png"), ("LA", "png"), ("PA", "png"), ("RGBA", "webp"), ("RGBA", "tif")]
)
def test_hidden_colours_are_not_seen(mode, suffix, tmp_path):
    """Half of it is transparent, half of the rest is half so; below lies noise."""
    image = scene("L" if mode == "LA" else "RGB")
    pixels = numpy.asarray(image.convert("RGBA")).copy()
    pixels[:, :20, :3] = numpy.random.default_rng(0).integers(0, 255, (24, 20, 1))
    pixels[:, :20, 3], pixels[:12, 20:, 3] = 0, 128
    image = Image.fromarray(pixels).convert("LA" if mode == "LA" else "RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    image = image.quantize(method=Image.Quantize.FASTOCTREE) if mode == "PA" else image
    image.save(tmp_path / f"x.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    shown, notes = decoding.decode(tmp_path / f"x.{suffix}")
    assert apart(shown, white.convert("RGB")) <= (40 if mode == "PA" else 1)  # a palette has 256 colours
    assert numpy.asarray(shown)[:, :20].min() == 255 and notes == [decoding.TRANSPARENT]


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P"])
def test_one_transparent_colour(mode, tmp_path):
    image = Image.new(mode, (8, 8), 0)
    shown = decoded(image, tmp_path / "x.png", transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert numpy.asarray(shown).min() == 255


def test_an_opaque_picture_is_not_called_transparent(tmp_path):
    scene("RGBA").save(tmp_path / "x.png")
    assert decoding.decode(tmp_path / "x.png")[1] == []


def swapped() -> bytes:
    """The profile of sRGB with red and blue exchanged; its description still says sRGB."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for i in range(struct.unpack(">I", profile[128:132])[0]):
        tag = bytes(profile[132 + 12 * i : 136 + 12 * i])
        profile[132 + 12 * i : 136 + 12 * i] = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}.get(tag, tag)
    return bytes(profile)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_colour_profiles(mode, tmp_path):
    image = scene(mode)
    there = ImageCms.ImageCmsProfile(io.BytesIO(swapped()))
    srgb = ImageCms.createProfile("sRGB")
    reference = ImageCms.profileToProfile(image.convert("RGB"), there, srgb, outputMode="RGB")
    assert apart(decoded(image, tmp_path / "x.png", icc_profile=swapped()), reference) == 0
    plain = ImageCms.ImageCmsProfile(srgb).tobytes()
    assert apart(decoded(image, tmp_path / "y.png", icc_profile=plain), image.convert("RGB")) == 0


@pytest.mark.parametrize("mode, profile", [("RGB", b"no profile"), ("CMYK", swapped())])
def test_a_profile_that_does_not_fit_is_left_alone_and_told(mode, profile, tmp_path):
    scene(mode).save(tmp_path / "x.jpg", icc_profile=profile)
    shown, notes = decoding.decode(tmp_path / "x.jpg")
    assert notes == [decoding.PROFILE] and apart(shown, decoded(scene(mode), tmp_path / "plain.jpg")) == 0


def stated_colours(**chunks: bytes) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    for kind, data in chunks.items():
        info.add(kind.encode(), data)
    return info


GAMMA, LINEAR = (45_455).to_bytes(4), (100_000).to_bytes(4)
P3 = struct.pack(">8I", 31_270, 32_900, 68_000, 32_000, 26_500, 69_000, 15_000, 6_000)
BT709 = struct.pack(">8I", 31_270, 32_900, 64_000, 33_000, 30_000, 60_000, 15_000, 6_000)


@pytest.mark.parametrize(
    "chunks, before, after",
    [
        ({"gAMA": GAMMA}, (200, 90, 30), (200, 90, 30)),
        ({"gAMA": GAMMA, "cHRM": BT709}, (200, 90, 30), (200, 90, 30)),
        ({"cHRM": P3}, (234, 51, 35), (234, 51, 35)),  # without gAMA nobody heeds it
        ({"gAMA": LINEAR}, (128, 0, 255), (188, 0, 255)),  # .5 of the light is 188 in sRGB
        ({"gAMA": LINEAR, "sRGB": b"\0"}, (128, 0, 255), (128, 0, 255)),
        ({"gAMA": GAMMA, "cHRM": P3}, (234, 51, 35), (255, 0, 0)),  # sRGB's red in the primaries of Display P3
        ({"cICP": bytes([12, 13, 0, 1]), "gAMA": LINEAR}, (234, 51, 35), (255, 0, 0)),
        ({"cICP": bytes([1, 13, 0, 1]), "gAMA": LINEAR}, (128, 0, 255), (128, 0, 255)),
        ({"cICP": bytes([1, 8, 0, 1])}, (128, 0, 255), (188, 0, 255)),
    ],
    ids=str,
)
def test_a_png_may_state_its_colours_in_chunks(chunks, before, after, tmp_path):
    shown = decoded(Image.new("RGB", (3, 2), before), tmp_path / "x.png", pnginfo=stated_colours(**chunks))
    assert apart(shown, Image.new("RGB", (3, 2), after)) <= (0 if before == after else 4)


@pytest.mark.parametrize("transfer, word", [(16, "HDR picture .PQ"), (18, "HDR picture .HLG"), (11, "not known here")])
def test_a_png_with_a_brightness_beyond_srgb_is_left_out(transfer, word, tmp_path):
    scene().save(tmp_path / "x.png", pnginfo=stated_colours(cICP=bytes([9, transfer, 0, 1])))
    with pytest.raises(InputError, match=word):
        decoding.decode(tmp_path / "x.png")


@pytest.mark.parametrize("suffix", ["bmp", "tif", "gif", "avif", "jp2", "ppm", "tga", "qoi", "webp", "jpeg", "png"])
def test_formats(suffix, tmp_path):
    if f".{suffix}" not in Image.registered_extensions() or f".{suffix}" not in decoding.suffixes():
        pytest.skip(f"this Pillow cannot read {suffix}")
    shown = decoded(scene(), tmp_path / f"x.{suffix}")
    assert numpy.abs(numpy.asarray(shown, int) - numpy.asarray(scene(), int)).mean() < 12


def test_the_first_frame_is_used_and_told(tmp_path):
    scene().save(tmp_path / "x.gif", save_all=True, append_images=[Image.new("RGB", (40, 24))])
    shown, notes = decoding.decode(tmp_path / "x.gif")
    assert notes == [decoding.FRAMES] and apart(shown, scene()) < 40


def huge(side: int) -> bytes:
    """A small PNG file of side^2 black pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side // 8 + 1) * 8))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def of(format: str) -> bytes:
    file = io.BytesIO()
    scene().save(file, format)
    return file.getvalue()


BROKEN = {
    "bomb.png": lambda: huge(20_000),
    "cut.avif": lambda: cut(of("AVIF")),
    "cut.jpg": lambda: cut(of("JPEG")),
    "cut.gif": lambda: cut(of("GIF")),
    "cut.tif": lambda: cut(of("TIFF")),
    "cut.webp": lambda: cut(of("WEBP")),
    "empty.png": lambda: b"",
    "text.jpg": lambda: b"<html>404</html>",
    "script.png": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_sentence_with_its_name(name, tmp_path):
    (tmp_path / name).write_bytes(BROKEN[name]())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=rf"{name} cannot be read: ."):
            images.read_pixels(tmp_path / name, 8)


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, MemoryError, struct.error, KeyError, EOFError])
def test_whatever_a_decoder_raises_names_the_file(error, tmp_path):
    scene().save(tmp_path / "x.png")
    with pytest.raises(InputError, match=r"x.png cannot be read"), decoding.opened(tmp_path / "x.png"):
        raise error
    with pytest.raises(KeyboardInterrupt), decoding.opened(tmp_path / "x.png"):
        raise KeyboardInterrupt


def test_no_file_and_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "folder.png").mkdir()
    for name, reason in (("pipe", "no regular file"), ("link", "does not exist"), ("folder", "no regular file")):
        with pytest.raises(InputError, match=rf"{name}.png cannot be read: it .*{reason}"):
            images.size_of(tmp_path / f"{name}.png")
