"""Videos as every player shows them, and damaged files as one sentence.

References: the pixels that were written, the matrices of BT.601 and BT.709 by hand, `fitted` of every frame.
"""

import builtins
import math
from fractions import Fraction

import av
import numpy
import pytest
import torch
from PIL import Image

from dcgen_convert.core.errors import InputError, ResourceError
from dcgen_convert.core.pixels import to_image
from dcgen_convert.data import images, videos


def noise(frames=6, height=24, width=40, seed=0) -> torch.Tensor:
    """(3, F, H, W) at the 256 values of 8 bits: no two frames and no two corners look alike."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, frames, height, width), generator=generator) / 127.5 - 1


def moving(frames=9, height=48, width=64) -> torch.Tensor:
    """Smooth pixels, which H.264 keeps nearly as they are."""
    y, x = torch.meshgrid(torch.linspace(-2, 2, height), torch.linspace(-2, 2, width), indexing="ij")
    pictures = [torch.stack([(x + i / 9).sin(), (y - i / 9).cos(), (x * y / 2).sin()]) for i in range(frames)]
    return torch.stack(pictures, dim=1) * 0.8


def encode(path, arrays, kind="rgb24", *, codec="ffv1", held="bgr0", container="matroska", **context):
    """A file of frames (H, W, 3) uint8, or of planes, as another program would write it."""
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=8)
        shown = [av.VideoFrame.from_ndarray(numpy.ascontiguousarray(array), format=kind) for array in arrays]
        stream.width, stream.height, stream.pix_fmt = shown[0].width, shown[0].height, held
        rotation = context.pop("rotation", 0)
        for key, value in context.items():
            setattr(stream.codec_context, key, value)
        if rotation:
            stream.set_display_rotation(rotation)
        for frame in shown:
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def bytes_of(pixels) -> list[numpy.ndarray]:
    return [numpy.asarray(to_image(picture)) for picture in pixels.unbind(1)]


def test_a_lossless_file_gives_every_value_back(tmp_path):
    pixels = noise()
    videos.write(pixels, tmp_path / "a.mkv", 16)
    videos.write(pixels, tmp_path / "b.mkv", fps=16)
    assert (tmp_path / "a.mkv").read_bytes() == (tmp_path / "b.mkv").read_bytes()
    torch.testing.assert_close(videos.read(tmp_path / "a.mkv", 6, 24, 40), pixels, atol=1e-6, rtol=0)
    assert torch.equal(videos.read(tmp_path / "a.mkv", 4, 24, 40), videos.read(tmp_path / "a.mkv", 6, 24, 40)[:, :4])
    assert videos.shape(tmp_path / "a.mkv") == (40, 24, 6) and videos.shape(tmp_path / "a.mkv", most=3)[2] == 3
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.mkv", "b.mkv"]
    with av.open(str(tmp_path / "a.mkv")) as file:
        assert file.streams.video[0].average_rate == 16


def test_frames_are_cropped_and_resized_as_pictures_are(tmp_path):
    pixels, size = noise(3, 90, 60), (16, 24)
    videos.write(pixels, tmp_path / "a.mkv", 16)
    wanted = torch.stack([images.fitted(to_image(picture), *size) for picture in pixels.unbind(1)], dim=1)
    small, square = videos.read_sizes(tmp_path / "a.mkv", 3, [size, (32, 32)])
    assert torch.equal(small, wanted) and square.shape == (3, 3, 32, 32)
    assert torch.equal(square, videos.read(tmp_path / "a.mkv", 3, 32, 32))


def test_a_folder_of_frames_is_a_video(tmp_path):
    pixels = noise(11)
    for number, picture in enumerate(pixels.unbind(1)):
        images.write(picture, tmp_path / f"frame-{number}.png")  # 10 comes after 9, not after 1
    torch.testing.assert_close(videos.read(tmp_path, 11, 24, 40), pixels, atol=1e-6, rtol=0)
    assert videos.shape(tmp_path) == (40, 24, 11)
    names = [file.name for file in tmp_path.iterdir()]
    assert videos.is_frames([*names, "notes.txt"]) and not videos.is_frames([*names, "fox.png"])
    assert not videos.is_frames(["notes.txt"])
    (tmp_path / "frame-5.png").unlink()
    with pytest.raises(InputError, match="no frames with numbers that follow one another"):
        videos.read(tmp_path, 4, 24, 40)


@pytest.mark.parametrize("stated", [None, 1, 6])
@pytest.mark.parametrize("size", [(48, 64), (48, 1280), (578, 64)])
def test_colours_follow_the_matrix_that_the_file_states_or_the_one_that_players_take(stated, size, tmp_path):
    """A plain colour in every frame: Y'CbCr of 8 bits, limited range, by the equations of both recommendations."""
    planes = numpy.stack([numpy.full(size, value, numpy.uint8) for value in (120, 90, 170)])
    context = {} if stated is None else {"colorspace": stated}
    encode(tmp_path / "a.mkv", [planes] * 2, "yuv444p", held="yuv444p", **context)
    high = size[1] >= 1280 or size[0] > 576
    red, blue = (0.2126, 0.0722) if stated == 1 or (stated is None and high) else (0.299, 0.114)
    light, u, v = (120 - 16) / 219, (90 - 128) / 224, (170 - 128) / 224
    r, b = light + 2 * (1 - red) * v, light + 2 * (1 - blue) * u
    g = (light - red * r - blue * b) / (1 - red - blue)
    found = videos.read(tmp_path / "a.mkv", 2, *size)[:, :, 5, 7]
    torch.testing.assert_close((found + 1) / 2, torch.tensor([r, g, b])[:, None].expand(3, 2), atol=1.01 / 255, rtol=0)


