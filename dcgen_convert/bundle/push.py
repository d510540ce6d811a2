"""Uploading a finished bundle to the hub: `dcgen-convert push`.

The order keeps a mistake private: first the bundle is checked here, then the card by the hub, then the repository is
looked at, and only then is one created. All files arrive in one commit, which also removes what an older upload has
left there. Large files are sent before the commit, one by one. The hub keeps them, so a call that broke goes on where
it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcgen_convert.bundle import checks, signature
from dcgen_convert.bundle import manifest as manifests
from dcgen_convert.bundle.layout import CARD, card_of, read_index
from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import AccessError, CheckFailed, InputError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

KEPT = (".gitattributes",)  # the hub's own file in a repository


def push(bundle: Path, repo: str, private: bool, console: Console, *, endpoint: str | None = None) -> str:
    """Check the bundle, upload it in one commit to the model repository ``repo``, and return the repository's address.

    The repository is created when it is missing. Files there that are not part of the bundle are removed. The card that
    arrives names the repository in its code. A signed bundle arrives as it was signed.

    Args:
        bundle: a finished bundle; files that its manifest does not list stay here.
        repo: "ORG/NAME".
        private: the repository must be private.
        endpoint: hub address; None: huggingface_hub's own (HF_ENDPOINT).

    Raises:
        InputError: not a bundle, a name that no repository can have, a card that the hub refuses, or ``private`` and
            the repository is public.
        CheckFailed: an unfinished or damaged bundle, or one that has changed since it was signed.
        AccessError: no token, offline mode, or an account that may not write there.
    """
    from huggingface_hub import HfApi

    bundle = Path(bundle)
    check_name(repo)
    record = checked(bundle, console)
    signed = signature.require_current(bundle, record)
    written = _for_repository(record, repo)
    if signed:
        if written[CARD] != (bundle / CARD).read_bytes():
            console.warn(f"the card of the signed bundle does not name {repo}: sign it with --repo {repo}")
        written = {}
    api = HfApi(endpoint=endpoint)
    with _explained(repo):
        _check_card(api, written.get(CARD, (bundle / CARD).read_bytes()).decode())
        there = _present(api, repo)
        if there and private and not there["private"]:
            raise InputError(
                f"the repository {repo} exists and is public, so nothing was uploaded",
                "make it private on the hub, or give the name of a new repository",
            )
        size = sum(entry["bytes"] for entry in record["files"].values())
        files = sorted({*record["files"], manifests.FILE, *([signature.FILE] if signed else [])})
        console.say(f"push: {len(files)} files, {size / 1e9:.2f} GB to {repo}")
        url = there["url"] if there else str(api.create_repo(repo, private=private, token=True))
        upload = _Upload(api, repo, console)
        try:
            upload.send(bundle, files, written, there["files"] if there else [])
        except BaseException:
            if not there and not upload.arrived:
                _remove_empty(api, repo, console)
            raise
    return url


def check_name(repo: str) -> None:
    """InputError when no repository can have this name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    with _explained(repo):
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError("it has no owner")


def checked(bundle: Path, console: Console) -> dict[str, Any]:
    """The manifest of a bundle whose files are all there and undamaged; CheckFailed otherwise."""
    index, record = read_index(bundle), manifests.read(bundle)
    found = checks.check_listed(bundle, record, console)
    found = found or checks.check_structure(bundle, index) + checks.check_table(bundle, record)
    if found:
        raise CheckFailed(
            f"{bundle} is damaged, so nothing was uploaded: {checks.listed(found)}",
            "dcgen-convert verify names every difference",
        )
    return record


