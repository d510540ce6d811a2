"""Memory of pictures in real autoencoders with random weights, a process per case, beside the plan's arithmetic.

    python tests/benchmarks/pixels_memory.py [--sides 512,1024] [--most GIB]

First tiles against whole pictures, in the trained miniatures: PSNR in dB. Then for FLUX's autoencoder and DC-AE 1.5
f64 the highest resident memory above that of the loaded network, for a batch of one and of three pictures, encoded and
decoded on the CPU in float32; above 1024 px also in tiles. A case that would need more than --most is left out, and
said.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from pathlib import Path

from dcgen_convert.core.files import read_json
from dcgen_convert.families import catalog, components, pixel_memory
from dcgen_convert.families.pixel_memory import DECODE, ENCODE

GIB = 2**30
WHOLE = 1 << 20  # px: no picture is in tiles
NAMES = {"flux": "AutoencoderKL of FLUX", "dc-ae-f64": "DC-AE 1.5 f64c128"}


def write(name: str, folder: Path) -> Path:
    """The autoencoder of the published size with random weights."""
    from dcgen_convert.networks import random_source

    if name in catalog.AUTOENCODERS:
        return random_source.write_autoencoder(catalog.AUTOENCODERS[name], folder / name)
    layout = components.layout_of(catalog.SOURCES["flux-krea"])
    only = {"vae": layout.parts["vae"]}
    return random_source.write_layout(components.Layout(layout.pipeline, only), name, folder / name, 0) / "vae"


def measure(folder: Path, way: int, side: int, count: int, tiled: int, results) -> None:
    """Puts the bytes of ``count`` pictures above the loaded network into ``results``. tiled: side from which on."""
    import torch

    from dcgen_convert.core import resident
    from dcgen_convert.networks import autoencoders, tiles

    tiles.TILED = tiled
    codec = autoencoders.load(folder)
    shape = (
        (count, 3, side, side) if way == ENCODE else (count, codec.channels, side // codec.factor, side // codec.factor)
    )
    given = torch.rand(shape) * 2 - 1
    resident.forget()
    before = resident.highest()
    (codec.encode if way == ENCODE else codec.decode)(given)
    results.put(resident.highest() - before)


def in_a_process(*case) -> float:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=measure, args=(*case, results))
    process.start()
    process.join()
    return results.get(timeout=5) if process.exitcode == 0 else float("nan")


def seams(folder: Path, side: int, tile: int) -> float:
    """PSNR in dB of a round trip in tiles of ``tile`` px against a whole one of ``side`` px."""
    from dcgen_convert.evaluation.metrics import psnr
    from dcgen_convert.networks import autoencoders, tiles
    from dcgen_convert.tiny import world

    codec, pixels = autoencoders.load(folder), world.draw(world.sample_labels(1, seed=3), seed=3, side=side)
    tiles.TILED = side
    whole = codec.decode(codec.encode(pixels))
    tiles.TILED, tiles.TILE = tile, tile
    return psnr(codec.decode(codec.encode(pixels)), whole, peak=2.0)


def report(title: str, folder: Path, side: int, way: int, tiled: int, most: float) -> None:
    """One line for a batch of one, and one of three pictures. most: GiB."""
    pixel_memory.TILED = tiled
    config = read_json(folder / "config.json")
    stated = pixel_memory.picture_bytes(pixel_memory.bytes_per_pixel(config)["fp32"][way], way, side, side)
    for count in (1, 3):
        allowed = stated * pixel_memory.together(count, side**2)
        how = " in tiles" if side > tiled else ""
        what = f"{title}, {('encode', 'decode')[way]} {count} x {side} px{how}"
        if 1.3 * allowed > most * GIB:
            print(f"{what}: left out, about {allowed / GIB:.1f} GiB", flush=True)
            continue
        found = in_a_process(folder, way, side, count, tiled)
        print(f"{what}: {found / GIB:.2f} GiB, {found / allowed:.2f} of the plan's", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sides", default="512,1024,2048")
    parser.add_argument("--most", type=float, default=7.0, help="GiB")
    chosen = parser.parse_args()
    tiny = Path(catalog.AUTOENCODERS["tiny-dc-ae-f32"].where).parent
    for name in ("tiny-flux/vae", "tiny-dc-ae-f32", "tiny-dc-ae-f64"):
        found = seams(tiny / name, 2048, 1024)
        print(f"{name}: 2048 px in tiles of 1024 px against whole: {found:.1f} dB", flush=True)
    with tempfile.TemporaryDirectory() as work:
        for name, title in NAMES.items():
            folder = write(name, Path(work))
            for side in map(int, chosen.sides.split(",")):
                for way in (ENCODE, DECODE):
                    for tiled in (1024, WHOLE) if side > 1024 else (WHOLE,):
                        report(title, folder, side, way, tiled, chosen.most)


if __name__ == "__main__":
    main()
