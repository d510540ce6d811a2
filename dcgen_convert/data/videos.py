"""One video as every player shows it: a file, or a folder of its frames (frame-000.png, frame-001.png, ...).

Files are read with PyAV, which carries FFmpeg (extra `video`). Whatever it raises about a file is an InputError that
names it. Frames that a decoder would guess because of damage are refused too, as far as the format lets it notice.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from fractions import Fraction
from importlib.util import find_spec
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from dcgen_convert.core.errors import InputError, ResourceError
from dcgen_convert.core.files import atomic_write
from dcgen_convert.core.pixels import fitted, to_image
from dcgen_convert.data import decoding

if TYPE_CHECKING:
    from torch import Tensor

DEMUXERS = {".mp4": "mov", ".mov": "mov", ".mkv": "matroska", ".webm": "matroska"}
"""Suffix -> FFmpeg's reader. No other may open a file: some, such as those of playlists, would open further files."""
LOSSLESS = ".mkv"  # of what `write` writes: FFV1 (RFC 9043)
FRAME = re.compile(r"frame-(\d+)")  # stem of a frame's file
LIKE = 0.1  # a file with so many more or fewer frames a second than the model draws, as a share, is read as it is
MOST_PIXELS = 2**26  # of one frame: 8192 x 8192. Beyond it a small file would fill the memory
SEAL = "DCGEN_SHA256"  # tag of a lossless file: hash of its packets
HDR = (16, 18)  # transfer characteristics PQ and HLG (ITU-T H.273): their white is no sRGB white
UNSTATED = 2  # matrix coefficients (H.273)
ITU601, ITU709 = 5, 1  # PyAV's Colorspace; 1 is BT.709 in H.273 too
HIGH = (1280, 576)  # px: players take a video of unstated colours that is wider or higher for BT.709, else for BT.601
BICUBIC_EXACT = 4 | 0x2000 | 0x40000 | 0x80000  # swscale: whole chroma, exact rounding, the same on every processor


def suffixes() -> frozenset[str]:
    """Suffixes of the files that can be read, in small letters."""
    return frozenset(DEMUXERS)


def read(file: Path, frames: int, height: int, width: int, fps: float = 0) -> Tensor:
    """(3, frames, height, width) float32 in [-1, 1]: the first frames of a video, each as `pixels.fitted`.

    Args:
        fps: frames a second; of a file with more of them those that are nearest in time are read. 0: every frame.
    Raises:
        InputError: the file is missing, no video, damaged, too large, or has fewer frames, or fewer a second.
        ResourceError: PyAV is not installed.
    """
    return read_sizes(file, frames, [(height, width)], fps)[0]


def read_sizes(file: Path, frames: int, sizes: Sequence[tuple[int, int]], fps: float = 0) -> list[Tensor]:
    """The first frames, read once, at several sizes (height, width); else as `read`."""
    import torch

    with closing(pictures(file, fps)) as every:
        shown = [[fitted(image, *size) for size in sizes] for image in islice(every, frames)]
    require_frames(file, len(shown), frames)
    return [torch.stack(slot, dim=1) for slot in zip(*shown, strict=True)]


def require_frames(file: Path, found: int, needed: int) -> None:
    """InputError for a video of fewer frames than are needed."""
    if found < needed:
        raise InputError(
            f"the video {file} has {found} frames, and {needed} are needed", "give a longer one, or a smaller number"
        )


def pictures(file: Path, fps: float = 0) -> Generator[Image.Image, None, None]:
    """The frames in mode RGB, one after the other, upright and with square pixels. fps, and errors, as in `read`."""
    if file.is_dir():
        yield from (decoding.decode(frame)[0] for frame in frame_files(file))
        return
    with _opened(file) as (container, stream):
        step, taken = _step(stream, fps), 0
        for number, frame in enumerate(container.decode(stream)):
            if number == _place(taken, step):
                yield _shown(frame, stream)
                taken += 1


