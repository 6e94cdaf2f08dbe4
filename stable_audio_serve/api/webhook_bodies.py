"""Build the webhook body of an ended job in the format of the job's dialect.

The webhook code in `jobs` gets `webhook_bodies` as an argument, so that it does not depend on dialects.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from stable_audio_serve.api.compat import fal
from stable_audio_serve.api.native.status import webhook_body
from stable_audio_serve.artifacts.store import ArtifactStore
from stable_audio_serve.jobs.job import Contract
from stable_audio_serve.jobs.webhooks.notifier import WebhookBody


def webhook_bodies(files: ArtifactStore) -> WebhookBody:
    """Return a function that builds the webhook body of an ended job. The function blocks."""
    bodies: Mapping[Contract, WebhookBody] = {
        "sa3": partial(webhook_body, files=files),
        "fal": fal.webhook_body,
    }
    return lambda job: bodies[job.spec.contract](job)
