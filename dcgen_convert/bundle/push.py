"""Uploading a finished bundle to the hub: `dcgen-convert push`."""

from __future__ import annotations

from pathlib import Path

from dcgen_convert.bundle import manifest as manifests
from dcgen_convert.bundle.layout import read_index
from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import AccessError, CheckFailed, InputError


def push(bundle: Path, repo: str, private: bool, console: Console, *, endpoint: str | None = None) -> str:
    """Create the model repository ``repo`` when it is missing, upload the bundle in one commit, and return the
    repository's address.

    Args:
        bundle: a finished bundle; every file of its manifest must be there.
        repo: "ORG/NAME".
        private: whether a repository that this call creates is private.
        endpoint: hub address; None: huggingface_hub's own (HF_ENDPOINT).

    Raises:
        InputError: not a bundle, or a name that no repository can have.
        CheckFailed: an unfinished bundle.
        AccessError: no token, offline mode, or an account that may not write there.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    bundle = Path(bundle)
    read_index(bundle)
    files = manifests.read(bundle)["files"]
    if missing := [name for name in files if not (bundle / name).is_file()]:
        raise CheckFailed(
            f"{bundle} lacks {missing[0]}, which its manifest lists", "dcgen-convert verify names every difference"
        )
    size = sum(record["bytes"] for record in files.values())
    console.say(f"push: {len(files) + 1} files, {size / 1e9:.2f} GB to {repo}")
    api = HfApi(endpoint=endpoint)
    try:
        url = api.create_repo(repo, private=private, exist_ok=True, token=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=bundle,
            allow_patterns=[*files, manifests.FILE],
            commit_message="Upload dcgen-convert bundle",
            token=True,
        )
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
        raise
    return str(url)
