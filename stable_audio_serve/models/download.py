"""Downloads the files of a model registry entry with huggingface_hub. Every failure is raised as a CheckpointError with
one sentence that says what to do.

huggingface_hub reads its token, cache folder, endpoint and offline mode from environment variables (HF_TOKEN, HF_HOME,
HF_ENDPOINT, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # the class of requests or of httpx, whichever the installed huggingface_hub uses
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models.checkpoint_files import (
    FileList,
    check_encoder,
    check_folder,
    check_layout,
    choose_weights,
    encoder_folders,
    find_text_encoder,
    list_folder,
    list_repository,
    text_encoder_repository,
)
from stable_audio_serve.models.config_reader import CONFIG_FILE, ConfigReader, read_config
from stable_audio_serve.models.registry import TEXT_ENCODER, ModelEntry, text_encoder_entry

# All errors of huggingface_hub. It raises ValueError for a token with invalid characters, and for a response that does
# not come from a model hub. Its package hf_xet, which downloads large files, raises RuntimeError for a failed download.
_ERRORS = (HTTPError, OSError, HFValidationError, RuntimeError, ValueError)
_RETRY_AFTER_S = 30.0
_REQUEST_TIMEOUT_S = 4.0  # timeout of a request to the hub that is not a download
_ABANDONED_AFTER_S = 600.0  # a running download writes to its file more often
# The files to download of a text encoder in a checkpoint's repository, and in a repository of its own.
_ENCODER_SUFFIXES = ("json", "safetensors", "model")
_ENCODER_FILES = ("config.json", "model*.safetensors*", "tokenizer*", "spiece.model", "special_tokens*")


def download_entry(
    entry: ModelEntry,
    *,
    token: str | None = None,
    check_config: Callable[[ConfigReader], None] = lambda config: None,
) -> Path:
    """Returns the folder with all of the entry's files. Downloads missing files. If all are cached, sends no request.

    If `token` is None, huggingface_hub uses its own token. `check_config` is called before the weights are downloaded;
    it may raise CheckpointError. Raises CheckpointError if the files cannot be downloaded.
    """
    if (cached := find_cached(entry)) is not None:
        return cached
    with _asking(entry, token) as info:
        listed = _files_of(info, entry)
        config = read_config(_fetch_config(entry, listed, token=token))
        check_config(config)
        files = _needed_files(config, listed)
    folder = _download(entry, files, token=token)
    check_folder(folder)
    return folder


def download_text_encoder(folder: Path, *, token: str | None = None) -> Path:
    """Returns the folder of a checkpoint's text encoder.

    If the checkpoint does not contain the text encoder, downloads the text encoder's own repository. Raises
    CheckpointError if it cannot be downloaded.
    """
    if (within := find_text_encoder(folder)) is not None:
        return within
    if (cached := _cached_text_encoder(folder)) is not None:
        return cached
    entry, subfolder = _encoder_entry(folder)
    fetched = _download(entry, _encoder_files(subfolder), token=token)
    check_encoder(replace(list_folder(fetched), place=_repository(entry)), folder=subfolder)
    return fetched / (subfolder or "")


def find_cached(entry: ModelEntry) -> Path | None:
    """Returns the folder with the entry's files if the cache has all of them, else None. Sends no request.

    Raises CheckpointError if a file is damaged or the name of the repository is invalid.
    """
    folder = _snapshot(entry, (CONFIG_FILE,))
    if folder is None:
        return None
    try:
        files = _needed_files(read_config(folder), list_folder(folder))
    except CheckpointError:
        return None  # files are missing: a download was interrupted
    if _snapshot(entry, files) is None:
        return None
    check_folder(folder)
    return folder


def find_local(entry: ModelEntry) -> tuple[Path, Path] | None:
    """Returns the folders of an entry's checkpoint and text encoder if both are on this machine. Sends no request."""
    folder = Path(entry.folder) if entry.folder is not None else find_cached(entry)
    if folder is None:
        return None
    encoder = find_text_encoder(folder) or _cached_text_encoder(folder)
    return None if encoder is None else (folder, encoder)


