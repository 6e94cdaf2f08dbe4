"""The webhook body of each dialect at the end of a job, so that the job runner is independent of dialects."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from stable_audio_serve.api.compat import fal
from stable_audio_serve.api.native import webhooks as native
from stable_audio_serve.artifacts.store import ArtifactStore
from stable_audio_serve.jobs.job import Contract
from stable_audio_serve.jobs.webhooks.notifier import WebhookBody


def webhook_bodies(files: ArtifactStore) -> WebhookBody:
    """Returns a function that builds an ended job's JSON body in the form of its dialect. Blocking."""
    bodies: Mapping[Contract, WebhookBody] = {
        "sa3": partial(native.webhook_body, files=files),
        "fal": fal.webhook_body,
    }
    return lambda job: bodies[job.spec.contract](job)