def _for_repository(record: Mapping[str, Any], repo: str) -> dict[str, bytes]:
    """The files that are other ones in the repository: a card with its name, and the manifest with that card's hash."""
    card = card_of(record, title=repo.rpartition("/")[2], place=repo).encode()
    entry = {"sha256": hashlib.sha256(card).hexdigest(), "bytes": len(card)}
    changed = {**record, "files": {**record["files"], CARD: entry}}
    return {CARD: card, manifests.FILE: (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()}


def _check_card(api: HfApi, card: str) -> None:
    """Ask the hub whether it takes the card; InputError when it does not. Nothing exists there yet."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = build_hf_headers(token=True)
    body = {"content": card, "repoType": "model"}
    answer = get_session().post(f"{api.endpoint}/api/validate-yaml", json=body, headers=headers)
    if answer.status_code == 404:  # a hub without this check
        return
    faults = [] if answer.status_code not in (200, 400) else answer.json().get("errors") or []
    if not faults:
        hf_raise_for_status(answer)
        return
    said = "; ".join(str(fault.get("message", fault)) for fault in faults)
    raise InputError(
        f"the hub does not take the model card: {said}", "nothing was uploaded; see the front of README.md"
    )


def _present(api: HfApi, repo: str) -> dict[str, Any] | None:
    """{"private", "files", "url"} of the repository; None when there is none."""
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        info = api.model_info(repo, token=True)
    except RepositoryNotFoundError:
        return None
    except HfHubHTTPError as error:
        if getattr(error.response, "status_code", None) == 404:
            return None
        raise
    files = [entry.rfilename for entry in info.siblings or ()]
    return {"private": bool(info.private), "files": files, "url": f"{api.endpoint}/{repo}"}


class _Upload:
    """The files of one commit. ``arrived``: large files that the hub has."""

    def __init__(self, api: HfApi, repo: str, console: Console) -> None:
        self.api, self.repo, self.console = api, repo, console
        self.arrived = 0

    def send(self, bundle: Path, names: list[str], written: Mapping[str, bytes], present: list[str]) -> None:
        """Send the files ``names``, those of ``written`` in place of the bundle's; remove the rest of ``present``."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations: list[Any] = [
            CommitOperationDelete(name) for name in sorted({*present} - {*names, *KEPT}) if not name.endswith("/")
        ]
        if operations:
            self.console.say(f"push: removes {len(operations)} files of {self.repo} that are not part of the bundle")
        with self.console.progress("upload", len(names), "file") as bar:
            for name in names:
                added = CommitOperationAdd(name, written.get(name, str(bundle / name)))
                self.api.preupload_lfs_files(self.repo, [added], token=True, free_memory=False)
                self.arrived += getattr(added, "_upload_mode", None) == "lfs"
                operations.append(added)
                bar.advance()
        message = "Upload dcgen-convert bundle"
        self.api.create_commit(self.repo, operations, commit_message=message, token=True)


def _remove_empty(api: HfApi, repo: str, console: Console) -> None:
    """Take back a repository that this call created, and into which nothing came."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.delete_repo(repo, token=True, missing_ok=True)
    except (HfHubHTTPError, OSError):
        console.warn(f"the empty repository {repo} could not be removed again: delete it on the hub")


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """The errors of the hub as sentences."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except HFValidationError as error:
        raise InputError(f"{repo!r} is no repository name: {error}", "use ORG/NAME") from error
    except OfflineModeIsEnabled as error:
        raise AccessError("nothing can be uploaded in offline mode", "unset HF_HUB_OFFLINE") from error
    except LocalTokenNotFoundError as error:
        raise AccessError(
            "there is no hub token on this machine", "set HF_TOKEN to a token with write access, or run `hf auth login`"
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise AccessError(
                f"the hub refuses this account to write to {repo} (HTTP {status})",
                "set HF_TOKEN to a token with write access",
            ) from error
        raise AccessError(
            f"the hub did not take the upload to {repo}: {str(error).splitlines()[0] if str(error) else status}",
            "the same command goes on: what has arrived is not sent again",
        ) from error
    except ValueError as error:  # the client's own complaint about the card
        raise InputError(f"the hub does not take this bundle: {str(error).splitlines()[0]}", "see README.md") from error
