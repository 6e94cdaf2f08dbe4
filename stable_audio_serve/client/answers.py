"""The server's answers as value objects, and their parsers. Parsers ignore unknown keys. Times have a time zone."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import datetime
from email.message import Message
from pathlib import Path
from typing import Any

import httpx
import httpx_sse

from stable_audio_serve.core.errors import CancelledRequestError, ConflictError, GenerationError

_MANIFEST = "manifest.json"
_WARNING = re.compile(r'299 \S+ "((?:[^"\\]|\\.)*)"')  # in the Warning header: 299 - "sentence", 299 - "sentence"


@dataclass(frozen=True, slots=True)
class Clip:
    """One variation: an audio file with its seed and measurements.

    `peak` is the largest absolute sample, 1 = full scale. `loudness_lufs` is None under 0.4 s and for silence. Pass
    `recipe` to `replay` to recreate the clip. It is None if the server did not send it; the file may still contain it.
    """

    file_name: str
    content: bytes = field(repr=False)
    seed: int
    peak: float
    loudness_lufs: float | None
    is_silent: bool
    recipe: Mapping[str, Any] | None = field(default=None, repr=False)

    def save(self, path: str | Path) -> Path:
        """Write the file. Returns its path. Raises OSError."""
        path = Path(path)
        path.write_bytes(self.content)
        return path


@dataclass(frozen=True, slots=True)
class Result:
    """The audio of one request or job: one clip per variation.

    `timings_ms` has the milliseconds of each stage. `timings_ms` and `request_id` are empty for a job. `replay` is None
    except for a replay: "exact" means the original bytes, "close" means that the original was made on another device or
    version. `warnings` are sentences about parts of the request that had no effect, such as the end of a prompt that is
    longer than the model reads.
    """

    clips: tuple[Clip, ...]
    model: str
    sample_rate_hz: int
    request_id: str = ""
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    manifest: Mapping[str, Any] | None = None
    replay: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def content(self) -> bytes:
        """The audio file of the first variation."""
        return self.clips[0].content

    @property
    def seed(self) -> int:
        """The seed of the first variation; the same request with this seed gives the same audio."""
        return self.clips[0].seed

    def save(self, path: str | Path) -> Path:
        """Write the file of the first variation. Returns its path. Raises OSError."""
        return self.clips[0].save(path)


@dataclass(frozen=True, slots=True)
class JobProgress:
    """The progress of a job: `fraction` is between 0 and 1. Progress from the event stream has a `message` to log."""

    stage: str
    fraction: float
    eta_s: float | None
    queue_position: int | None
    message: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A job as the server described it. `sent` is the whole JSON object."""

    id: str
    status: str
    mode: str
    model: str
    duration_s: float
    steps: int | None
    num_outputs: int
    created_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    error: str | None
    download_url: str | None
    progress: JobProgress
    seeds: tuple[int, ...]
    sent: Mapping[str, Any] = field(repr=False)

    @property
    def is_over(self) -> bool:
        """Whether the job's status is final."""
        return self.status in {"succeeded", "failed", "cancelled"}

    @property
    def bucket_url(self) -> str | None:
        """The link to the audio in a bucket, or None when the server itself sends the audio."""
        url = self.download_url
        if self.sent.get("storage_backend") != "s3" or url is None or url.endswith(f"/jobs/{self.id}/audio"):
            return None
        return url


