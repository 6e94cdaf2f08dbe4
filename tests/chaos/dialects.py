"""Makes the requests that submit a planned job (order), poll it and fetch its audio, and parses the answers.

Requests and answers differ between the APIs of the server (dialects).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

from tests.chaos.orders import Order

State = Literal["waiting", "succeeded", "failed"]


@dataclass(frozen=True, slots=True)
class Look:
    """A job's status: its state, the URL of the audio file if the job succeeded, and the error if it failed."""

    state: State
    file_url: str = ""
    error: str = ""


def submission(order: Order, *, webhook_url: str) -> dict[str, Any]:
    """Return the arguments of httpx's `request` that submit a planned job."""
    hook = {"webhook_url": webhook_url} if order.has_webhook else {}
    headers = {} if order.key is None else {"Idempotency-Key": order.key}
    if order.kind == "variation":
        files = {"audio": ("clip.wav", order.clip, "audio/wav")}
        form = {name: str(value) for name, value in order.controls.items()} | hook
        return {"method": "POST", "url": "/jobs/variations", "data": form, "files": files, "headers": headers}
    if order.kind == "aiml":
        return {"method": "POST", "url": "/v2/generate/audio", "json": {"model": "stable-audio", **_hosted(order)}}
    if order.kind == "fal":
        query = {"fal_webhook": webhook_url} if order.has_webhook else {}
        return {"method": "POST", "url": "/queue/fal-ai/stable-audio", "params": query, "json": _hosted(order)}
    if order.kind == "chosen":
        return {"method": "PUT", "url": f"/jobs/{order.key}", "json": order.controls | hook}
    return {"method": "POST", "url": "/jobs", "json": order.controls | hook, "headers": headers}


def job_id(order: Order, reply: Any) -> str:
    """Return the job id in the answer to a submission. Raises KeyError, TypeError."""
    found: str = reply["request_id" if order.kind == "fal" else "id"]
    return found


def status_path(order: Order, job: str) -> str:
    """Return the path of a job's status."""
    if order.kind == "aiml":
        return f"/v2/generate/audio?generation_id={quote(job)}"
    return f"{result_path(job)}/status" if order.kind == "fal" else f"/jobs/{job}"


def result_path(job: str) -> str:
    """Return the path at which fal's API returns the output of a completed job."""
    return f"/queue/fal-ai/stable-audio/requests/{job}"


def read_status(order: Order, reply: Any) -> Look:
    """Parse the JSON answer from `status_path`. For fal's API, `file_url` stays empty. Raises KeyError, TypeError."""
    status = reply["status"]
    if status in ("queued", "running", "generating", "IN_QUEUE", "IN_PROGRESS"):
        return Look("waiting")
    if reply.get("error") is not None or status not in ("succeeded", "completed", "COMPLETED"):
        return Look("failed", error=f"{status}: {reply.get('error')}")
    if order.kind == "fal":
        return Look("succeeded")
    return Look("succeeded", file_url=reply["audio_file"]["url"] if order.kind == "aiml" else reply["download_url"])


def _hosted(order: Order) -> dict[str, Any]:
    return {"prompt": order.controls["prompt"], "seconds_total": order.duration_s, "steps": order.steps}
