"""What a SOURCE is: where it lies, its config, its family, its latent space. It is asked once, then passed on.

f is the spatial compression of an autoencoder, c the number of its latent channels, p the patch in latent cells.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dcgen_convert import families
from dcgen_convert.core.errors import AccessError, InputError
from dcgen_convert.core.names import MANIFEST
from dcgen_convert.families import Expert, Family, bases, catalog, components, legacy
from dcgen_convert.families.bases import Base
from dcgen_convert.families.catalog import SourceEntry
from dcgen_convert.families.grid import MOST, Grid, autoencoder_grid, autoencoder_time
from dcgen_convert.recipe.reader import Reader


@dataclass(frozen=True)
class Identity:
    """A SOURCE, understood from its name, its small JSON files and the headers of its weights.

    Each property is worked out when it is first asked for. The reader reads each file once, also for the identities
    that `replace` makes from this one. Configs are shared: copy one before you change it.

    Attributes:
        name: catalogue name, folder, file or hub id, as the user wrote it.
        base: the pipeline that completes a transformer which comes alone, if the user named one.
        offline: take hub files from the cache only.
    """

    name: str
    base: str | None = None
    offline: bool = False
    reader: Reader = field(default_factory=Reader, repr=False, compare=False)

    @cached_property
    def entry(self) -> SourceEntry | None:
        """What the catalogue says of it; None for a source of the user's own."""
        return catalog.find_source(self.name)

    @property
    def where(self) -> str:
        """The folder, file or hub id that holds it."""
        return self.entry.where if self.entry else self.name

    @property
    def revision(self) -> str | None:
        """The hub revision that the catalogue fixes."""
        return self.entry.revision if self.entry else None

    @property
    def licence(self) -> str | None:
        """What the catalogue states; the licence of a bundle is read from the source's own files."""
        return self.entry.licence if self.entry else None

    @property
    def path(self) -> Path | None:
        """The user's folder or file; None for a catalogue name and for what does not exist here."""
        path = Path(self.name).expanduser()
        return path if self.entry is None and path.exists() else None

    @property
    def is_alone(self) -> bool:
        """Whether it is a transformer without a pipeline: one file, or a folder with the transformer's config."""
        return self.path is not None and (self.path.is_file() or (self.path / "config.json").is_file())

    @property
    def hub_id(self) -> str | None:
        """The hub repository that it comes from; None when it is on this machine."""
        if self.entry:
            return self.entry.repo
        return self.name if self.path is None else None

    @cached_property
    def here(self) -> Identity:
        """The same source, asked without the network: its properties raise AccessError where a file is missing."""
        return self if self.offline else replace(self, offline=True)

    @cached_property
    def pipeline(self) -> Identity:
        """The pipeline that the source is completed with: the base, or the source itself."""
        return self if self.base is None else replace(self, name=self.base, base=None)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The transformer's config; of a single file, what its header and the base's config tell.

        Raises:
            InputError: there is none, or it is damaged. AccessError: it is on the hub and cannot be had.
        """
        if self.path is not None and self.path.is_file():
            return self.reader.single(self.path).config(None if self.base is None else self.pipeline.config)
        return legacy.current(self._network_config())

    def _network_config(self) -> dict[str, Any]:
        if self.entry:
            return self.reader.document(self.entry.config_path)
        if self.path is None:
            return self.reader.hub_network(self.name, self.offline)
        return self.reader.first(families.network_folder(self.path) / "config.json", self.path / "config.json")

    @cached_property
    def family(self) -> Family:
        """The family that claims the config; InputError when none does."""
        return families.family_of(self.config, self.name, self.pipeline_index)

    @cached_property
    def experts(self) -> tuple[Expert, ...]:
        """The networks that it draws with."""
        return self.family.experts(self.pipeline_index or {})

    @property
    def pipeline_index(self) -> dict[str, Any] | None:
        """model_index.json of the pipeline that the network belongs to; None where there is none, or it is not here."""
        if self.is_alone:
            return None if self.base is None else self.pipeline.pipeline_index
        if self.entry is not None:
            return components.index_of(self.entry)
        if self.path is not None:
            return self.index
        from huggingface_hub.errors import EntryNotFoundError

        with suppress(AccessError, EntryNotFoundError):
            return self.reader.hub(self.name, "model_index.json", self.offline)
        return None

    @property
    def fps(self) -> float:
        """Frames a second of the videos that it draws; 0: it draws pictures."""
        return self.family.frames_per_second(self.pipeline_index or {})

    @cached_property
    def grid(self) -> Grid:
        """The latent space that the transformer was trained in.

        Raises:
            InputError: the config is damaged, or nothing tells the autoencoder. AccessError: as for `config`.
        """
        if self.entry:
            return Grid(self.entry.vae_factor, self.entry.vae_channels, self.entry.patch, self.family.time)
        family, cells = self.family, self._latents()
        try:
            p = family.patch(self.config, cells.c)
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise InputError(
                f"{self.name}: the transformer's config is damaged: {type(error).__name__}: {error}", "fetch it again"
            ) from error
        if not 0 < p <= MOST:
            raise InputError(
                f"{self.name}: the transformer's config and its autoencoder's give a patch of {p} cells",
                "do they belong together?",
            )
        return replace(cells, p=p)

    def _latents(self) -> Grid:
        """Single cells: of the autoencoder beside the transformer, else of the base, else of the published base."""
        if self.vae is not None:
            return _cells(self.vae)
        if self.base is not None:
            return self.pipeline.own_latents()
        if self.path is None:
            return self.own_latents()
        if self.published is None:
            raise InputError(
                f"{self.name} has no autoencoder beside it", "name the pipeline that it belongs to: --base FOLDER|REPO"
            )
        return Grid(self.published.factor, self.published.channels, 1, self.family.time)

    def own_latents(self) -> Grid:
        """Single cells of a pipeline's own autoencoder."""
        if self.entry:
            return Grid(self.entry.vae_factor, self.entry.vae_channels, 1, self.family.time)
        if self.path is not None and self.path.is_dir():
            return _cells(self.reader.first(self.path / "vae" / "config.json"))
        return _cells(self.reader.hub(self.name, "vae/config.json", self.offline))

    @property
    def published(self) -> Base | None:
        """The published pipeline of a transformer of this kind; None where no single one is meant."""
        return bases.base_of(self.family.name, self.config)

    @property
    def vae(self) -> dict[str, Any] | None:
        """Config of the autoencoder in the user's folder; None where there is none."""
        return self._beside("vae", "config.json")

    @property
    def index(self) -> dict[str, Any] | None:
        """model_index.json of the user's folder; None where there is none."""
        return self._beside("model_index.json")

    @property
    def scheduler(self) -> dict[str, Any] | None:
        """Config of the scheduler in the user's folder; None where there is none."""
        return self._beside("scheduler", "scheduler_config.json")

    @cached_property
    def stock_scheduler(self) -> dict[str, Any] | None:
        """Config of the scheduler of any source, as `rehearse --random` writes it; None where it is not here."""
        if self.path is not None:
            return self.scheduler
        if self.entry is not None and self.entry.folder is not None:
            return self.reader.optional(self.entry.folder / "scheduler" / "scheduler_config.json")
        if self.entry is not None:
            return components.layout_of(self.entry).parts["scheduler"].config
        with suppress(AccessError):
            return self.reader.hub(self.name, "scheduler/scheduler_config.json", self.offline)
        return None

    @cached_property
    def most_pixels(self) -> int | None:
        """Pixels of the largest pictures that it was trained on; None: not known. A bundle's manifest tells them.

        Raises:
            AccessError: as for `config`.
        """
        if self.entry is not None and self.entry.trained_side is not None:
            return self.entry.trained_side**2
        if made := self._beside(MANIFEST):
            with suppress(KeyError, TypeError):
                return int(made["defaults"]["height"] * made["defaults"]["width"])
        return self.family.most_pixels(self.config)

    @property
    def trained_pixels(self) -> tuple[int, int] | None:
        """Pixels of the smallest and of the largest pictures that it was trained on; None: not known.

        Raises:
            AccessError: as for `config`.
        """
        most, family = self.most_pixels, self.family
        one = most != family.most_pixels(self.config)  # the catalogue or the manifest tells one size
        least = most if one else family.least_pixels(self.config)
        return None if least is None or most is None else (least, most)

    def _beside(self, *parts: str) -> dict[str, Any] | None:
        return None if self.path is None else self.reader.optional(self.path.joinpath(*parts))


def _cells(config: dict[str, Any]) -> Grid:
    """Of the autoencoder with this config."""
    return Grid(*autoencoder_grid(config), 1, autoencoder_time(config))
