"""What each dialect tells a webhook at the end of a job; the job runner asks, and knows no dialect itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stable_audio_serve.api.compat import fal
from stable_audio_serve.api.native import webhooks as native
from stable_audio_serve.jobs.job import Contract, Job
from stable_audio_serve.jobs.notifier import WebhookBody

_BODIES: Mapping[Contract, WebhookBody] = {"sa3": native.webhook_body, "fal": fal.webhook_body}


def webhook_body(job: Job) -> Mapping[str, Any]:
    """The JSON body for an ended job, in the form of the dialect that accepted it."""
    return _BODIES[job.spec.contract](job)
