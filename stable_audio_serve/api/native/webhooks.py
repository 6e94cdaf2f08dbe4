"""What our own API tells a webhook at the end of a job: the event's name, its time, and the job's status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stable_audio_serve.api.native.status import describe, iso
from stable_audio_serve.artifacts.store import ArtifactStore
from stable_audio_serve.jobs.job import Job


def webhook_body(job: Job, *, files: ArtifactStore) -> Mapping[str, Any]:
    """The event of an ended job. Its links start as the submission's did. Blocking. Raises StorageError."""
    return {
        "type": f"job.{job.state}",
        "timestamp": iso(job.completed_at or job.created_at),
        "data": describe(job, files, base=job.spec.wire["base_url"]).model_dump(),
    }
