"""Finds the file of an adapter: a path, a URL, an S3 object, or a file in a repository of the Hugging Face hub.

Downloads are cached: files of the hub in the cache of huggingface_hub, other files in a private folder. The module
imports boto3, httpx and huggingface_hub only when a source needs them, and never imports torch.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.private_files import make_private_folder, open_private
from stable_audio_serve.models.adapters.header import MAX_FILE_BYTES, SUFFIX

CACHE = Path("~/.cache/stable-audio-serve/adapters")

_S3 = "s3://"
_HTTPS = "https://"
# URLs with a user or a query are refused: clients see the URL, and these parts may be secret.
_URL = re.compile(r"https://[\w.-]{1,253}(?::[0-9]{1,5})?/[\w./%+~-]*\.safetensors", re.ASCII)
_NAME = r"[A-Za-z0-9][\w.-]{0,95}"
_REPOSITORY = re.compile(rf"({_NAME}/{_NAME})(?:@([\w.-]{{1,100}}))?(?:/(.+\.safetensors))?")
_REQUEST_TIMEOUT_S = 10.0
_URL_TIMEOUT_S = 300.0
_CHUNK_BYTES = 2**20
_MAX_REASON_CHARS = 300
_RETRY_AFTER_S = 60.0
_NUMBERS = re.compile(r"\[Errno -?[0-9]+\] |\((?:Request|Amzn Trace|Amz CF) ID: [^)]*\)")

_lock = threading.Lock()  # so that concurrent requests for one file download it once


def is_remote(source: str) -> bool:
    """Whether a source is a URL, an S3 object or a repository, not a path on this machine."""
    return source.startswith((_S3, _HTTPS)) or _repository(source) is not None


def fetch_adapter(
    source: str,
    *,
    token: str | None = None,
    open_s3: Callable[[], Any] | None = None,
    cache: Path | None = None,
) -> Path:
    """Returns the local path of an adapter file. Downloads the file if it is not in the cache or has changed.

    `source` is a path, an https URL, `s3://bucket/key`, `owner/repository` or `owner/repository/file`. `@` and a
    branch, tag or commit may follow the repository. If `source` names no file, the repository must have exactly one
    safetensors file. A path is returned unchanged and need not exist. The file of a URL is expected never to change.
    `token` is for the hub; `open_s3` returns a boto3 client. Raises InvalidRequestError if the file cannot be
    downloaded or is larger than MAX_FILE_BYTES. The error has `retry_after_s` if the source does not answer now.
    """
    own_cache = (cache or CACHE).expanduser()
    with _refusing(source):
        if source.startswith(_S3):
            return _fetch_object(source, open_s3=open_s3, cache=own_cache)
        if source.startswith(_HTTPS):
            return _fetch_url(source, cache=own_cache)
        if (repository := _repository(source)) is not None:
            return _fetch_from_hub(repository, token=token, cache=cache)
    return Path(source)


@dataclass(frozen=True, slots=True)
class _Repository:
    """A source on the hub. If `revision` is None, the main branch. If `file` is None, the only safetensors file."""

    name: str
    revision: str | None
    file: str | None


def _repository(source: str) -> _Repository | None:
    """Parse a source on the hub. Returns None for a path, also for a path that looks like a repository but exists."""
    match = _REPOSITORY.fullmatch(source)
    if match is None or match[1].endswith(SUFFIX) or os.path.exists(source):
        return None
    return _Repository(match[1], match[2], match[3])


class _FetchError(Exception):
    """The reason why a source cannot be fetched. If `is_temporary` is true, a later attempt may succeed."""

    def __init__(self, reason: str, *, is_temporary: bool = False) -> None:
        super().__init__(reason)
        self.is_temporary = is_temporary


@contextmanager
def _refusing(source: str) -> Iterator[None]:
    try:
        yield
    except (_FetchError, OSError, ValueError) as error:  # ValueError: the hub's client refuses the name of the file
        reason = str(error) if isinstance(error, _FetchError) else f"cannot be downloaded: {_reason(error)}"
        retry_after_s = _RETRY_AFTER_S if isinstance(error, _FetchError) and error.is_temporary else None
        message = f"adapter source {source[:300]!r}: {reason}"
        raise InvalidRequestError(message, field="loras", retry_after_s=retry_after_s) from error


def _reason(error: Exception) -> str:
    """Return the text of an error in one line, without paths of this machine and numbers of errors and requests."""
    text = error.strerror if isinstance(error, OSError) and error.filename is not None else None
    return " ".join(_NUMBERS.sub("", text or str(error)).split())[:_MAX_REASON_CHARS]


def _is_temporary(status: int | None) -> bool:
    """Whether a later attempt may succeed. `status` is that of the response, or None if there was none."""
    return status is None or status >= 500 or status == 429


def _require_size(num_bytes: int | None) -> None:
    if num_bytes is not None and num_bytes > MAX_FILE_BYTES:
        raise _FetchError(f"the file is larger than {MAX_FILE_BYTES} bytes")


def _fetch_object(source: str, *, open_s3: Callable[[], Any] | None, cache: Path) -> Path:
    """Returns the cached copy of an S3 object, downloaded if missing.

    The path of the copy depends on the object's ETag, so that a changed object is downloaded again.
    """
    bucket, _, key = source.removeprefix(_S3).partition("/")
    if not bucket or not key.endswith(SUFFIX):
        raise _FetchError(f"must be s3://BUCKET/KEY{SUFFIX}")
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client = open_s3() if open_s3 else boto3.session.Session().client("s3")
        head = client.head_object(Bucket=bucket, Key=key)
        _require_size(head["ContentLength"])
        version = hashlib.sha256(f"{source}\n{head['ETag']}".encode()).hexdigest()
        path = cache / version[:32] / Path(key).name
        with _lock:
            if not path.exists():
                body = client.get_object(Bucket=bucket, Key=key, IfMatch=head["ETag"])["Body"]
                _write(path, body.iter_chunks(_CHUNK_BYTES))
        return path
    except (BotoCoreError, ClientError) as error:
        facts = error.response.get("ResponseMetadata", {}) if isinstance(error, ClientError) else {}
        status = facts.get("HTTPStatusCode")
        raise _FetchError(f"cannot be downloaded: {_reason(error)}", is_temporary=_is_temporary(status)) from error


def _fetch_url(url: str, *, cache: Path) -> Path:
    if not _URL.fullmatch(url):
        raise _FetchError(f"must be https://HOST/PATH{SUFFIX}, without a user and a query")
    import httpx

    path = cache / hashlib.sha256(url.encode()).hexdigest()[:32] / url.rpartition("/")[2]
    try:
        with _lock:
            if not path.exists():
                hooks: dict[str, list[Any]] = {"request": [_require_tls]}  # also called for each redirect
                client = httpx.Client(follow_redirects=True, timeout=_REQUEST_TIMEOUT_S, event_hooks=hooks)
                with client, client.stream("GET", url) as reply:
                    if reply.status_code != 200:
                        reason = f"the server answers with status {reply.status_code}"
                        raise _FetchError(reason, is_temporary=_is_temporary(reply.status_code))
                    _write(path, _in_time(reply.iter_bytes()))
                    _require_complete(path)
        return path
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        is_temporary = isinstance(error, httpx.TransportError)
        raise _FetchError(f"cannot be downloaded: {_reason(error)}", is_temporary=is_temporary) from error
    except UnicodeError as error:
        raise _FetchError("cannot be downloaded: invalid host name") from error


def _require_complete(path: Path) -> None:
    """Delete a download that is no safetensors file, such as an error page, so that the next attempt fetches it again.

    Raises _FetchError.
    """
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        path.unlink()
        raise _FetchError("what the server sends is not a complete safetensors file") from error


def _require_tls(request: Any) -> None:
    if request.url.scheme != "https":
        raise _FetchError("it redirects to a URL that is not https")


def _in_time(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the chunks as they arrive. Raises an error if the download takes too long."""
    deadline = time.monotonic() + _URL_TIMEOUT_S
    for chunk in chunks:
        if time.monotonic() > deadline:
            raise _FetchError(f"the download takes more than {_URL_TIMEOUT_S:g} s")
        yield chunk