def shape(file: Path, most: int | None = None, fps: float = 0) -> tuple[int, int, int]:
    """(width, height, frames) of a video as it is shown. One frame is decoded, the others are counted.

    Args:
        most: frames from which on no more are counted. fps: as in `read`; those frames are counted that it reads.
    Raises:
        InputError, ResourceError: as `read`.
    """
    if file.is_dir():
        files = frame_files(file)
        with decoding.opened(files[0]) as image:
            return *decoding.shown_size(image), len(files)
    first, count = None, 0
    with _opened(file) as (container, stream):
        step = _step(stream, fps)
        for packet in container.demux(stream):  # the last one is empty, and makes the decoder give what it holds
            count += packet.size > 0
            if first is None and (decoded := packet.decode()):
                first = _shown(decoded[0], stream)
            if first is not None and most is not None and count > _place(most - 1, step):
                break
        if first is None:
            raise ValueError("it has no frames")
    return *first.size, math.ceil((count - 0.5) / step)  # as many places are below ``count``


def is_frames(names: Sequence[str]) -> bool:
    """Whether a folder of files with these names is one video: all its pictures are called frame-NUMBER."""
    shown = [Path(name).stem for name in names if Path(name).suffix.lower() in decoding.suffixes()]
    return bool(shown) and all(map(FRAME.fullmatch, shown))


def frame_files(folder: Path) -> list[Path]:
    """The frames of a folder, by their numbers. InputError where there are none, or one is missing or there twice."""
    numbered = sorted(
        (int(found[1]), file)
        for file in folder.iterdir()
        if file.suffix.lower() in decoding.suffixes() and (found := FRAME.fullmatch(file.stem))
    )
    numbers = [number for number, _ in numbered]
    if not numbers or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise InputError(
            f"{folder} holds no frames with numbers that follow one another", "call them frame-000.png, frame-001.png"
        )
    return [file for _, file in numbered]


def write(pixels: Tensor, file: Path, fps: float) -> None:
    """Write (3, F, H, W) in [-1, 1], without loss beyond 8 bits: the whole file or nothing. Equal pixels, equal bytes.

    Raises:
        ResourceError: PyAV is not installed.
    """
    options = {"level": "3", "flags": "+bitexact"}
    every = [to_image(picture) for picture in pixels.unbind(1)]
    atomic_write(file, _encoded(every, fps, ("matroska", "ffv1", "bgr0"), options, sealed=True))


def is_whole(file: Path) -> bool:
    """Whether a file that `write` wrote still holds the same packets."""
    digest = hashlib.sha256()
    try:
        with _opened(file) as (container, stream):
            for packet in container.demux(stream):
                digest.update(bytes(packet))
            return bool(container.metadata.get(SEAL) == digest.hexdigest())
    except InputError:
        return False


def write_mp4(pixels: Tensor, file: Path, fps: float) -> None:
    """Write (3, F, H, W) in [-1, 1] as H.264, to be looked at: the whole file or nothing.

    Players want even sides: an odd one gets one more row or column, like its last.

    Raises:
        ResourceError: PyAV is not installed, or has no encoder for H.264.
    """
    import torch

    more = (0, pixels.shape[-1] % 2, 0, pixels.shape[-2] % 2)
    pixels = torch.nn.functional.pad(pixels.float(), more, mode="replicate")
    write_film([to_image(picture) for picture in pixels.unbind(1)], file, fps)


def write_film(frames: Sequence[Image.Image], file: Path, fps: float) -> None:
    """`write_mp4` of pictures, all of one size with even sides."""
    options = {"crf": "14", "x264-params": "mbtree=0"}  # with this step x264 gives other bytes each time
    atomic_write(file, _encoded(frames, fps, ("mp4", "libx264", "yuv420p"), options))


def require_reader() -> None:
    """ResourceError where PyAV is not installed."""
    _av()


def has_reader() -> bool:
    """Whether PyAV is installed."""
    return find_spec("av") is not None


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ResourceError(
            "reading and writing videos needs the package av (PyAV), which is not installed",
            "pip install 'dcgen-convert[video]'",
        ) from error
    return av