@pytest.mark.parametrize("angle", [90, 180, -90])
def test_a_turned_video_is_shown_upright(angle, tmp_path):
    pixels = moving(3)
    encode(tmp_path / "a.mp4", bytes_of(pixels), codec="libx264", held="yuv444p", container="mp4", rotation=angle)
    turned = torch.rot90(pixels, angle // 90, dims=(2, 3))
    assert videos.shape(tmp_path / "a.mp4") == (turned.shape[3], turned.shape[2], 3)
    assert (videos.read(tmp_path / "a.mp4", 3, *turned.shape[2:]) - turned).abs().mean() < 0.03


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    pixels = moving(2)
    options = dict(codec="libx264", held="yuv444p", container="mp4", sample_aspect_ratio=2)
    encode(tmp_path / "a.mp4", bytes_of(pixels), **options)
    assert videos.shape(tmp_path / "a.mp4") == (128, 48, 2)


def test_what_people_look_at(tmp_path):
    pixels = moving(9, 47, 63)
    videos.write_mp4(pixels, tmp_path / "a.mp4", fps=8)
    assert videos.shape(tmp_path / "a.mp4") == (64, 48, 9)
    found = videos.read(tmp_path / "a.mp4", 9, 48, 64)[:, :, :47, :63]
    assert (found - pixels).abs().mean() < 0.03
    with av.open(str(tmp_path / "a.mp4")) as file:
        stream = file.streams.video[0]
        assert stream.average_rate == 8 and stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p" and stream.codec_context.colorspace == 1


@pytest.mark.parametrize("own", [16, 24, 30, Fraction(30000, 1001), 32, 60, 15, 17])
@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_of_a_file_with_more_frames_a_second_the_nearest_in_time_are_read(own, suffix, tmp_path):
    """By hand: the frame of the file that is shown nearest to each moment of the model's 16 a second. 15 and 17 are
    taken for 16.
    """
    pixels, file = noise(25, 32, 32), tmp_path / f"a.{suffix}"
    (videos.write if suffix == "mkv" else videos.write_mp4)(pixels, file, float(own))
    every = videos.read(file, 25, 32, 32)
    _, _, count = videos.shape(file, fps=16)
    found = videos.read(file, count, 32, 32, fps=16)
    for place in range(count):
        apart = (every - found[:, place, None]).abs().amax((0, 2, 3))
        number = apart.argmin().item()
        assert apart[number] == 0 and apart.sort().values[1] > 0
        rate = 16 if own in (15, 17) else own
        assert abs(number / rate - place / 16) <= 0.5 / rate + 1e-9
    length = 24 if own in (15, 17) else 24 * 16 / own
    assert count == 1 + math.floor(length + 0.5 * 16 / (16 if own in (15, 17) else own) - 1e-9)
    assert videos.shape(file, most=3, fps=16)[2] == 3
    with pytest.raises(InputError, match=rf"a.{suffix} has {count} frames, and {count + 1} are needed"):
        videos.read(file, count + 1, 32, 32, fps=16)


def test_a_file_with_fewer_frames_a_second_is_refused(tmp_path):
    videos.write(noise(5), tmp_path / "a.mkv", 8)
    for look in (
        lambda: videos.shape(tmp_path / "a.mkv", fps=16),
        lambda: videos.read(tmp_path / "a.mkv", 2, 8, 8, 16),
    ):
        with pytest.raises(InputError, match="it has 8 frames a second, and the model draws 16"):
            look()
    for number, picture in enumerate(noise(3).unbind(1)):
        images.write(picture, tmp_path / f"frame-{number}.png")
    assert videos.shape(tmp_path, fps=16)[2] == 3  # a folder says no rate


def test_a_video_that_is_too_short_is_never_filled_up(tmp_path):
    videos.write(noise(5), tmp_path / "a.mkv", 16)
    with pytest.raises(InputError, match=r"a.mkv has 5 frames, and 6 are needed"):
        videos.read(tmp_path / "a.mkv", 6, 24, 40)


def test_damage_is_one_sentence(tmp_path, capfd):
    """With MPEG-4 part 2: x264 does not give the same bytes each time."""
    made = encode(tmp_path / "a.mp4", bytes_of(moving(24)), codec="mpeg4", held="yuv420p", container="mp4")
    data = made.read_bytes()
    for name, broken in {
        "half.mp4": data[: len(data) // 2],
        "flipped.mp4": data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0x55]) + data[len(data) // 2 + 1 :],
        "text.mp4": b"this is no video" * 99,
        "empty.webm": b"",
        "picture.mkv": data,
        "a.avi": data,
    }.items():
        (tmp_path / name).write_bytes(broken)
        for look in (lambda file: videos.read(file, 24, 48, 64), videos.shape):
            if name == "flipped.mp4" and look == videos.shape:
                continue  # its first frame may be whole
            with pytest.raises(InputError, match=f"the video .*{name} cannot be read: .") as caught:
                look(tmp_path / name)
            assert "\n" not in caught.value.message and "Errno" not in caught.value.message
    for missing in (tmp_path / "no.mp4", tmp_path / "none"):
        with pytest.raises(InputError, match="it does not exist"):
            videos.read(missing, 1, 8, 8)
    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(numpy.zeros((1, 1024), "float32"), "fltp", "mono")
        silence.sample_rate = 8000
        file.mux(stream.encode(silence))
        file.mux(stream.encode())
    with pytest.raises(InputError, match="no pictures, only other streams"):
        videos.shape(tmp_path / "sound.mp4")
    assert capfd.readouterr() == ("", "")


def test_one_changed_byte_of_a_lossless_file_is_noticed(tmp_path):
    file = tmp_path / "a.mkv"
    videos.write(noise(), file, 16)
    data = file.read_bytes()
    assert videos.is_whole(file)
    file.write_bytes(bytes([*data[: len(data) // 2], data[len(data) // 2] ^ 1, *data[len(data) // 2 + 1 :]]))
    assert not videos.is_whole(file)
    file.write_bytes(data[: len(data) * 2 // 3])
    assert not videos.is_whole(file)
    encode(file, bytes_of(noise()))
    assert not videos.is_whole(file)  # another program's


def test_a_video_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    videos.write(noise(2, 30, 50), tmp_path / "a.mkv", 16)
    monkeypatch.setattr(videos, "MOST_PIXELS", 1000)
    for look in (lambda file: videos.read(file, 2, 8, 8), videos.shape):
        with pytest.raises(InputError, match="a.mkv cannot be read"):
            look(tmp_path / "a.mkv")


def test_pixels_of_an_odd_shape_count_as_they_are_shown(tmp_path, monkeypatch):
    options = dict(codec="libx264", held="yuv444p", container="mp4", sample_aspect_ratio=20)
    encode(tmp_path / "a.mp4", bytes_of(moving(1)), **options)
    monkeypatch.setattr(videos, "MOST_PIXELS", 10_000)
    with pytest.raises(InputError, match="a frame has 1280 x 48 px, and at most 10,000 are read"):
        videos.shape(tmp_path / "a.mp4")


def test_hdr_is_refused(tmp_path):
    encode(tmp_path / "a.mkv", [numpy.full((3, 8, 8), 90, numpy.uint8)], "yuv444p", held="yuv444p", color_trc=16)
    with pytest.raises(InputError, match="it is HDR"):
        videos.read(tmp_path / "a.mkv", 1, 8, 8)


def test_without_pyav_the_sentence_says_what_to_install(tmp_path, monkeypatch):
    def importing(name, *rest, real=builtins.__import__):
        if name == "av":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", importing)
    for look in (lambda: videos.shape(tmp_path / "a.mp4"), lambda: videos.write(noise(), tmp_path / "a.mkv", 16)):
        with pytest.raises(ResourceError, match="the package av") as caught:
            look()
        assert caught.value.hint == "pip install 'dcgen-convert[video]'"
    Image.new("RGB", (8, 8)).save(tmp_path / "frame-0.png")
    assert videos.read(tmp_path, 1, 8, 8).shape == (3, 1, 8, 8)  # pictures need no PyAV
