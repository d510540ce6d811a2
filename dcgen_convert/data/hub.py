"""Data sets of the Hugging Face hub: `hf://datasets/ORG/NAME[@REVISION][/PATH]`, fetched into the hub's cache."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dcgen_convert.core.errors import AccessError, InputError

PREFIX = "hf://datasets/"
FORM = f"{PREFIX}ORG/NAME, {PREFIX}ORG/NAME/FOLDER or {PREFIX}ORG/NAME@REVISION"
_NAME = r"[\w][\w.-]*"


@dataclass(frozen=True)
class DataSet:
    """A data set of the hub, or what lies at ``path`` in it ("": all)."""

    repo: str
    revision: str | None
    path: str

    @property
    def page(self) -> str:
        """Where a person reads about it."""
        return f"https://huggingface.co/datasets/{self.repo}"


def is_address(text: str) -> bool:
    """Whether a user's text means something on the hub."""
    return text.startswith("hf:")


def parse(text: str) -> DataSet:
    """The data set that ``text`` names; InputError for another form."""
    found = re.fullmatch(rf"{PREFIX}({_NAME}/{_NAME})(?:@([\w.-]+))?(?:/(.*))?", text)
    if found is None or ".." in (found[3] or "").split("/"):
        raise InputError(f"{text[:80]!r} is no data set of the hub", f"write {FORM}")
    return DataSet(found[1], found[2], (found[3] or "").strip("/"))


def fetch(text: str, suffixes: Iterable[str], offline: bool = False) -> Path:
    """The local folder, or the one file, that holds the files of a data set with one of ``suffixes``.

    Args:
        offline: take the cache only; the library does so too where HF_HUB_OFFLINE is set.
    Raises:
        InputError: the text is no address, or there are no such files.
        AccessError: it is not in the cache, and it cannot be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    found, wanted = parse(text), sorted(suffixes)
    single = Path(found.path).suffix.lower() in wanted
    inside = f"{found.path}/" if found.path else ""
    patterns = [found.path] if single else [f"{inside}*{suffix}" for suffix in wanted]
    try:
        folder = Path(
            snapshot_download(
                found.repo,
                repo_type="dataset",
                revision=found.revision,
                allow_patterns=patterns,
                local_files_only=offline,
            )
        )
    except LocalEntryNotFoundError as error:
        revision = f" --revision {found.revision}" if found.revision else ""
        raise AccessError(
            f"the data set {found.repo} is not in the local cache and cannot be fetched",
            f"connect to the network, or fetch it where there is one: hf download --repo-type dataset {found.repo}"
            f"{revision}",
        ) from error
    place = folder / found.path
    if not place.exists() or (place.is_dir() and not any(file.suffix.lower() in wanted for file in place.rglob("*"))):
        raise InputError(f"{text} has no files of the kinds {', '.join(wanted)}", f"see {found.page}/tree/main")
    return place
