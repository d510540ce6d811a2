"""Whether the disks have room for what is to be written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from dcgen_convert.core.errors import InputError, ResourceError


def check_disk(needs: Iterable[tuple[Path, float]], options: str = "--run-dir and --output") -> None:
    """Refuse to start when a file system is too small.

    Args:
        needs: (folder, bytes still to be written under it); folders on one file system add up.
        options: the options that choose another disk, for the error.

    Raises:
        ResourceError: names the folder, what is needed and what is free.
    """
    volumes: dict[int, tuple[Path, float]] = {}
    for folder, size in needs:
        place = existing(folder)
        device = place.stat().st_dev
        volumes[device] = (place, volumes.get(device, (place, 0.0))[1] + size)
    for place, size in volumes.values():
        free = shutil.disk_usage(place).free
        if size > free:
            raise ResourceError(
                f"the disk under {place} is too small: {size / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free",
                f"free space, or choose another disk with {options}",
            )


def require_writable(folder: Path, option: str) -> None:
    """InputError where no file can be written into ``folder``, which need not be there yet. option: what names it."""
    place = Path(folder).absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise InputError(f"{place} is no folder", f"choose another folder with {option}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"nothing can be written into {place}", f"choose another folder with {option}")


def existing(path: Path) -> Path:
    """The folder itself if it exists, else the nearest one above it that does."""
    path = Path(path).absolute()
    while not path.is_dir():
        path = path.parent
    return path
