"""`benchmark`: how fast a base and its conversion are on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dcgen_convert.api import calls
from dcgen_convert.api.order import without_data
from dcgen_convert.api.results import Benchmarked
from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.limits import require
from dcgen_convert.core.names import MANIFEST
from dcgen_convert.recipe.identity import Identity

if TYPE_CHECKING:
    import torch

    from dcgen_convert.judging.pair import ModelPair

SECONDS = 60.0  # of one comparison


@calls.explained()
def benchmark(  # noqa: PLR0913  every option of the verb by its name
    source: str | Path,
    *,
    ae: str | None = None,
    ae_channels: int | None = None,
    resolution: int | Sequence[int] = (),
    against: str | Path | None = None,
    random: bool = False,
    dtype: Literal["fp32", "bf16"] | None = None,
    seconds: float = SECONDS,
    recipe: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    quiet: bool = False,
    console: Console | None = None,
) -> Benchmarked:
    """Time a base against its conversion: text, one denoising step, decoder, whole picture; and memory.

    The figures of a bundle are added to its manifest and its card.

    Args:
        source: a bundle; or what `convert` takes as a pipeline: catalogue name, folder or hub id.
        ae, ae_channels: autoencoder of the conversion, as in `convert`; for a source that is no bundle. None: the
            recipe's.
        resolution: picture sides in px; videos have the area of such squares, in the usual shape of their family.
            Empty: that of the bundle, or of the recipe.
        against: the base of a bundle. None: the one that its manifest names.
        random: take random weights of the right sizes for ``source``, a catalogue name. Nothing is downloaded.
        dtype: of the weights. None: bfloat16 on a GPU and for large models, else float32.
        seconds: that one comparison may take; there are three or four for each size. At least one round counts.
        recipe, revision, offline: as in `convert`.
        quiet: only warnings on stderr.
        console: where to speak instead.

    Raises:
        InputError: a size that one of the models cannot draw, or a base that is not known.
        ResourceError: the weights do not fit the memory of this machine.
        AccessError, RecipeError: as in `convert`.
    """
    require(seconds=seconds)
    sides = [resolution] if isinstance(resolution, int) else list(dict.fromkeys(resolution))
    for side in sides:
        require(resolution=side)
    bundle = Path(source).expanduser()
    is_bundle = (bundle / MANIFEST).is_file() and ae is None
    _require_fitting(is_bundle, ae_channels=ae_channels, random=random, recipe=recipe, revision=revision)
    if against is not None and not is_bundle:
        raise InputError(
            f"against names the base of a bundle, and {source} is converted to an autoencoder here",
            "leave --against out, or give a bundle without --ae",
        )
    console = console or calls.console_of(quiet)
    import torch

    from dcgen_convert.judging import speed, speed_text
    from dcgen_convert.judging.timing import Stopwatch
    from dcgen_convert.networks import pipelines

    device = torch.device(pipelines.device())
    if is_bundle:
        pair = _of_bundle(bundle, against, dtype, offline)
    else:
        settings = {"ae": ae, "ae_channels": ae_channels, "recipe": recipe}
        wanted = {**settings, "revision": revision, "offline": offline}
        pair = _of_source(source, wanted, max(sides, default=None), dtype, random)
    sides = sides or [pair.side]
    notes = [*pair.notes, *speed.beyond(pair, sides)]
    for note in notes:
        console.say(note)
    rows = speed.measure(pair, sides, Stopwatch(device, seconds), console)
    found = Benchmarked(source=str(source), random=random, notes=notes, sizes=rows, **speed_text.facts(pair, device))
    if is_bundle:
        from dcgen_convert.bundle.layout import add_metrics

        add_metrics(bundle.resolve(), pair.family, "benchmark", speed_text.kept(found.document()))
    return found


def _require_fitting(is_bundle: bool, **settings: Any) -> None:
    """InputError for a setting of a conversion that is given for a bundle, which is converted already."""
    given = [name for name, value in settings.items() if value]
    if is_bundle and given:
        raise InputError(
            f"{given[0]} is a setting for a source, and a bundle is converted already",
            f"leave --{given[0].replace('_', '-')} out, or give --ae to benchmark a conversion of the bundle",
        )


def _of_bundle(bundle: Path, against: str | Path | None, dtype: str | None, offline: bool) -> ModelPair:
    from dcgen_convert.bundle import loading, manifest
    from dcgen_convert.families import catalog
    from dcgen_convert.judging import pair
    from dcgen_convert.networks import pipelines

    record = manifest.read(bundle)
    made_of = record["sources"]["base"]
    name = str(made_of["name"])
    found = str(against) if against else name if name in catalog.SOURCES else made_of.get("repo")
    if not found:
        raise InputError(
            f"{bundle} was made from {name}, a folder of the machine that made it",
            "name its base: --against SOURCE",
        )
    kind = pipelines.DTYPES[dtype] if dtype else loading.default_dtype(bundle, pipelines.device())
    revision = None if against else made_of.get("revision")
    return pair.of_bundle(bundle, record, Identity(found, offline=offline), revision, kind)


def _of_source(
    source: str | Path, settings: dict[str, Any], side: int | None, dtype: str | None, random: bool
) -> ModelPair:
    from dcgen_convert.judging import pair
    from dcgen_convert.networks import pipelines

    resolved = without_data(source, {**settings, "resolution": side})
    kind = pipelines.DTYPES[dtype] if dtype else _default_dtype(resolved.identity, pipelines.device())
    return pair.of_source(resolved, kind, side, random)


def _default_dtype(identity: Identity, device: str) -> torch.dtype:
    """As `bundle.loading.default_dtype`, from the config alone."""
    import torch

    from dcgen_convert.bundle.loading import LARGE
    from dcgen_convert.families.components import DIFFUSERS, Component
    from dcgen_convert.networks import random_networks

    part = Component(DIFFUSERS, identity.family.model_class, identity.config, "any")
    large = 4 * random_networks.parameters(part) * len(identity.family.components) > LARGE
    return torch.bfloat16 if device.startswith("cuda") or large else torch.float32
