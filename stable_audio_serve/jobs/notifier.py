"""Tells clients that their jobs are over: takes notices from the outbox, retries with growing pauses, gives up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from typing import Any

import pydantic_core
import structlog

from stable_audio_serve.core.metrics import Metrics, NullMetrics
from stable_audio_serve.jobs.job import Job
from stable_audio_serve.jobs.outbox import Notice, Outbox
from stable_audio_serve.jobs.webhooks import DeliveryError, post_json

log = structlog.get_logger("stable_audio_serve.jobs")

# What a dialect says of an ended job; it may be asked more than once and always says the same.
WebhookBody = Callable[[Job], Mapping[str, Any]]

RETRY_DELAYS_S = (2.0, 10.0, 60.0, 300.0)
_MAX_AT_ONCE = 16


class Notifier:
    """Delivers beside the runner's own work, so that no client's slow server delays a job."""

    def __init__(
        self,
        outbox: Outbox,
        body: WebhookBody,
        *,
        allow_hosts: Collection[str] = (),
        retry_delays_s: Collection[float] = RETRY_DELAYS_S,
        metrics: Metrics | None = None,
    ) -> None:
        self._outbox = outbox
        self._body = body
        self._allow_hosts = allow_hosts
        self._retry_delays_s = tuple(retry_delays_s)
        self._metrics = metrics or NullMetrics()
        self._delivering: asyncio.Task[None] | None = None

    def deliver_due(self, *, then: Callable[[], None] = lambda: None) -> None:
        """Start delivering what is due, unless that is going on; `then` is called when nothing is left."""
        if self._delivering is None or self._delivering.done():
            self._delivering = asyncio.create_task(self._deliver_due(then))

    async def close(self) -> None:
        """Stop; what was not delivered stays in the outbox."""
        if self._delivering is not None:
            self._delivering.cancel()
            await asyncio.gather(self._delivering, return_exceptions=True)

    async def _deliver_due(self, then: Callable[[], None]) -> None:
        try:
            while notices := await asyncio.to_thread(self._outbox.due, limit=_MAX_AT_ONCE):
                await asyncio.gather(*(self._deliver(notice) for notice in notices))
        except Exception:  # like the runner's loop: it is asked again at its next turn
            log.exception("webhooks cannot be delivered")
        else:
            then()

    async def _deliver(self, notice: Notice) -> None:
        job_id = notice.job.spec.id
        try:
            body = pydantic_core.to_json(self._body(notice.job))
            await post_json(notice.url, body, allow_hosts=self._allow_hosts)
        except DeliveryError as error:
            await self._failed(notice, str(error))
        except Exception:  # a body that cannot be made must not hold up the others
            log.exception("webhook failed", job_id=job_id)
            await self._failed(notice, "its body could not be made")
        else:
            await asyncio.to_thread(self._outbox.settle, notice)
            log.info("webhook delivered", job_id=job_id)
            self._metrics.increment("webhooks", outcome="delivered")

    async def _failed(self, notice: Notice, reason: str) -> None:
        is_last = notice.num_failures >= len(self._retry_delays_s)
        log.warning("webhook not delivered", job_id=notice.job.spec.id, reason=reason, given_up=is_last)
        self._metrics.increment("webhooks", outcome="given_up" if is_last else "failed")
        if is_last:
            await asyncio.to_thread(self._outbox.settle, notice)
        else:
            delay_s = self._retry_delays_s[notice.num_failures]
            await asyncio.to_thread(self._outbox.postpone, notice, delay_s=delay_s)
