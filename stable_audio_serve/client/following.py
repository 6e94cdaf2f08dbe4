"""What arrives of a job's event stream, and when to read its status instead. Sends nothing."""

from __future__ import annotations

import json

import httpx_sse

from stable_audio_serve.client.answers import Job, JobProgress, read_job, read_progress
from stable_audio_serve.core.errors import GenerationError

POLL_S = 1.0
_MOST_BROKEN = 3  # streams in a row that brought nothing: there is a proxy between that does not pass them on


class Following:
    """One job's stream: goes on after a lost connection where it broke off."""

    def __init__(self) -> None:
        self._last_id: str | None = None
        self._num_broken = 0
        self._pause_s = 0.5

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the next connection."""
        last = {"Last-Event-ID": self._last_id} if self._last_id is not None else {}
        return {"Accept": "text/event-stream", "Cache-Control": "no-store", **last}

    def read(self, event: httpx_sse.ServerSentEvent) -> JobProgress | Job | None:
        """Returns what an event says: the job itself when it is over. Raises GenerationError."""
        self._num_broken = 0
        if event.id:
            self._last_id = event.id
        if event.retry is not None:
            self._pause_s = event.retry / 1000.0
        try:
            if event.event == "progress":
                return read_progress(json.loads(event.data))
            if event.event == "end":
                return read_job(json.loads(event.data))
        except (KeyError, ValueError) as error:
            raise GenerationError(f"an event of the job cannot be understood: {error}") from error
        return None

    def pause_s(self) -> float | None:
        """Returns how long to wait before the next connection, seconds; None = ask for the job's status from now on."""
        self._num_broken += 1
        return None if self._num_broken >= _MOST_BROKEN else self._pause_s
