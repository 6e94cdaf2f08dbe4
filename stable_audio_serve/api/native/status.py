"""Job descriptions of the native API, used in responses, event streams and webhooks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from operator import not_
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from stable_audio_serve.api.fields import IS_NONE
from stable_audio_serve.api.links import base_url, file_url
from stable_audio_serve.api.native.errors import with_field
from stable_audio_serve.api.native.ignored import cut_prompts
from stable_audio_serve.artifacts.store import ArtifactStore, BackendName
from stable_audio_serve.audio.finish import clip_dict
from stable_audio_serve.audio.recipe import Recipe
from stable_audio_serve.core.generation import Priority
from stable_audio_serve.core.settings import ApiSettings
from stable_audio_serve.jobs.job import Job, JobResult, JobSpec, Mode, State
from stable_audio_serve.jobs.pieces.recipes import recipes_of as job_recipes

_MOST_LISTED_CHARS = 4096
REPLAY_OF = "replay_of"  # the hash of the recipe that a job replays, in `JobSpec.wire`

_TICKET: dict[str, Any] = {
    "id": "68e48e7af36c4d829e3797a0b3e7687c",
    "status": "queued",
    "status_url": "http://localhost:8000/jobs/68e48e7af36c4d829e3797a0b3e7687c",
}
_STATUS: dict[str, Any] = {
    "id": "68e48e7af36c4d829e3797a0b3e7687c",
    "status": "running",
    "mode": "text-to-audio",
    "model": "small-sfx",
    "duration": 10.0,
    "steps": 8,
    "output_count": 1,
    "created_at": "2026-11-20T14:00:00.125000+00:00",
    "started_at": "2026-11-20T14:00:01.250000+00:00",
    "completed_at": None,
    "download_url": None,
    "download_content_type": None,
    "error": None,
    "storage_backend": "local",
    "storage_key": None,
    "sample_rate": None,
    "progress": {"stage": "denoising", "fraction": 0.45, "eta_seconds": 2.1, "queue_position": None},
    "attempts": 1,
    "priority": "interactive",
    "seeds": [3141592653],
    "clips": None,
    "device": None,
    "dtype": None,
    "recipes": None,
    "warnings": [],
}


class JobTicket(BaseModel):
    """An accepted job."""

    model_config = ConfigDict(json_schema_extra={"examples": [_TICKET]})

    id: str = Field(description="32 hexadecimal digits.")
    status: Literal["queued"] = "queued"
    status_url: str = Field(description="URL of the job's status.")
    ignored: list[str] = Field(
        default_factory=list,
        exclude_if=not_,
        description="Names of unknown fields and parameters in the request; absent if there are none.",
    )


class JobProgress(BaseModel):
    """Progress of a job."""

    stage: str = Field(description="`queued`, `started`, the current step of the work, or `done`.")
    fraction: float = Field(description="Finished share of the work, 0 to 1.")
    sections_done: int | None = Field(
        None, exclude_if=IS_NONE, description="Number of finished sections; long pieces only."
    )
    sections: int | None = Field(None, exclude_if=IS_NONE, description="Number of sections; long pieces only.")
    eta_seconds: float | None = Field(description="Last predicted time until the job ends, seconds.")
    queue_position: int | None = Field(
        description="Number of jobs before this one. Once the job has started: number of variations before it in the "
        "engine. 0 = next."
    )


class JobClip(BaseModel):
    """One finished variation."""

    seed: int
    peak: float = Field(description="Largest absolute sample, 1 = full scale.")
    loudness: float | None = Field(
        description="Integrated loudness (ITU-R BS.1770), LUFS; null under 0.4 s and for silence."
    )
    silent: bool = Field(description="No sample reaches -70 dBFS.")
    true_peak: float | None = Field(
        None, description="True peak, dBTP; absent without a target loudness.", exclude_if=IS_NONE
    )


class JobStatus(BaseModel):
    """A job's current status. Values that are not known yet are null."""

    model_config = ConfigDict(json_schema_extra={"examples": [_STATUS]})

    id: str
    status: State
    mode: Mode
    model: str
    duration: float = Field(description="Seconds.")
    steps: int | None
    output_count: int = Field(description="Number of variations.")
    created_at: str = Field(description="ISO 8601 with UTC offset, like the other times.")
    started_at: str | None
    completed_at: str | None
    download_url: str | None
    download_content_type: str | None
    error: str | None
    storage_backend: BackendName
    storage_key: str | None
    sample_rate: int | None = Field(description="Hertz.")
    progress: JobProgress
    attempts: int = Field(
        description="How often a runner has started the job; of a long piece, 1 again after each finished section."
    )
    priority: Priority
    seeds: list[int] = Field(description="Seed of each variation, also if the request left it random.")
    clips: list[JobClip] | None = Field(description="The variations of a job that succeeded.")
    device: str | None = Field(description="Device that made the audio: cuda, mps or cpu.")
    dtype: str | None = Field(description="Precision of the denoiser: float32, float16 or bfloat16.")
    recipes: tuple[Recipe, ...] | None = Field(
        description="Recipe of each variation of a job that succeeded. Lists and webhooks leave recipes out if their "
        f"prompts have more than {_MOST_LISTED_CHARS} characters in total."
    )
    replay: Literal["exact", "close"] | None = Field(
        None,
        exclude_if=IS_NONE,
        description="Only if the job recreated a long piece: exact = same bytes as the original.",
    )
    warnings: list[str] = Field(
        description="Parts of the request without effect, for example the end of a long prompt."
    )


