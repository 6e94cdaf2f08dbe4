"""Value objects for the server's responses, and the functions that parse them.

The parsers ignore unknown keys. All datetimes are aware (they have a time zone).
"""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from datetime import datetime
from email.message import Message
from pathlib import Path
from typing import Any, BinaryIO

import httpx
import httpx_sse

from stable_audio_serve.core.errors import CancelledRequestError, ConflictError, GenerationError

_MANIFEST = "manifest.json"
# One entry of the Warning header, for example: 299 - "a sentence". Commas separate several entries.
_WARNING = re.compile(r'299 \S+ "((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Clip:
    """One variation: an audio file with its seed and measurements.

    `peak` is the largest absolute sample, 1 = full scale. `loudness_lufs` is None for silence and for audio shorter
    than 0.4 s. `recipe` describes how the clip was made: pass it to `Client.replay` to recreate the clip. `recipe` is
    None if the response had no recipe. Even then, the audio file may contain one. `true_peak_dbtp` is None unless the
    request had a target loudness.
    """

    file_name: str
    content: bytes = field(repr=False)
    seed: int
    peak: float
    loudness_lufs: float | None
    is_silent: bool
    recipe: Mapping[str, Any] | None = field(default=None, repr=False)
    true_peak_dbtp: float | None = None

    def save(self, path: str | Path) -> Path:
        """Write the audio file to `path`, and return `path`. Raises OSError; then a former file there is unchanged."""
        path = Path(path)
        with whole_file(path) as file:
            file.write(self.content)
        return path


@dataclass(frozen=True, slots=True)
class Result:
    """The audio of one request or job: one clip per variation.

    `timings_ms` is the time that the server spent in each stage, in milliseconds. A job's result has no `timings_ms`
    and no `request_id`. `replay` is None unless a clip was recreated from a recipe. "exact" means that the bytes equal
    the original. "close" means that the original was made on another device or with another version. `warnings` are
    sentences about parts of the request that had no effect, such as the end of a prompt that is too long for the model.
    `job_id` is empty unless a job made the audio.
    """

    clips: tuple[Clip, ...]
    model: str
    sample_rate_hz: int
    request_id: str = ""
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    manifest: Mapping[str, Any] | None = None
    replay: str | None = None
    warnings: tuple[str, ...] = ()
    job_id: str = ""

    @property
    def content(self) -> bytes:
        """The audio file of the first variation."""
        return self.clips[0].content

    @property
    def seed(self) -> int:
        """The seed of the first variation. The same request with this seed gives the same audio."""
        return self.clips[0].seed

    def save(self, path: str | Path) -> Path:
        """Write the audio file of the first variation to `path`, and return `path`. Raises OSError."""
        return self.clips[0].save(path)


@dataclass(frozen=True, slots=True)
class JobProgress:
    """The progress of a job: `fraction` is between 0 and 1.

    `message` describes the progress in words. Only progress from the event stream has a message. For a job with
    sections, `sections_done` of `num_sections` sections are finished. For other jobs, both are None.
    """

    stage: str
    fraction: float
    eta_s: float | None
    queue_position: int | None
    message: str | None = None
    sections_done: int | None = None
    num_sections: int | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A job's state in one response of the server. `sent` is the JSON object that was parsed."""

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
        return self.status in {"succeeded", "failed", "cancelled"}

    @property
    def bucket_url(self) -> str | None:
        """The link to the audio in an S3 bucket, or None if the audio must be downloaded from the server."""
        url = self.download_url
        if self.sent.get("storage_backend") != "s3" or url is None or url.endswith(f"/jobs/{self.id}/audio"):
            return None
        return url


@dataclass(frozen=True, slots=True)
class JobPage:
    """One page of the list of the caller's jobs, newest first.

    To get the next page, pass `next_cursor` to `Client.jobs.list` as `cursor`. On the last page, `next_cursor` is None.
    """

    jobs: tuple[Job, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Model:
    """A served model. `sent` is the JSON object that was parsed. It may have more keys than this class has fields."""

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


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter (LoRA) of the served model `model`. `sent` is the JSON object that was parsed.

    `type` is lora, dora-rows, lora-xs or dora-rows-xs. `sha256` is the hash of the adapter's file.
    """

    name: str
    model: str
    type: str
    rank: int
    sha256: str
    sent: Mapping[str, Any] = field(repr=False)


def read_result(response: httpx.Response) -> Result:
    """Parse the successful response to a generation or a replay. Raises GenerationError if it has another format."""
    headers = response.headers
    with parsing("the server's answer"):
        seeds = _values(headers.get("x-seeds") or headers["x-seed"])
        # A recipe with `left_out` lacks the fields that are too long for a header, so it cannot be replayed.
        recipes = [None if "left_out" in recipe else recipe for recipe in _values(headers.get("x-recipe", ""))]
        measured = [_values(headers[f"x-audio-{name}"]) for name in ("peak", "loudness", "silent")]
        unknown = [None] * len(seeds)
        true_peaks = _values(headers.get("x-audio-true-peak", "")) or unknown
        facts = zip(seeds, *measured, recipes or unknown, true_peaks, strict=True)
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
    """Return the result of a job whose downloaded file is `content`. Raises GenerationError if the two do not match.

    `disposition` is the Content-Disposition header of the download, which has the file's name.
    """
    with parsing("the job's file"):
        sent = job.sent["clips"]
        facts = [
            (clip["seed"], clip["peak"], clip["loudness"], clip["silent"], recipe, clip.get("true_peak"))
            for clip, recipe in zip(sent, job.sent.get("recipes") or [None] * len(sent), strict=True)
        ]
        clips, manifest = _read_clips(content, disposition, facts=facts)
        warnings = tuple(job.sent.get("warnings", ()))
        return Result(clips, job.model, job.sent["sample_rate"], manifest=manifest, warnings=warnings, job_id=job.id)


def read_job(sent: Mapping[str, Any]) -> Job:
    """Parse a job's JSON object from a response."""
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
    """Parse one server-sent event of a job. Raises GenerationError.

    Returns progress for an event of type "progress", the ended job for type "end", and None for any other type.
    """
    with parsing("an event of the job"):
        if event.event == "progress":
            return _read_progress(json.loads(event.data))
        if event.event == "end":
            return read_job(json.loads(event.data))
    return None


def read_page(sent: Mapping[str, Any]) -> JobPage:
    """Parse the response of GET /jobs: one page of the list of jobs."""
    return JobPage(tuple(read_job(job) for job in sent["jobs"]), sent["next_cursor"])


def read_models(sent: Mapping[str, Any]) -> tuple[Model, ...]:
    """Parse the response of GET /v1/models: return the served models."""
    same = {each.name for each in fields(Model)} - {"name", "aliases", "sent"}  # these have the same name in the JSON
    return tuple(
        Model(name=model["id"], aliases=tuple(model["aliases"]), sent=model, **{name: model[name] for name in same})
        for model in sent["data"]
        if model.get("parent") is None
    )


def read_adapters(sent: Mapping[str, Any]) -> tuple[Adapter, ...]:
    """Parse the response of GET /v1/models: return the adapters of the served models."""
    return tuple(
        Adapter(
            name=entry["id"].removeprefix(f"{entry['parent']}:"),
            model=entry["parent"],
            type=entry["type"],
            rank=entry["rank"],
            sha256=entry["sha256"],
            sent=entry,
        )
        for entry in sent["data"]
        if entry.get("parent") is not None
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
    """Return the path of the file to which the downloaded content of `response` is written.

    If `path` is a folder, the file is in that folder and the server chooses its name. Otherwise the file is `path`.
    """
    if not path.is_dir():
        return path
    disposition = response.headers.get("content-disposition")
    return path / (_file_name(disposition) if disposition else Path(response.url.path).name)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing, and rename it to `path` when the `with` block ends.

    If the block raises an error, the temporary file is deleted. If `path` is a link, the file that it names is
    replaced. A device or pipe is written directly. Raises OSError.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    path = Path(os.path.realpath(path))  # `Path.resolve` raises RuntimeError for links to each other
    temporary = path.parent / f".{path.name[:40]}.{secrets.token_hex(8)}"
    try:
        # `tempfile` is not used, because only the owner can read its files. Giving them normal permissions would need
        # the process's umask, and reading the umask means changing it for a moment, in all threads.
        with temporary.open("xb") as file:
            yield file
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno:
            error.filename = str(path)  # of which the caller knows
        raise


@contextmanager
def parsing(what: str) -> Iterator[None]:
    """In this context, raise GenerationError in place of errors from parsing. The message begins with `what`."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError, zipfile.BadZipFile) as error:
        raise GenerationError(f"{what} cannot be understood: {error}") from error


def _read_clips(
    content: bytes, disposition: str, *, facts: Sequence[tuple[Any, ...]]
) -> tuple[tuple[Clip, ...], Mapping[str, Any] | None]:
    """Return the clips in a downloaded file, and the manifest if the file contains one.

    The file is an audio file, or for several variations a ZIP file of audio files. `facts` has an entry for each
    variation: seed, peak, loudness, whether the audio is silent, recipe, true peak.
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
    """Return the file name in a Content-Disposition header.

    Folders in the name are removed. Otherwise, the file `../name` would be written outside the download's folder.
    """
    message = Message()
    message["content-disposition"] = disposition
    return Path(message.get_filename("audio")).name


def _read_progress(sent: Mapping[str, Any]) -> JobProgress:
    progress = (sent["stage"], sent["fraction"], sent["eta_seconds"], sent["queue_position"])
    done, total = sent.get("sections_done"), sent.get("sections")
    return JobProgress(*progress, message=sent.get("message"), sections_done=done, num_sections=total)


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
