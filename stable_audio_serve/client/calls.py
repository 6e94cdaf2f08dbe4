"""Build HTTP requests. A `Call` describes one request. A `Connection` adds the server's address and the API key.

The module `operations` sends the requests.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Generic, Literal, TypeVar

import httpx

from stable_audio_serve.client import answers
from stable_audio_serve.client.answers import Adapter, Clip, Job, JobPage, Model, Result
from stable_audio_serve.client.controls import Lora
from stable_audio_serve.core.errors import InvalidRequestError

# Source audio: a file's path, its content, an opened file, or a clip from an earlier result.
Audio = bytes | bytearray | memoryview | str | Path | BinaryIO | Clip
Recipe = Mapping[str, Any]  # how a clip was made: a JSON object that the server sends with the clip
Regions = Sequence[tuple[float, float]]  # start and end of each region to regenerate, in seconds
T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE = "STABLE_AUDIO_URL"
KEY_VARIABLE = "STABLE_AUDIO_API_KEY"
_LAST_PORT = 65535
_USER_AGENT = "stable-audio-serve-client"
_UNFIT = "starts or ends with white space, or has characters that no header may contain"
_PATHS = {
    "generate": "/v1/audio/generations",
    "vary": "/v1/audio/variations",
    "inpaint": "/v1/audio/inpaint",
    "loop": "/saos/generate/loop",
}
_JOBS = {"generate": "/jobs", "vary": "/jobs/variations", "inpaint": "/jobs/inpaint"}


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One HTTP request, and `read`, the function that parses a successful response.

    The same call may be sent several times. Calls that submit a job contain an idempotency key, so the server creates
    only one job.
    """

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    options: Mapping[str, Any] = field(default_factory=dict)  # further keyword arguments of `httpx.request`


def make(
    kind: Literal["generate", "vary", "inpaint", "loop"],
    prompt: str,
    *,
    controls: Mapping[str, Any],
    audio: Audio | None = None,
    regions: Regions | None = None,
) -> Call[Result]:
    """Return the call that generates audio from a prompt and optional source audio.

    Raises OSError if the source audio cannot be read.
    """
    body = _body(
        prompt, controls=controls, regions=regions, audio=audio, part="audio_file" if kind == "loop" else "audio"
    )
    return Call("POST", _PATHS[kind], answers.read_result, body)


def submit(
    kind: Literal["generate", "vary", "inpaint"],
    prompt: str,
    *,
    controls: Mapping[str, Any],
    key: str | None,
    audio: Audio | None = None,
    regions: Regions | None = None,
) -> Call[str]:
    """Return the call that submits a job. `key` is the job's idempotency key. If it is None, a random key is used.

    The call's `read` returns the job's id. Raises OSError if the source audio cannot be read.
    """
    if key is not None and not _fits_header(key):
        raise InvalidRequestError(f"idempotency_key {_UNFIT}", field="idempotency_key")
    headers = {"Idempotency-Key": key or uuid.uuid4().hex}
    body = _body(prompt, controls=controls, regions=regions, audio=audio)
    return Call("POST", _JOBS[kind], lambda answer: str(answer.json()["id"]), {**body, "headers": headers})


def replay(recipe: Audio | Recipe, *, sources: Audio | Sequence[Audio]) -> Call[Result | str]:
    """Return the call that recreates a clip from its recipe, or from an audio file that contains the recipe.

    The call's `read` returns the result. A long piece is recreated by a job, and then `read` returns the job's id.
    `sources` is the source file that the clip was made from, or a list of several. Raises OSError if a file cannot be
    read.
    """
    match sources:
        case Sequence() if not isinstance(sources, str | bytes | bytearray | memoryview):
            given = sources
        case _:
            given = [sources]
    files = [("audio", _read(source)) for source in given]
    body: dict[str, Any]
    if not isinstance(recipe, Mapping):
        body = {"files": [("file", _read(recipe)), *files]}
    elif files:  # the recipe is sent as a file too, because the server limits form fields to 512 KiB
        body = {"files": [("recipe", ("recipe.json", json.dumps(recipe).encode())), *files]}
    else:
        body = {"json": recipe}

    def read(answer: httpx.Response) -> Result | str:
        return str(answer.json()["id"]) if answer.status_code == httpx.codes.ACCEPTED else answers.read_result(answer)

    return Call("POST", "/v1/audio/replay", read, {**body, "headers": {"Idempotency-Key": uuid.uuid4().hex}})


def show_job(job_id: str) -> Call[Job]:
    """Return the call that gets a job."""
    return Call("GET", job_path(job_id), lambda answer: answers.read_job(answer.json()))


def cancel_job(job_id: str) -> Call[Job]:
    """Return the call that cancels a job."""
    return Call("DELETE", job_path(job_id), lambda answer: answers.read_job(answer.json()))


def section(job_id: str, number: int) -> Call[bytes]:
    """Return the call that downloads one finished section of a long piece."""
    return Call("GET", job_path(job_id, "audio"), lambda answer: answer.content, {"params": {"section": str(number)}})


def list_jobs(*, status: str | None, limit: int, cursor: str | None) -> Call[JobPage]:
    """Return the call that gets a page of the caller's jobs."""
    params = {"status": status, "limit": str(limit), "cursor": cursor}
    given = {name: value for name, value in params.items() if value is not None}
    return Call("GET", "/jobs", lambda answer: answers.read_page(answer.json()), {"params": given})


def models() -> Call[tuple[Model, ...]]:
    """Return the call that lists the served models."""
    return Call("GET", "/v1/models", lambda answer: answers.read_models(answer.json()))


