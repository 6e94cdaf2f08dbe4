"""Deliver the webhooks of ended jobs: claim them from the outbox, send them, and retry with growing pauses.

A webhook in the outbox is called a notice. It is sent with the headers of Standard Webhooks
(standardwebhooks.com): an id that is the same for all attempts, the time of the attempt, and if a secret is configured,
a signature of id, time and body. This module does not depend on runners or on the HTTP API that a job was submitted
with.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pydantic_core
import standardwebhooks
import structlog

from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.core.ids import ClientId
from stable_audio_serve.core.metrics import Metrics, NullMetrics
from stable_audio_serve.core.settings import JobSettings
from stable_audio_serve.jobs.job import Job
from stable_audio_serve.jobs.store.outbox import Notice, Outbox
from stable_audio_serve.jobs.webhooks.delivery import DELIVERY_TIMEOUT_S, DeliveryError, post_json

log = structlog.get_logger("stable_audio_serve.jobs")

# A function that returns the body of the webhook for an ended job. It must return the same body for each retry.
WebhookBody = Callable[[Job], Mapping[str, Any]]

RETRY_DELAYS_S = (5.0, 30.0, 120.0, 600.0, 1800.0, 7200.0, 18_000.0)
_JITTER = 0.2  # delays vary by up to this share, so that notices that failed together are not retried together
_CLAIM_S = 2 * DELIVERY_TIMEOUT_S
_MAX_AT_ONCE = 32
# Most deliveries at a time of an API key to one host, of an API key, and to a host: slow hosts do not use up
# `_MAX_AT_ONCE`, and slow URLs of one client do not delay other clients' webhooks to the same host.
_MAX_PER_CLIENT_AND_HOST = 4
_MAX_PER_CLIENT = _MAX_PER_HOST = 16


class Notifier:
    """Delivers webhooks in background tasks, so that a slow receiver does not delay jobs or other webhooks."""

    def __init__(
        self,
        outbox: Outbox,
        body: WebhookBody,
        *,
        settings: JobSettings,
        retry_delays_s: Collection[float] = RETRY_DELAYS_S,
        metrics: Metrics | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`retry_delays_s` are the delays before the retries of a notice. After the last retry, the notice is removed.

        Call `start` to begin.
        """
        self._outbox = outbox
        self._body = body
        self._allow_hosts = settings.webhook_allow_hosts
        secret = settings.webhook_secret
        self._signer = standardwebhooks.Webhook(secret.get_secret_value()) if secret else None
        self._retry_delays_s = tuple(retry_delays_s)
        self._metrics = metrics or NullMetrics()
        self._clock = clock or SystemClock()
        self._running: Counter[tuple[ClientId, str]] = Counter()  # deliveries in progress, by client and host
        self._served: set[ClientId] = set()  # clients that have had their turn
        self._deliveries: set[asyncio.Task[None]] = set()
        self._due = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the background task."""
        self._loop_task = asyncio.create_task(self._run_loop())

    def deliver_due(self) -> None:
        """Let the background task deliver the notices that are due now."""
        self._due.set()

    async def close(self) -> None:
        """Stop all deliveries. Notices that were not delivered stay in the outbox."""
        tasks = set(self._deliveries)
        if self._loop_task is not None:
            tasks.add(self._loop_task)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run_loop(self) -> None:
        while True:
            await self._due.wait()
            self._due.clear()
            try:
                while len(self._deliveries) < _MAX_AT_ONCE and (notice := await self._claim()) is not None:
                    self._begin(notice)
            except StorageError:
                log.warning("webhooks are delayed: the job database cannot be used")
            except Exception:  # the loop continues, and tries again at the next call of `deliver_due`
                log.exception("webhooks cannot be delivered")

    async def _claim(self) -> Notice | None:
        clients, hosts = Counter[ClientId](), Counter[str]()
        for (client, host), count in self._running.items():
            clients[client] += count
            hosts[host] += count
        claim = partial(
            self._outbox.claim,
            for_s=_CLAIM_S,
            except_hosts=[host for host, count in hosts.items() if count >= _MAX_PER_HOST],
            except_pairs=[pair for pair, count in self._running.items() if count >= _MAX_PER_CLIENT_AND_HOST],
        )
        full = {client for client, count in clients.items() if client and count >= _MAX_PER_CLIENT}
        # Clients take turns. Otherwise, one that has many webhooks, which fail quickly, would delay those of others.
        notice = await asyncio.to_thread(claim, except_clients=full | self._served)
        if notice is None and self._served:
            self._served.clear()
            notice = await asyncio.to_thread(claim, except_clients=full)
        if notice is not None and notice.job.spec.client:  # without keys, there is only one client
            self._served.add(notice.job.spec.client)
        return notice

    def _begin(self, notice: Notice) -> None:
        pair = notice.job.spec.client, notice.host
        self._running[pair] += 1
        task = asyncio.create_task(self._deliver(notice))
        self._deliveries.add(task)

        def end(_: asyncio.Task[None]) -> None:
            self._deliveries.discard(task)
            self._running[pair] -= 1
            self._running += Counter()  # removes pairs whose count is 0
            self._due.set()  # there is room for another delivery

        task.add_done_callback(end)

    async def _deliver(self, notice: Notice) -> None:
        spec = notice.job.spec
        with structlog.contextvars.bound_contextvars(job_id=spec.id, contract=spec.contract, attempt=notice.attempt):
            try:
                body = pydantic_core.to_json(await asyncio.to_thread(self._body, notice.job))
                headers = self._headers(notice.id, body)
                await post_json(notice.url, body, headers=headers, client=spec.client, allow_hosts=self._allow_hosts)
            except DeliveryError as error:
                reason = str(error)
            except Exception:  # an error in `_body` must not delay other notices
                log.exception("webhook failed")
                reason = "its body could not be built"
            else:
                reason = ""
            try:
                await self._record_outcome(notice, failure=reason)
            except StorageError:
                log.warning("webhook may be delivered twice: its outcome could not be stored")

    async def _record_outcome(self, notice: Notice, *, failure: str) -> None:
        """Record the outcome of an attempt: remove the notice from the outbox, or schedule a retry.

        `failure` is the reason why the attempt failed, or '' if the notice was delivered.
        """
        is_last = notice.attempt > len(self._retry_delays_s)
        outcome = "delivered" if not failure else "given_up" if is_last else "failed"
        self._metrics.increment("webhooks", outcome=outcome)
        if outcome == "failed":
            delay_s = self._retry_delays_s[notice.attempt - 1] * random.uniform(1 - _JITTER, 1 + _JITTER)
            log.warning("webhook not delivered", reason=failure, retry_in_s=round(delay_s, 1))
            await asyncio.to_thread(self._outbox.postpone, notice, delay_s=delay_s)
            return
        log.info("webhook ended", outcome=outcome, reason=failure)
        await asyncio.to_thread(self._outbox.remove, notice)

    def _headers(self, notice_id: str, body: bytes) -> Mapping[str, str]:
        now = datetime.fromtimestamp(self._clock.time(), UTC)
        headers = {"webhook-id": notice_id, "webhook-timestamp": str(int(now.timestamp()))}
        if self._signer is None:
            return headers
        return headers | {"webhook-signature": self._signer.sign(notice_id, now, body.decode())}