class JobPage(BaseModel):
    """Some of the caller's jobs, newest first."""

    jobs: list[JobStatus]
    next_cursor: str | None = Field(description="Cursor of the next page; null = this is the last page.")
    ignored: list[str] = Field(
        default_factory=list,
        exclude_if=not_,
        description="Names of unknown parameters in the request; absent if there are none.",
    )


def jobs_base(request: Request, *, limits: ApiSettings) -> str:
    """Return the beginning of links to jobs and files: the scheme, host and path prefix of the current request."""
    path: str = request.scope["path"]
    prefix = path.removeprefix(request.scope.get("root_path", "")).rpartition("/jobs")[0]
    return f"{base_url(request, limits)}{prefix}"


def job_url(base: str, job_id: str) -> str:
    """Return the URL of a job. `base` is the result of `jobs_base`."""
    return f"{base}/jobs/{job_id}"


def describe(job: Job, files: ArtifactStore, *, base: str, position: int | None = None) -> JobStatus:
    """Return the status of a job. `base` is the result of `jobs_base`. `position` is the queue position, if known.

    The link to the audio leads to the bucket that stores the audio, or to this server if a local folder stores it. The
    function blocks. Raises StorageError.
    """
    request, result = job.spec.request, job.result
    made_on = result.file.made_on if result else None
    return JobStatus(
        id=job.spec.id,
        status=job.state,
        mode=job.spec.mode,
        model=job.spec.model,
        duration=request.duration_s,
        steps=request.steps,
        output_count=request.batch_size,
        created_at=job.created_at.isoformat(),
        started_at=job.started_at.isoformat() if job.started_at else None,
        completed_at=job.completed_at.isoformat() if job.completed_at else None,
        download_url=files.url(result.file) or _audio_url(base, job.spec, result=result) if result else None,
        download_content_type=result.file.media_type if result else None,
        error=with_field(job.error) if job.error else None,
        storage_backend=files.backend_name,
        storage_key=files.bucket_key(result.file) or job.spec.id if result else None,
        sample_rate=result.sample_rate_hz if result else None,
        progress=progress_of(job, position=position),
        attempts=job.attempts,
        priority=job.spec.request.priority,
        seeds=list(request.seeds),
        clips=[JobClip(**clip_dict(clip)) for clip in result.file.clips] if result else None,
        device=made_on.device if made_on else None,
        dtype=made_on.dtype if made_on else None,
        recipes=(recipes := recipes_of(job)),
        replay=_compare(job, recipes),
        warnings=cut_prompts(made_on),
    )


def brief(status: JobStatus) -> JobStatus:
    """Return the status without long recipes, for lists and webhooks.

    Each variation's recipe repeats the prompt, up to 100,000 characters. A list of 100 jobs could be too large.
    """
    is_long = sum(recipe.num_prompt_chars for recipe in status.recipes or ()) > _MOST_LISTED_CHARS
    return status.model_copy(update={"recipes": None}) if is_long else status


def recipes_of(job: Job) -> tuple[Recipe, ...] | None:
    """Return the recipe of each variation, or None if the job has no audio, or no data for recipes."""
    spec, result = job.spec, job.result
    made_on = result.file.made_on if result else None
    if result is None or made_on is None or not spec.with_recipe:
        return None
    return job_recipes(spec, seeds=result.seeds, made_on=made_on, different=result.different)


def hash_recipe(recipe: Recipe) -> str:
    """Return the SHA-256 of a recipe. In strict mode, recipes with the same hash make files with the same bytes."""
    return hashlib.sha256(recipe.to_json().encode()).hexdigest()


def _compare(job: Job, recipes: tuple[Recipe, ...] | None) -> Literal["exact", "close"] | None:
    """Return `exact` if the job's file has the same bytes as the file whose recipe the job replayed, otherwise `close`.

    Returns None if the job was no replay, or has no recipe.
    """
    original = job.spec.wire.get(REPLAY_OF)
    if original is None or not recipes:
        return None
    recipe = recipes[0]
    is_strict = recipe.made_on.mode == "strict" and recipe.checkpoint is not None
    return "exact" if is_strict and hash_recipe(recipe) == original else "close"


def _audio_url(base: str, spec: JobSpec, *, result: JobResult) -> str:
    """Return a download link that needs no key.

    The link must be hard to guess, so it contains the file's random id if the client chose the job id.
    """
    return file_url(base, result) if spec.id_is_chosen else f"{job_url(base, spec.id)}/audio"


def progress_of(job: Job, *, position: int | None) -> JobProgress:
    """Return the progress of a job. If `position` is None, the queue position is the one that the engine reported."""
    return JobProgress(
        stage=job.stage,
        fraction=job.fraction,
        sections_done=job.num_sections if job.spec.sections else None,
        sections=len(job.spec.sections) or None,
        eta_seconds=job.eta_s,
        queue_position=job.engine_position if position is None else position,
    )


def webhook_body(job: Job, *, files: ArtifactStore) -> Mapping[str, Any]:
    """Return the webhook body of an ended job. The function blocks. Raises StorageError.

    Links begin with the host name that the client used when it submitted the job.
    """
    return {
        "type": f"job.{job.state}",
        "timestamp": (job.completed_at or job.created_at).isoformat(),
        "data": brief(describe(job, files, base=job.spec.wire["base_url"])).model_dump(),
    }