def downloaded_bytes(entry: ModelEntry) -> int:
    """Returns the size of an entry's files in the cache, including the parts of unfinished files. Sends no request."""
    total = 0
    # On a file system without links, complete files are in `snapshots`, not in `blobs`.
    for file in _blobs(Path(constants.HF_HUB_CACHE), _repository(entry)).parent.rglob("*"):
        with suppress(FileNotFoundError):  # the name of a file changes when it is complete
            total += file.lstat().st_size
    return total


def check_access(entry: ModelEntry, *, token: str | None = None) -> None:
    """Raise CheckpointError unless the entry's files are on this machine or can be downloaded.

    Downloads at most the config. Sends a few short requests without retries, so that a starting server reports
    inaccessible files within seconds.
    """
    if entry.folder is not None:
        check_folder(Path(entry.folder))
        folder: Path | None = Path(entry.folder)
    else:
        folder = find_cached(entry)
    if folder is None:
        folder, encoder = _check_repository(entry, token=token)
    else:
        encoder = check_layout(read_config(folder), list_folder(folder))
    if encoder is None and _cached_text_encoder(folder) is None:
        _check_text_encoder(folder, token=token)


def _check_repository(entry: ModelEntry, *, token: str | None) -> tuple[Path, str | None]:
    """Download the config of an entry and check that the entry's files can be downloaded.

    Returns the folder with the config, and the text encoder's folder (None if it is not in the same repository).
    """
    with _asking(entry, token) as info:
        listed = _files_of(info, entry)
        folder = _fetch_config(entry, listed, token=token)
        config = read_config(folder)
        encoder = check_layout(config, listed)
        _require_readable(choose_weights(listed), info=info, token=token)
        if encoder is not None:
            _require_readable(f"{encoder}/config.json", info=info, token=token)
    _require_space(entry, _needed_files(config, listed), info=info)
    return folder, encoder


def _check_text_encoder(folder: Path, *, token: str | None) -> None:
    """Check that the text encoder of the checkpoint in `folder` can be downloaded from a repository of its own."""
    entry, subfolder = _encoder_entry(folder)
    with _asking(entry, token) as info:
        check_encoder(_files_of(info, entry), folder=subfolder)
        _require_readable(f"{subfolder}/config.json" if subfolder else "config.json", info=info, token=token)
    _require_space(entry, _encoder_files(subfolder), info=info)


def _files_of(info: ModelInfo, entry: ModelEntry) -> FileList:
    return list_repository(_repository(entry), {file.rfilename for file in info.siblings or ()})


def _fetch_config(entry: ModelEntry, listed: FileList, *, token: str | None) -> Path:
    """Download the config of an entry. Returns its folder."""
    repo_id = _repository(entry)
    if CONFIG_FILE not in listed.names:
        raise CheckpointError(f"{repo_id} holds no {CONFIG_FILE}; it is not a repository of a model served here")
    # Not at the commit of the list: later cache lookups use the revision of the entry.
    config_file = hf_hub_download(
        repo_id, CONFIG_FILE, revision=entry.revision, token=token, etag_timeout=_REQUEST_TIMEOUT_S
    )
    return Path(config_file).parent


def _needed_files(config: ConfigReader, listed: FileList) -> tuple[str, ...]:
    """Returns name patterns of the files to download. Raises CheckpointError if a file is missing in `listed`."""
    check_layout(config, listed)
    in_encoder = [f"{folder}/*.{suffix}" for folder in encoder_folders(config) for suffix in _ENCODER_SUFFIXES]
    return (CONFIG_FILE, choose_weights(listed), *in_encoder)


