"""The webhook body that is sent, in fal's format, when a queued request ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stable_audio_serve.api.compat.fal.errors import failure_of
from stable_audio_serve.api.compat.fal.run import describe_output
from stable_audio_serve.api.compat.fal.wire import File
from stable_audio_serve.api.links import file_url
from stable_audio_serve.jobs.job import Job


def webhook_body(job: Job) -> Mapping[str, Any]:
    """Return the webhook body of an ended job: its output, or the same error as on the result route.

    Links begin with the host name that the client used when it submitted the job.
    """
    ids = {"request_id": job.spec.id, "gateway_request_id": job.spec.id}
    if job.result is None:
        failure = failure_of(job)
        return {**ids, "status": "ERROR", "payload": failure.body, "error": failure.message}
    wire, stored = job.spec.wire, job.result.file
    file = File.of(stored, url=file_url(wire["base_url"], job.result))
    output = describe_output(file, wire, seed=job.result.seeds[0], prompt=job.spec.request.prompt)
    return {**ids, "status": "OK", "payload": output.model_dump()}
