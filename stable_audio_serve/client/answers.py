"""What the server answers, as values. Keys that a newer server adds are ignored; times are aware datetimes."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from stable_audio_serve.client.headers import read_file_name, read_recipes, read_timings, read_values, read_warnings
from stable_audio_serve.core.errors import CancelledRequestError, ConflictError, GenerationError

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Clip:
    """One variation: an audio file with its seed and what it sounds like.

    `peak` is the largest absolute sample, 1 = full scale; `loudness_lufs` is None under 0.4 s and without sound.
    `recipe` is what made it, for `replay`; None where the server did not tell it, but the file may carry it.
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
class Take:
    """The audio of one request or job: one clip per variation.

    `timings_ms` has the milliseconds of each stage; it and `request_id` are empty for a job. `replay` is set of a take
    that was made again: exact = the bytes of the first time, close = made on something else. `warnings` are sentences
    about what of the request had no effect, such as the end of a prompt that is longer than the model reads.
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
        """The seed of the first variation, with which the same request gives the same audio."""
        return self.clips[0].seed

    def save(self, path: str | Path) -> Path:
        """Write the file of the first variation. Returns its path. Raises OSError."""
        return self.clips[0].save(path)


@dataclass(frozen=True, slots=True)
class JobProgress:
    """How far a job is: `fraction` in 0..1. `message` is a line for a log, with what arrives as an event."""

    stage: str
    fraction: float
    eta_s: float | None
    queue_position: int | None
    message: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A job as the server last described it. `sent` has everything that it said."""

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
        """Whether nothing will happen to it any more by itself."""
        return self.status in {"succeeded", "failed", "cancelled"}

    @property
    def bucket_url(self) -> str | None:
        """The link to its audio that leads past the server, to an object store; None where there is none."""
        url = self.download_url
        if self.sent.get("storage_backend") != "s3" or url is None or url.endswith(f"/jobs/{self.id}/audio"):
            return None
        return url


@dataclass(frozen=True, slots=True)
class JobPage:
    """A page of the caller's jobs, newest first; `next_cursor` leads to the next one, None on the last."""

    jobs: tuple[Job, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Model:
    """A served model. `sent` has everything that the server said of it."""

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


def read_take(response: httpx.Response) -> Take:
    """Returns the take of a successful answer. Raises GenerationError if that is not one of this API."""
    try:
        return _read_take(response)
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise GenerationError(f"the server's answer cannot be understood: {error}") from error


def read_job_take(job: Job, content: bytes, *, disposition: str) -> Take:
    """Returns the take that a job's file is. Raises GenerationError if it does not fit the job."""
    try:
        facts = [(clip["seed"], clip["peak"], clip["loudness"], clip["silent"]) for clip in job.sent["clips"]]
        recipes = job.sent.get("recipes") or [None] * len(facts)
        clips = [(*clip, recipe) for clip, recipe in zip(facts, recipes, strict=True)]
        take = _make_take(
            content, read_file_name(disposition), clips=clips, model=job.model, rate_hz=job.sent["sample_rate"]
        )
        return replace(take, warnings=tuple(job.sent.get("warnings", ())))
    except (KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise GenerationError(f"the job's file cannot be understood: {error}") from error


def read_job(sent: Mapping[str, Any]) -> Job:
    """Returns the job that a JSON object describes."""
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
        progress=read_progress(sent["progress"]),
        seeds=tuple(sent["seeds"]),
        sent=sent,
    )


def require_success(job: Job) -> None:
    """Raises GenerationError or CancelledRequestError for a job without audio, ConflictError for one not yet over."""
    if job.status == "cancelled":
        raise CancelledRequestError(f"the job {job.id} was cancelled")
    if job.status == "failed":
        raise GenerationError(job.error or f"the job {job.id} failed")
    if job.status != "succeeded":
        raise ConflictError(f"the job {job.id} has no audio yet: it is {job.status}", code="job_is_not_over")


def read_progress(sent: Mapping[str, Any]) -> JobProgress:
    """Returns the progress that a JSON object describes."""
    return JobProgress(
        stage=sent["stage"],
        fraction=sent["fraction"],
        eta_s=sent["eta_seconds"],
        queue_position=sent["queue_position"],
        message=sent.get("message"),
    )


def place_file(response: httpx.Response, path: Path) -> Path:
    """Returns where a downloaded file belongs: `path`, or where that is a folder, in it by the server's name for it."""
    if not path.is_dir():
        return path
    disposition = response.headers.get("content-disposition")
    return path / (read_file_name(disposition) if disposition else Path(response.url.path).name)


def read_page(sent: Mapping[str, Any]) -> JobPage:
    """Returns the page that a JSON object describes."""
    return JobPage(tuple(read_job(job) for job in sent["jobs"]), sent["next_cursor"])


def read_models(sent: Mapping[str, Any]) -> tuple[Model, ...]:
    """Returns the models of the list that a JSON object is."""
    return tuple(
        Model(
            name=model["id"],
            aliases=tuple(model["aliases"]),
            description=model["description"],
            is_default=model["is_default"],
            max_duration_s=model["max_duration_s"],
            sample_rate_hz=model["sample_rate_hz"],
            channels=model["channels"],
            default_steps=model["default_steps"],
            default_cfg_scale=model["default_cfg_scale"],
            sent=model,
        )
        for model in sent["data"]
    )


def _read_take(response: httpx.Response) -> Take:
    headers = response.headers
    seeds = read_values(headers.get("x-seeds") or headers["x-seed"])
    clips = zip(
        seeds,
        read_values(headers["x-audio-peak"]),
        read_values(headers["x-audio-loudness"]),
        read_values(headers["x-audio-silent"]),
        read_recipes(headers.get("x-recipe", "")) or [None] * len(seeds),
        strict=True,
    )
    take = _make_take(
        response.content,
        read_file_name(headers["content-disposition"]),
        clips=list(clips),
        model=headers["x-model"],
        rate_hz=int(headers["x-sample-rate"]),
    )
    return replace(
        take,
        request_id=headers["x-request-id"],
        timings_ms=read_timings(headers["server-timing"]),
        replay=headers.get("x-replay"),
        warnings=read_warnings(headers.get("warning", "")),
    )


def _make_take(content: bytes, file_name: str, *, clips: Sequence[tuple[Any, ...]], model: str, rate_hz: int) -> Take:
    """`clips` are the facts of each variation: seed, peak, loudness, whether it is silent, recipe."""
    files, manifest = {file_name: content}, None
    if len(clips) > 1:
        files, manifest = _unzip(content)
    made = tuple(Clip(name, file, *facts) for (name, file), facts in zip(files.items(), clips, strict=True))
    return Take(made, model, rate_hz, manifest=manifest)


def _unzip(content: bytes) -> tuple[dict[str, bytes], Mapping[str, Any] | None]:
    """Returns the files of a ZIP in its order, and its manifest if it has one."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    manifest = files.pop(MANIFEST, None)
    return files, None if manifest is None else json.loads(manifest)


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