@contextmanager
def _opened(file: Path) -> Iterator[tuple[Any, Any]]:
    """(PyAV's container, its video stream). Whatever goes wrong with the video in here is an InputError."""
    av = _av()
    try:
        if not file.is_file():  # opening a pipe would wait without end
            raise OSError("it does not exist" if not file.exists() else "it is no regular file")
        if not (reader := DEMUXERS.get(file.suffix.lower())):
            raise ValueError(f"its name must end with {', '.join(DEMUXERS)}")
        with open(file, "rb") as data, av.open(data, format=reader) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise ValueError("it has no pictures, only other streams")
            stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(MOST_PIXELS)}
            stream.codec_context.thread_count = 1  # several files are read at the same time, see `ahead`
            yield container, stream
    except Exception as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200] or type(error).__name__
        raise InputError(f"the video {file} cannot be read: {reason}", "replace or remove it") from error


def _step(stream: Any, fps: float) -> float:
    """Frames of a file to each that is read, at least 1. ValueError for a file with fewer frames a second than
    ``fps``: some of those that are read would have to be made up.
    """
    own = float(stream.average_rate or stream.guessed_rate or 0)
    if not fps or not own:
        return 1.0
    if own < (1 - LIKE) * fps:
        raise ValueError(f"it has {own:g} frames a second, and the model draws {fps:g}")
    return own / fps if own > (1 + LIKE) * fps else 1.0


def _place(number: int, step: float) -> int:
    """Which frame of a file is the one with this ``number`` that is read: the nearest in time."""
    return math.floor(number * step + 0.5)


def _shown(frame: Any, stream: Any) -> Image.Image:
    """A decoded frame in sRGB, upright, with square pixels. ValueError for damage, HDR and too many pixels."""
    if frame.is_corrupt:
        raise ValueError("a frame is damaged")
    if frame.color_trc in HDR:
        raise ValueError("it is HDR, whose white is no sRGB white: map its tones first")
    width = max(1, round(frame.width * (stream.sample_aspect_ratio or 1)))
    if max(width, frame.width) * frame.height > MOST_PIXELS:
        raise ValueError(f"a frame has {width} x {frame.height} px, and at most {MOST_PIXELS:,} are read")
    colours = {}
    if not frame.format.is_rgb and frame.colorspace == UNSTATED:
        colours = {"src_colorspace": ITU709 if frame.width >= HIGH[0] or frame.height > HIGH[1] else ITU601}
    flags = {"interpolation": BICUBIC_EXACT, "threads": 1}
    image = Image.fromarray(frame.reformat(width=width, format="rgb24", **colours, **flags).to_ndarray())
    return image.rotate(90 * round(frame.rotation / 90), expand=True) if frame.rotation else image


def _encoded(
    frames: Sequence[Image.Image],
    fps: float,
    kind: tuple[str, str, str],
    options: dict[str, str],
    sealed: bool = False,
) -> bytes:
    """The bytes of a file with these frames.

    Args:
        kind: format, codec, and how that holds a pixel.
    """
    av = _av()
    container_format, codec, held = kind
    if codec not in av.codecs_available:
        raise ResourceError(f"PyAV has no encoder {codec} here", "pip install --force-reinstall av")
    buffer = BytesIO()
    with av.open(buffer, "w", format=container_format, options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, held
        coder = stream.codec_context
        coder.thread_count = 1  # so that the same pixels give the same bytes on every machine
        if held.startswith("yuv"):
            coder.colorspace = coder.color_primaries = coder.color_trc = ITU709
        packets = [packet for picture in frames for packet in stream.encode(_frame(av, picture, held))]
        packets += stream.encode()
        if sealed:
            digest = hashlib.sha256(b"".join(map(bytes, packets)))
            container.metadata[SEAL] = digest.hexdigest()
        for packet in packets:
            container.mux(packet)
    return buffer.getvalue()


def _frame(av: Any, picture: Image.Image, held: str) -> Any:
    """A frame of PyAV whose pixels are ``held`` so."""
    return av.VideoFrame.from_image(picture).reformat(
        format=held, dst_colorspace=ITU709, interpolation=BICUBIC_EXACT, threads=1
    )
