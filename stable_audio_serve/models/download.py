"""Fetches a registry entry's files through huggingface_hub; every failure becomes one sentence that says what to do.

Token, cache folder, endpoint and offline mode are the library's own settings (HF_TOKEN, HF_HOME, HF_ENDPOINT,
HF_HUB_OFFLINE). Knows nothing of what is in the files.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of whichever HTTP client this version uses
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models.config_reader import CONFIG_FILE
from stable_audio_serve.models.registry import WEIGHTS_FILE, ModelEntry


def download_entry(entry: ModelEntry, *, token: str | None = None, cache_dir: Path | None = None) -> Path:
    """The folder with the entry's files, complete; cached files are not fetched again.

    Without `token` the library's own is used. Raises CheckpointError when the files cannot be had.
    """
    repo_id = entry.repo_id
    if repo_id is None:
        raise CheckpointError(f"model {entry.name!r} names neither a folder nor a repository")
    try:
        snapshot = snapshot_download(
            repo_id,
            revision=entry.revision,
            token=token,
            cache_dir=cache_dir,
            allow_patterns=list(entry.files),
        )
    except (HTTPError, OSError, HFValidationError) as error:
        message = _explain(error, repo_id, entry.revision, cache_dir or Path(constants.HF_HUB_CACHE))
        raise CheckpointError(message) from error
    folder = Path(str(snapshot))
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(f"{repo_id} holds no {name}; it is not a repository of a model served here")
    return folder


def _explain(error: Exception, repo_id: str, revision: str | None, cache_dir: Path) -> str:
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__  # the hub answered; that nothing is cached either is not the reason
    page = f"{constants.ENDPOINT}/{repo_id}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    match error:
        case HFValidationError():
            return f"{repo_id!r} is no valid repository name: {_first_line(error)}"
        case GatedRepoError():
            return f"{repo_id} is gated: accept its terms at {page}, then set HF_TOKEN to a token of that account"
        case RevisionNotFoundError():
            return f"{repo_id} has no revision {revision!r}; see {page} for the branches, tags and commits there are"
        case RepositoryNotFoundError():
            return f"{repo_id} does not exist or is private: check the name, or set HF_TOKEN to a token that reads it"
        case LocalEntryNotFoundError() if constants.is_offline_mode():
            return f"{repo_id} is not complete in {cache_dir} and offline mode is on: unset HF_HUB_OFFLINE to fetch it"
        case HfHubHTTPError() if status in (401, 403):
            return f"access to {repo_id} was refused ({status}): set HF_TOKEN to a token that may read {page}"
        case HfHubHTTPError():
            return f"{constants.ENDPOINT} answered {status} for {repo_id}; try again later"
        case LocalEntryNotFoundError() | HTTPError():
            return (
                f"{repo_id} is not complete in {cache_dir} and {constants.ENDPOINT} cannot be reached: "
                "check the network, or put the files in a folder and configure its path"
            )
        case _:
            return f"{repo_id} could not be stored in {cache_dir}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
