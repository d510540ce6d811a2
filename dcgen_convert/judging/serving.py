"""`dcgen-convert serve`: a bundle beside its base on a page of this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dcgen_convert.bundle import loading, sample
from dcgen_convert.bundle import manifest as manifests
from dcgen_convert.core.console import Console
from dcgen_convert.judging import halves
from dcgen_convert.judging import page as pages
from dcgen_convert.networks import pipelines
from dcgen_convert.stages.compare import runtime_of


@dataclass(frozen=True)
class Running:
    """A page that answers. base: the name of the base; None: ``without`` says why there is none."""

    page: pages.Page
    address: str
    base: str | None
    without: str


def serve(
    bundle: Path, against: str | None, home: Path, port: int, console: Console, *, trust_remote_code: bool = False
) -> Running:
    """Start the page of a bundle; returns when it answers.

    The bundle is loaded before, the base when it draws its first picture.

    Args:
        against, home: as in `halves.of_base`. port: 0 takes a free one.

    Raises:
        InputError: the extra `serve` is not installed, not a bundle. What `loading.load` and
            `halves.of_base` raise.
        CheckFailed: the bundle is unfinished. ResourceError: the port is taken.
    """
    pages.library()
    converted = halves.of_bundle(bundle, trust_remote_code=trust_remote_code)
    manifest = manifests.read(bundle)
    line = pages.listening(port)
    base, without = halves.of_base(bundle, against, home, console)
    dtype = loading.default_dtype(bundle, pipelines.device())
    about = sample.describe(bundle, runtime_of(bundle, dtype))
    console.say(f"serve: {about}; {f'the base is {base.name}' if base else without}")
    _ = converted.pipeline
    beside = f"Base: {base.name}, loaded when it draws first." if base else f"Without a base: {without}."
    defaults = manifest["defaults"]
    page = pages.Page(
        converted,
        base,
        told=f"### {about}\n{beside}",
        sizes=halves.sizes(converted, manifest),
        steps=defaults["steps"],
        guidance=defaults["guidance"],
        console=console,
    )
    return Running(page, page.start(line), base.name if base else None, without)