@contextmanager
def _asking(entry: ModelEntry, token: str | None) -> Iterator[ModelInfo]:
    """Returns a context with the hub's information about a repository and its files, see `_explaining`."""
    if constants.is_offline_mode():
        raise CheckpointError(describe_incomplete_cache(entry))
    revision = entry.revision or constants.DEFAULT_REVISION
    with _explaining(entry):
        yield HfApi(token=token).model_info(
            _repository(entry), revision=revision, timeout=_REQUEST_TIMEOUT_S, files_metadata=True
        )


def _encoder_entry(folder: Path) -> tuple[ModelEntry, str | None]:
    """Returns the entry of the text encoder of a checkpoint that does not contain it, and its folder there."""
    repo_id, subfolder = text_encoder_repository(read_config(folder))
    return text_encoder_entry(repo_id), subfolder


def _encoder_files(subfolder: str | None) -> list[str]:
    return [f"{subfolder}/{name}" if subfolder else name for name in _ENCODER_FILES]


def _cached_text_encoder(folder: Path) -> Path | None:
    """Returns the folder of the text encoder of a checkpoint that does not contain it, if the cache has all of it."""
    entry, subfolder = _encoder_entry(folder)
    cached = _snapshot(entry, _encoder_files(subfolder))
    if cached is None:
        return None
    try:
        check_encoder(list_folder(cached), folder=subfolder)
    except CheckpointError:
        return None
    return cached / (subfolder or "")


def _download(entry: ModelEntry, files: Iterable[str], *, token: str | None) -> Path:
    repo_id = _repository(entry)
    with _explaining(entry):
        folder = snapshot_download(repo_id, revision=entry.revision, token=token, allow_patterns=list(files))
    _remove_abandoned(_blobs(Path(constants.HF_HUB_CACHE), repo_id))
    return Path(folder)


def _snapshot(entry: ModelEntry, files: Iterable[str]) -> Path | None:
    """Returns the cache folder of a repository; None if nothing is cached, or if it is known that `files` are not."""
    try:
        folder = snapshot_download(
            _repository(entry), revision=entry.revision, allow_patterns=list(files), local_files_only=True
        )
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise _failure(error, entry) from error
    except (OSError, ValueError) as error:  # the hub was not asked
        place = _blobs(Path(constants.HF_HUB_CACHE), _repository(entry)).parent
        raise CheckpointError(f"{place} cannot be read ({_first_line(error)}): repair or delete it") from error
    return Path(folder)


def _repository(entry: ModelEntry) -> str:
    if entry.repo_id is None:
        raise CheckpointError(f"model {entry.card.name!r} names neither a folder nor a repository")
    return entry.repo_id


def _require_readable(name: str, *, info: ModelInfo, token: str | None) -> None:
    """Raise an error if the token cannot read the file `name`. Anyone can list the files of a gated repository."""
    get_hf_file_metadata(hf_hub_url(info.id, name, revision=info.sha), token=token, timeout=_REQUEST_TIMEOUT_S)


def _require_space(entry: ModelEntry, files: Iterable[str], *, info: ModelInfo) -> None:
    root = Path(constants.HF_HUB_CACHE)
    blobs = _blobs(root, info.id)
    _remove_abandoned(blobs)
    needed = 0
    for file in filter_repo_objects(info.siblings or (), allow_patterns=list(files), key=lambda f: f.rfilename):
        blob = file.lfs.sha256 if file.lfs else file.blob_id
        places = (blobs / (blob or ""), blobs.parent / "snapshots" / str(info.sha) / file.rfilename)
        if not any(place.is_file() for place in places):  # the second is used on file systems without links
            needed += file.size or 0
    existing = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise CheckpointError(
            f"{entry.repo_id} takes {needed / 1e9:.2f} GB of {root}, where {free / 1e9:.2f} GB are free: "
            "make room, or set HF_HOME to a folder with more"
        )