def _write(path: Path, chunks: Iterator[bytes]) -> None:
    """Write a file and then move it to `path`, so that other processes never read an incomplete file."""
    make_private_folder(path.parent)
    part = path.with_name(f"{uuid.uuid4().hex}.part")
    try:
        with open(part, "xb", opener=open_private) as file:
            for chunk in chunks:
                _require_size(file.tell() + len(chunk))
                file.write(chunk)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _fetch_from_hub(source: _Repository, *, token: str | None, cache: Path | None) -> Path:
    from huggingface_hub import (
        HfApi,
        constants,
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo_id, file = source.name, source.file
    revision = source.revision or constants.DEFAULT_REVISION
    try:
        if file is None:
            info = HfApi(token=token).model_info(repo_id, revision=revision, timeout=_REQUEST_TIMEOUT_S)
            file = _only_file(repo_id, [each.rfilename for each in info.siblings or ()])
        url = hf_hub_url(repo_id, file, revision=revision)
        _require_size(get_hf_file_metadata(url, token=token, timeout=_REQUEST_TIMEOUT_S).size)
        return Path(hf_hub_download(repo_id, file, revision=revision, token=token, cache_dir=cache))
    except GatedRepoError as error:
        terms = f"accept its terms at {constants.ENDPOINT}/{repo_id} with the account of the server's HF_TOKEN"
        raise _FetchError(f"the repository {repo_id} is gated: {terms}") from error
    except RevisionNotFoundError as error:
        raise _FetchError(f"the repository {repo_id} has no revision {revision}") from error
    except RepositoryNotFoundError as error:
        raise _FetchError(f"there is no file and no repository {repo_id} that the server may read") from error
    except (HTTPError, LocalEntryNotFoundError, RuntimeError, ValueError, OSError) as error:  # RuntimeError: of hf_xet
        cached = try_to_load_from_cache(repo_id, file, revision=revision, cache_dir=cache) if file else None
        if not isinstance(cached, str):
            status = getattr(getattr(error, "response", None), "status_code", None)
            is_away = isinstance(error, HTTPError | LocalEntryNotFoundError | RuntimeError)
            is_temporary = is_away and _is_temporary(status)
            raise _FetchError(f"cannot be downloaded: {_reason(error)}", is_temporary=is_temporary) from error
        return Path(cached)


def _only_file(repo_id: str, names: list[str]) -> str:
    found = sorted(name for name in names if name.endswith(SUFFIX))
    if len(found) == 1:
        return found[0]
    if not found:
        raise _FetchError(f"the repository {repo_id} has no {SUFFIX} file")
    listed = ", ".join(f"{repo_id}/{name}" for name in found[:20])
    raise _FetchError(f"the repository {repo_id} has {len(found)} {SUFFIX} files; name one: {listed}")
