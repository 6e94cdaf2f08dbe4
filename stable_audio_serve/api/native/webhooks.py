"""Webhook body of the native API when a job ends: event type, time and job status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stable_audio_serve.api.native.status import brief, describe, iso
from stable_audio_serve.artifacts.store import ArtifactStore
from stable_audio_serve.jobs.job import Job


def webhook_body(job: Job, *, files: ArtifactStore) -> Mapping[str, Any]:
    """Return the webhook body of an ended job. The function blocks. Raises StorageError.

    Links begin with the host name that the client used when it submitted the job.
    """
    return {
        "type": f"job.{job.state}",
        "timestamp": iso(job.completed_at or job.created_at),
        "data": brief(describe(job, files, base=job.spec.wire["base_url"])).model_dump(),
    }