@dataclass(frozen=True, slots=True)
class JobPage:
    """A page of the caller's jobs, newest first. Pass `next_cursor` to get the next page; it is None on the last."""

    jobs: tuple[Job, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Model:
    """A served model. `sent` is the server's whole description as a JSON object."""

    name: str
    aliases: tuple[str, ...]
    description: str
    is_default: bool
    max_duration_s: float
    sample_rate_hz: int
    channels: int
    default_steps: int
    default_cfg_scale: float
    sent: Mapping[str, Any] = field(repr=False)


def read_result(response: httpx.Response) -> Result:
    """Return the result in a successful answer. Raises GenerationError if it is not an answer of this API."""
    headers = response.headers
    with _parsing("the server's answer"):
        seeds = _values(headers.get("x-seeds") or headers["x-seed"])
        # A recipe that lacks a long prompt cannot be replayed.
        recipes = [None if "left_out" in recipe else recipe for recipe in _values(headers.get("x-recipe", ""))]
        measured = [_values(headers[f"x-audio-{name}"]) for name in ("peak", "loudness", "silent")]
        facts = zip(seeds, *measured, recipes or [None] * len(seeds), strict=True)
        clips, manifest = _read_clips(response.content, headers["content-disposition"], facts=list(facts))
        stages = (entry.strip().partition(";dur=") for entry in headers["server-timing"].split(","))
        return Result(
            clips,
            headers["x-model"],
            int(headers["x-sample-rate"]),
            request_id=headers["x-request-id"],
            timings_ms={name: float(duration_ms) for name, _, duration_ms in stages},
            manifest=manifest,
            replay=headers.get("x-replay"),
            warnings=tuple(re.sub(r"\\(.)", r"\1", text) for text in _WARNING.findall(headers.get("warning", ""))),
        )


def read_job_result(job: Job, content: bytes, *, disposition: str) -> Result:
    """Return the result in a job's file. Raises GenerationError if the file does not match the job."""
    with _parsing("the job's file"):
        sent = job.sent["clips"]
        facts = [
            (clip["seed"], clip["peak"], clip["loudness"], clip["silent"], recipe)
            for clip, recipe in zip(sent, job.sent.get("recipes") or [None] * len(sent), strict=True)
        ]
        clips, manifest = _read_clips(content, disposition, facts=facts)
        warnings = tuple(job.sent.get("warnings", ()))
        return Result(clips, job.model, job.sent["sample_rate"], manifest=manifest, warnings=warnings)


def read_job(sent: Mapping[str, Any]) -> Job:
    """Return the job that a JSON object describes."""
    return Job(
        id=sent["id"],
        status=sent["status"],
        mode=sent["mode"],
        model=sent["model"],
        duration_s=sent["duration"],
        steps=sent["steps"],
        num_outputs=sent["output_count"],
        created_at=datetime.fromisoformat(sent["created_at"]),
        started_at=_time(sent["started_at"]),
        completed_at=_time(sent["completed_at"]),
        error=sent["error"],
        download_url=sent["download_url"],
        progress=_read_progress(sent["progress"]),
        seeds=tuple(sent["seeds"]),
        sent=sent,
    )


def read_event(event: httpx_sse.ServerSentEvent) -> JobProgress | Job | None:
    """Return the progress in an event, or the ended job in the last event. Raises GenerationError.

    Returns None for events of another type.
    """
    with _parsing("an event of the job"):
        if event.event == "progress":
            return _read_progress(json.loads(event.data))
        if event.event == "end":
            return read_job(json.loads(event.data))
    return None


def read_page(sent: Mapping[str, Any]) -> JobPage:
    """Return the page that a JSON object describes."""
    return JobPage(tuple(read_job(job) for job in sent["jobs"]), sent["next_cursor"])


def read_models(sent: Mapping[str, Any]) -> tuple[Model, ...]:
    """Return the models of the list in a JSON object."""
    same = {each.name for each in fields(Model)} - {"name", "aliases", "sent"}  # fields with the same name in the API
    return tuple(
        Model(name=model["id"], aliases=tuple(model["aliases"]), sent=model, **{name: model[name] for name in same})
        for model in sent["data"]
    )


def require_success(job: Job) -> None:
    """Raise an error unless the job succeeded.

    A failed job raises GenerationError, a cancelled job CancelledRequestError, and a job in progress ConflictError.
    """
    if job.status == "cancelled":
        raise CancelledRequestError(f"the job {job.id} was cancelled")
    if job.status == "failed":
        raise GenerationError(job.error or f"the job {job.id} failed")
    if job.status != "succeeded":
        raise ConflictError(f"the job {job.id} has no audio yet: it is {job.status}", code="job_is_not_over")


def place_file(response: httpx.Response, path: Path) -> Path:
    """Return where to save a download: `path`, or if that is a folder, a file in it with the name from the server."""
    if not path.is_dir():
        return path
    disposition = response.headers.get("content-disposition")
    return path / (_file_name(disposition) if disposition else Path(response.url.path).name)


@contextmanager
def _parsing(what: str) -> Iterator[None]:
    """Turn errors from parsing `what` into GenerationError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise GenerationError(f"{what} cannot be understood: {error}") from error


def _read_clips(
    content: bytes, disposition: str, *, facts: Sequence[tuple[Any, ...]]
) -> tuple[tuple[Clip, ...], Mapping[str, Any] | None]:
    """Return the clips and the manifest in a downloaded file: one audio file, or a ZIP file of several variations.

    `facts` has for each variation: seed, peak, loudness, whether it is silent, recipe.
    """
    files, manifest = {_file_name(disposition): content}, None
    if len(facts) > 1:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        manifest = files.pop(_MANIFEST, None)
    clips = tuple(Clip(name, file, *clip) for (name, file), clip in zip(files.items(), facts, strict=True))
    return clips, None if manifest is None else json.loads(manifest)


def _values(header: str) -> list[Any]:
    """Return the comma-separated JSON values of a header."""
    return json.loads(f"[{header}]")


def _file_name(disposition: str) -> str:
    """Return the file name in a Content-Disposition header, without folders, so that it cannot lead to another one."""
    message = Message()
    message["content-disposition"] = disposition
    return Path(message.get_filename("audio")).name


def _read_progress(sent: Mapping[str, Any]) -> JobProgress:
    progress = (sent["stage"], sent["fraction"], sent["eta_seconds"], sent["queue_position"])
    return JobProgress(*progress, message=sent.get("message"))


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
