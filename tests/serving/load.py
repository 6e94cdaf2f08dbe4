"""A load on a server while a test breaks something: clients that send requests and jobs, and record the outcomes."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tests.patience import wait_until

_OVER = ("succeeded", "failed", "cancelled")
_PAUSE_S = 0.2  # between two requests of a client
# Between two jobs of a client. Jobs come faster than they are run, so a queue builds up, but not a long one.
_PAUSE_OF_JOBS_S = 1.0
_TIMES = 6  # how many more answered requests and accepted jobs `wait_for_progress` waits for
_BODY = {"prompt": "rain", "duration": 1, "steps": 4}


def finished(client: httpx.Client, job_id: str) -> dict[str, Any]:
    """Wait until the job has ended, and check that it has succeeded. Return the job."""

    def over() -> dict[str, Any]:
        job = client.get(f"/jobs/{job_id}").raise_for_status().json()
        return job if job["status"] in _OVER else {}

    job = wait_until(over)
    assert job["status"] == "succeeded", job
    return job


class Load:
    """Within its context, two clients submit jobs, retrying after refusals, and two clients generate audio."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self._ended = threading.Event()
        self.jobs: dict[str, str] = {}  # idempotency key of each accepted job -> its id
        self.times_s: list[float] = []  # how long each answered request took
        self.failures: list[str] = []
        self.refusals: list[str] = []  # path and body of each response with Retry-After

    def __enter__(self) -> Load:
        self._pool = ThreadPoolExecutor(4)
        calls = [(self._submit, _PAUSE_OF_JOBS_S), (self._generate, _PAUSE_S)] * 2
        self._callers = [self._pool.submit(self._repeat, call, pause_s) for call, pause_s in calls]
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._pool.shutdown()
        for caller in self._callers:
            caller.result()

    def __str__(self) -> str:
        answers = f"{len(self.times_s)} answers, slowest {max(self.times_s, default=0.0):.1f} s, {len(self.jobs)} jobs"
        return f"{answers}; {len(self.failures)} failed, {len(self.refusals)} refused with a retry time"

    def wait_for_progress(self, times: int = _TIMES) -> None:
        """Wait until `times` more requests are answered and `times` more jobs are accepted."""
        num_answers, num_jobs = len(self.times_s) + times, len(self.jobs) + times
        wait_until(lambda: len(self.times_s) >= num_answers and len(self.jobs) >= num_jobs)

    def finished_jobs(self) -> list[dict[str, Any]]:
        """Wait until all accepted jobs have ended, and check that each has succeeded and has its own id.

        Return them.
        """
        jobs = [finished(self._client, job_id) for job_id in self.jobs.values()]
        assert len({job["id"] for job in jobs}) == len(self.jobs)
        return jobs

    def _repeat(self, call: Callable[[], None], pause_s: float) -> None:
        while not self._ended.is_set():
            try:
                call()
            except httpx.TransportError as error:
                self.failures.append(f"{call.__name__}: {error!r}")
            time.sleep(pause_s)

    def _submit(self) -> None:
        key = str(uuid.uuid4())
        while self._is_retryable(answer := self._post("/jobs", headers={"Idempotency-Key": key})):
            time.sleep(float(answer.headers["retry-after"]) / 4)
        if answer.status_code == 202:
            self.jobs[key] = answer.json()["id"]
        else:
            self.failures.append(f"/jobs: {answer.status_code} {answer.text}")

    def _generate(self) -> None:
        began_at = time.monotonic()
        answer = self._post("/generate")
        if answer.status_code == 200:
            self.times_s.append(time.monotonic() - began_at)
        elif not self._is_retryable(answer):
            self.failures.append(f"/generate: {answer.status_code} {answer.text}")

    def _is_retryable(self, answer: httpx.Response) -> bool:
        is_told = answer.status_code == 503 and "retry-after" in answer.headers
        if is_told:
            self.refusals.append(f"{answer.request.url.path}: {answer.text}")
        return is_told

    def _post(self, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
        return self._client.post(path, json=_BODY, headers=headers)