def list_loras() -> Call[tuple[Adapter, ...]]:
    """Return the call that lists the adapters of the served models."""
    return Call("GET", "/v1/models", lambda answer: answers.read_adapters(answer.json()))


def load_lora(name: str, path: str, *, model: str | None) -> Call[None]:
    """Return the call that adds an adapter to a model."""
    body = {"lora_name": name, "lora_path": path, "model": model}
    return Call("POST", "/v1/load_lora_adapter", lambda _: None, {"json": body})


def unload_lora(name: str, *, model: str | None) -> Call[None]:
    """Return the call that removes an adapter that was added while the server ran."""
    return Call("POST", "/v1/unload_lora_adapter", lambda _: None, {"json": {"lora_name": name, "model": model}})


def job_path(job_id: str, *below: str) -> str:
    """Return the URL path `/jobs/{job_id}`, followed by the segments `below`. Raises ValueError for a malformed id."""
    try:
        known = uuid.UUID(hex=job_id)
    except ValueError as error:
        raise ValueError(f"{job_id!r} is not the id of a job, which has 32 hexadecimal digits") from error
    return "/".join(("/jobs", known.hex, *below))


@dataclass(frozen=True, slots=True)
class Connection:
    """A server's address and the caller's API key. The key is sent only to this server."""

    base_url: httpx.URL
    api_key: str | None

    @classmethod
    def choose(cls, base_url: str | None, api_key: str | None) -> Connection:
        """Return the connection to `base_url` with `api_key`. Raises ValueError if either is malformed.

        If an argument is missing, the environment variable STABLE_AUDIO_URL or STABLE_AUDIO_API_KEY is used.
        """
        text = base_url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
        shown = repr(text) if base_url else f"{text!r} ({URL_VARIABLE})"
        try:
            url = httpx.URL(text)
            is_server = url.scheme in {"http", "https"} and url.host and (url.port or 0) <= _LAST_PORT
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ValueError(f"{shown} is not a URL: {error}") from error
        if not is_server:
            raise ValueError(f"{shown} is not the URL of a server, such as {DEFAULT_URL}")
        url = url.copy_with(path=url.path.rstrip("/") + "/", query=None, fragment=None)
        key = api_key or os.environ.get(KEY_VARIABLE) or None
        if key is not None and not _fits_header(key):
            raise ValueError(f"the API key {_UNFIT}")
        return cls(url, key)

    def request(self, call: Call[Any]) -> dict[str, Any]:
        """Return the keyword arguments of `httpx.request` that send `call` to this server."""
        headers = self.headers(call.options.get("headers"))
        return {"method": call.method, "url": self.url(call.path), **call.options, "headers": headers}

    def url(self, path: str) -> httpx.URL:
        """Return the URL of the API's path `path`, such as "/jobs". `path` is appended to the base URL."""
        return self.base_url.join(path.lstrip("/"))

    def headers(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the headers of a request to this server: the headers of every request, and the headers in `more`."""
        key = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return {"User-Agent": _USER_AGENT, **key, **(more or {})}


def _fits_header(text: str) -> bool:
    return text.isascii() and text.isprintable() and text == text.strip()


def _body(
    prompt: str, *, controls: Mapping[str, Any], regions: Regions | None, audio: Audio | None, part: str = "audio"
) -> dict[str, Any]:
    """Return the keyword arguments of `httpx.request` for the request body.

    The body is JSON, or if there is source audio, a multipart form. `part` is the name of the form field for the audio.
    """
    fields: dict[str, Any] = {"prompt": prompt}
    fields |= {name: value for name, value in controls.items() if value is not None}
    if "loras" in fields:
        given = fields["loras"]
        fields["loras"] = [_lora(each) for each in ([given] if isinstance(given, str) else given)]
    if regions is not None:
        fields["inpaint_start_seconds"] = [start_s for start_s, _ in regions]
        fields["inpaint_end_seconds"] = [end_s for _, end_s in regions]
    fields = {name: _plain(name, value) for name, value in fields.items()}
    if audio is None:
        return {"json": fields}
    form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    return {"data": form, "files": [(part, _read(audio))]}


def _plain(name: str, value: Any) -> Any:
    """Return the value of the field `name` as JSON has it. Numbers and arrays of numpy become numbers and lists."""

    def convert(other: Any) -> Any:
        if isinstance(other, Mapping):
            return dict(other)
        is_list = isinstance(other, Sequence) and not isinstance(other, bytes)  # such as a range
        return list(other) if is_list else other.tolist()

    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False, default=convert)
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"{name} must be text that UTF-8 can encode", field=name) from error
    except ValueError as error:
        raise InvalidRequestError(f"{name} must be finite", field=name) from error
    except (AttributeError, TypeError) as error:
        raise InvalidRequestError(f"{name} must be text, a number, a list or a mapping", field=name) from error
    return json.loads(text)


def _lora(given: str | tuple[str, float] | Lora) -> Any:
    """Return the API's JSON object for an adapter. Values are not checked here, because the server checks them."""
    match given:
        case str():
            return {"name": given}
        case (name, strength):
            return {"name": name, "strength": strength}
    return given


def _read(audio: Audio) -> tuple[str, bytes]:
    """Return the file name and the content of source audio."""
    match audio:
        case bytes() | bytearray() | memoryview():
            return "audio", bytes(audio)
        case Clip():
            return audio.file_name, audio.content
        case str() | Path():
            # Bytes of the name that are not UTF-8 become question marks.
            return Path(audio).name.encode(errors="replace").decode(), Path(audio).read_bytes()
    return "audio", audio.read()