def _remove_abandoned(blobs: Path) -> None:
    """Delete unfinished files of processes that were killed. No later download continues them (huggingface_hub 2)."""
    for file in blobs.glob("*.*.incomplete"):
        with suppress(OSError):
            if file.stat().st_mtime < time.time() - _ABANDONED_AFTER_S:
                file.unlink()


def _blobs(root: Path, repo_id: str) -> Path:
    return root / f"models--{repo_id.replace('/', '--')}" / "blobs"


@contextmanager
def _explaining(entry: ModelEntry) -> Iterator[None]:
    """Within this context, an error of huggingface_hub becomes a CheckpointError."""
    try:
        yield
    except _ERRORS as error:
        raise _failure(error, entry) from error


def _failure(error: Exception, entry: ModelEntry) -> CheckpointError:
    """Returns the error to raise for an error of huggingface_hub. It has a retry time if the hub did not answer."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__  # report the hub's response instead of the missing cache entry that followed
    if isinstance(error, HfHubHTTPError):
        is_temporary = error.response.status_code >= 500 or error.response.status_code == 429
    else:
        is_away = isinstance(error, LocalEntryNotFoundError | HTTPError | RuntimeError)
        is_temporary = is_away and not constants.is_offline_mode()
    message = _explain(error, entry)
    return CheckpointError(message, retry_after_s=_RETRY_AFTER_S if is_temporary else None)


def _explain(error: Exception, entry: ModelEntry) -> str:
    repo_id, place = entry.repo_id, Path(constants.HF_HUB_CACHE)
    page = f"{constants.ENDPOINT}/{repo_id}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    match error:
        case HFValidationError():
            return f"{repo_id!r} is no valid repository name: {_first_line(error)}"
        case GatedRepoError():
            return f"{repo_id} is gated: accept its terms at {page}, then set HF_TOKEN to a token of that account"
        case RevisionNotFoundError():
            return f"{repo_id} has no revision {entry.revision!r}; {page} shows its branches, tags and commits"
        case RepositoryNotFoundError():
            return f"{repo_id} does not exist or is private: check the name, or set HF_TOKEN to a token that reads it"
        case HfHubHTTPError() if status in (401, 403):
            said = f"{status}: {error.server_message}".partition("\n")[0] if error.server_message else status
            return f"access to {repo_id} was refused ({said}): set HF_TOKEN to a token that may read {page}"
        case HfHubHTTPError() if status >= 500 or status == 429:
            return f"{constants.ENDPOINT} answered {status} for {repo_id}; try again later"
        case HfHubHTTPError():
            return f"{constants.ENDPOINT} answered {status} to {error.response.url.path}; see {page}"
        case LocalEntryNotFoundError() | HTTPError():
            return describe_incomplete_cache(entry)
        case OSError():
            return f"{repo_id} could not be stored in {place}: {_first_line(error)}"
        case RuntimeError():
            reason = _first_line(error).partition(" for url ")[0]  # a link may be signed, and then it is secret
            return f"{repo_id} could not be downloaded ({reason}); try again later, or set HF_HUB_DISABLE_XET=1"
        case UnicodeEncodeError():
            return "hf_token (HF_TOKEN): a token has only ASCII letters, digits and underscores"
        case _:
            return f"{constants.ENDPOINT} gave no answer of a model hub for {repo_id}: {_first_line(error)}"


def describe_incomplete_cache(entry: ModelEntry) -> str:
    """Returns the error message for a cache that lacks files while the hub cannot be used (offline or no network)."""
    what = f"the text encoder of {entry.repo_id}" if entry.card.family == TEXT_ENCODER else entry.repo_id
    lacking = f"{what} is not complete in {constants.HF_HUB_CACHE} and"
    if constants.is_offline_mode():
        return f"{lacking} offline mode is on: unset HF_HUB_OFFLINE to fetch it"
    remedy = "check the network, or put the files in a folder and configure its path"
    return f"{lacking} {constants.ENDPOINT} cannot be reached: {remedy}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
