from __future__ import annotations

import asyncio
import json
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
import standardwebhooks
from pydantic import SecretStr

from stable_audio_serve.core.clock import SystemClock
from stable_audio_serve.core.ids import ClientId
from stable_audio_serve.core.settings import JobSettings
from stable_audio_serve.jobs.job import Job
from stable_audio_serve.jobs.store.outbox import Outbox
from stable_audio_serve.jobs.store.tables import JOBS
from stable_audio_serve.jobs.webhooks import delivery, notifier
from stable_audio_serve.jobs.webhooks.notifier import RETRY_DELAYS_S, Notifier
from tests.jobs.conftest import Workshop, make_spec
from tests.patience import PATIENCE_S, until
from tests.recorded_metrics import RecordedMetrics
from tests.webhook_receiver import Receiver, receiving

pytestmark = pytest.mark.server

_SECRET = "whsec_" + "c2VjcmV0" * 5
_FAILURE = b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n"


def body(job: Job) -> Mapping[str, Any]:
    return {"id": job.spec.id, "state": job.state, "prompt": "ä"}


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


def make_notifier(workshop: Workshop, *, settings: Mapping[str, Any] | None = None, **options: Any) -> Notifier:
    job_settings = JobSettings(**{"webhook_allow_hosts": ("127.0.0.1", "localhost"), **(settings or {})})
    outbox = Outbox(workshop.queue.store.database)
    chosen = {"body": body, "retry_delays_s": (0.05, 0.05, 0.05), **options}
    return Notifier(outbox, chosen.pop("body"), settings=job_settings, **chosen)


class TickingClock(SystemClock):
    """A clock that advances by a second each time it is read."""

    def __init__(self) -> None:
        self._now = super().time()

    def time(self) -> float:
        self._now += 1.0
        return self._now


def states(receiver: Receiver) -> list[str]:
    return [json.loads(sent)["state"] for _, _, sent in receiver.requests]


async def test_ended_job_is_notified_once(workshop: Workshop, receiver: Receiver) -> None:
    await workshop.start_runner(notifier=make_notifier(workshop))
    job = await workshop.queue.submit(make_spec(webhook_url=receiver.url))
    silent = await workshop.queue.submit(make_spec())
    await workshop.finished(job)
    await workshop.finished(silent)
    await until(lambda: bool(receiver.requests))
    await workshop.finished(await workshop.queue.submit(make_spec()))
    await until(lambda: not is_waiting(workshop))
    assert [json.loads(sent) for _, _, sent in receiver.requests] == [
        {"id": job.spec.id, "state": "succeeded", "prompt": "ä"}
    ]


async def test_notice_can_be_verified_with_the_public_library(workshop: Workshop, receiver: Receiver) -> None:
    notifier = make_notifier(workshop, settings={"webhook_secret": SecretStr(_SECRET)})
    await workshop.start_runner(notifier=notifier)
    job = await workshop.queue.submit(make_spec(webhook_url=receiver.url))
    await until(lambda: bool(receiver.requests))
    _, headers, sent = receiver.requests[0]
    assert standardwebhooks.Webhook(_SECRET).verify(sent, headers)["id"] == job.spec.id
    assert headers["webhook-id"] == job.spec.id
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(_SECRET).verify(sent.replace(b"succeeded", b"failed"), headers)


async def test_without_a_secret_a_notice_has_id_and_time_only(workshop: Workshop, receiver: Receiver) -> None:
    await workshop.start_runner(notifier=make_notifier(workshop))
    job = await workshop.queue.submit(make_spec(webhook_url=receiver.url))
    await until(lambda: bool(receiver.requests))
    headers = receiver.requests[0][1]
    assert headers["webhook-id"] == job.spec.id
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    assert "webhook-signature" not in headers


async def test_cancelled_job_is_notified(workshop: Workshop, receiver: Receiver) -> None:
    job = await workshop.queue.submit(make_spec(webhook_url=receiver.url))
    await workshop.queue.cancel(job.spec.ref)
    await workshop.start_runner(notifier=make_notifier(workshop))
    await until(lambda: bool(receiver.requests))
    assert states(receiver) == ["cancelled"]


async def test_retry_has_a_new_signature_and_the_same_id(workshop: Workshop, receiver: Receiver) -> None:
    good, receiver.answer = receiver.answer, _FAILURE
    clock = TickingClock()
    notifier = make_notifier(
        workshop, settings={"webhook_secret": SecretStr(_SECRET)}, retry_delays_s=(0.05,) * 99, clock=clock
    )
    await workshop.start_runner(notifier=notifier)
    await workshop.queue.submit(make_spec(webhook_url=receiver.url))
    await until(lambda: len(receiver.requests) >= 2)
    receiver.answer = good
    await until(lambda: not is_waiting(workshop))
    assert len({sent for _, _, sent in receiver.requests}) == 1
    headers = [headers for _, headers, _ in receiver.requests]
    assert len({sent["webhook-id"] for sent in headers}) == 1
    assert len({sent["webhook-timestamp"] for sent in headers}) == len(headers)
    for sent in headers:
        standardwebhooks.Webhook(_SECRET).verify(receiver.requests[0][2], sent)


async def test_notice_is_given_up_after_the_last_retry(workshop: Workshop, receiver: Receiver) -> None:
    receiver.answer = _FAILURE
    metrics = RecordedMetrics()
    await workshop.start_runner(notifier=make_notifier(workshop, metrics=metrics))
    await workshop.queue.submit(make_spec(webhook_url=receiver.url))
    await until(lambda: len(receiver.requests) == 4 and not is_waiting(workshop))
    assert metrics.counters == {("webhooks", "failed"): 3, ("webhooks", "given_up"): 1}


def test_retries_last_for_hours_with_growing_pauses() -> None:
    assert list(RETRY_DELAYS_S) == sorted(RETRY_DELAYS_S)
    assert RETRY_DELAYS_S[0] <= 10
    assert 4 * 3600 <= sum(RETRY_DELAYS_S) <= 48 * 3600


async def test_undelivered_notice_is_delivered_after_a_restart(workshop: Workshop, receiver: Receiver) -> None:
    first = await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_spec(webhook_url=receiver.url)))
    await first.close()
    assert receiver.requests == []
    await workshop.start_runner(notifier=make_notifier(workshop))
    await until(lambda: bool(receiver.requests))
    assert json.loads(receiver.requests[0][2])["id"] == job.spec.id


async def test_several_runners_deliver_each_notice_once(workshop: Workshop, receiver: Receiver) -> None:
    receiver.delay_s = 0.05
    for _ in range(3):
        await workshop.start_runner(notifier=make_notifier(workshop))
    jobs = [await workshop.queue.submit(make_spec(webhook_url=receiver.url)) for _ in range(10)]
    for job in jobs:
        await workshop.finished(job)
    await until(lambda: not is_waiting(workshop))
    notified = Counter(json.loads(sent)["id"] for _, _, sent in receiver.requests)
    assert notified == Counter(job.spec.id for job in jobs)


async def test_hanging_receiver_delays_no_job_and_no_other_receiver(
    workshop: Workshop, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One receiver hangs. Thirty webhooks to it are due before the webhook to another receiver."""
    monkeypatch.setattr(notifier, "post_json", partial(delivery.post_json, timeout_s=PATIENCE_S))
    async with receiving(delay_s=PATIENCE_S) as hanging:
        for _ in range(30):
            job = await workshop.queue.submit(make_spec(webhook_url=hanging.url))
            await workshop.queue.cancel(job.spec.ref)
        await workshop.start_runner(notifier=make_notifier(workshop))
        await until(lambda: bool(hanging.requests))
        elsewhere = receiver.url.replace("127.0.0.1", "localhost")
        async with asyncio.timeout(PATIENCE_S):
            job = await workshop.finished(await workshop.queue.submit(make_spec(webhook_url=elsewhere)))
            assert job.state == "succeeded"
            await until(lambda: bool(receiver.requests))
        assert len(hanging.requests) <= 4  # as many deliveries to one host are made at a time, and none has ended


async def test_hanging_receivers_of_one_client_do_not_delay_another_client(
    workshop: Workshop, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifier, "post_json", partial(delivery.post_json, timeout_s=PATIENCE_S))
    async with receiving(delay_s=PATIENCE_S, host="0.0.0.0") as hanging:
        hosts = [f"127.0.1.{number}" for number in range(1, 9)]  # 4 deliveries to each would be all that run at a time
        settings = {"webhook_allow_hosts": ("127.0.0.1", *hosts)}
        for host in hosts * 8:
            url = hanging.url.replace("127.0.0.1", host)
            job = await workshop.queue.submit(make_spec(webhook_url=url, client=ClientId("greedy")))
            await workshop.queue.cancel(job.spec.ref)
        await workshop.start_runner(notifier=make_notifier(workshop, settings=settings))
        await until(lambda: len(hanging.requests) == 16)
        job = await workshop.queue.submit(make_spec(webhook_url=receiver.url, client=ClientId("other")))
        await workshop.queue.cancel(job.spec.ref)
        await until(lambda: bool(receiver.requests))
        assert len(hanging.requests) == 16


async def test_slow_urls_of_a_client_do_not_delay_others_of_the_same_host(
    workshop: Workshop, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifier, "post_json", partial(delivery.post_json, timeout_s=PATIENCE_S))

    async def end_job(client: str, url: str) -> None:
        job = await workshop.queue.submit(make_spec(webhook_url=url, client=ClientId(client)))
        await workshop.queue.cancel(job.spec.ref)

    async with receiving(delay_s=PATIENCE_S) as hanging:
        for _ in range(20):
            await end_job("greedy", hanging.url)
        await workshop.start_runner(notifier=make_notifier(workshop))
        await until(lambda: len(hanging.requests) == 4)
        await end_job("other", receiver.url)
        await until(lambda: bool(receiver.requests))
        assert len(hanging.requests) == 4

        # Many clients of a host that hangs do not use up all deliveries.
        for number in range(40):
            await end_job(f"client{number % 10}", hanging.url)
        await until(lambda: len(hanging.requests) == 16)
        await end_job("other", receiver.url.replace("127.0.0.1", "localhost"))
        await until(lambda: len(receiver.requests) == 2)
        assert len(hanging.requests) == 16


async def test_many_quick_failures_of_a_client_do_not_delay_another_client(
    workshop: Workshop, receiver: Receiver
) -> None:
    """A hundred webhooks are due before the three of another client."""

    async def end_job(client: str, url: str) -> None:
        job = await workshop.queue.submit(make_spec(webhook_url=url, client=ClientId(client)))
        await workshop.queue.cancel(job.spec.ref)

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for _ in range(100):
        await end_job("greedy", f"http://127.0.0.1:{port}/")
    for _ in range(3):
        await end_job("other", receiver.url)
    await workshop.start_runner(notifier=make_notifier(workshop))
    await until(lambda: len(receiver.requests) == 3)
    with workshop.queue.store.database.reading() as connection:
        attempts = sa.select(sa.func.sum(JOBS.c.webhook_attempts)).where(JOBS.c.client == "greedy")
        assert connection.execute(attempts).scalar_one() < 20


async def test_private_target_is_not_called_at_delivery(workshop: Workshop, receiver: Receiver) -> None:
    await workshop.start_runner(notifier=make_notifier(workshop, settings={"webhook_allow_hosts": ()}))
    await workshop.queue.submit(make_spec(webhook_url=receiver.url))
    await until(lambda: is_waiting(workshop))
    await until(lambda: not is_waiting(workshop))
    assert receiver.num_connections == 0


async def test_faulty_body_blocks_no_other_notice(workshop: Workshop, receiver: Receiver) -> None:
    broken = make_spec(webhook_url=receiver.url)

    def sometimes(job: Job) -> Mapping[str, Any]:
        if job.spec.id == broken.id:
            raise RuntimeError("a bug")
        return body(job)

    await workshop.start_runner(notifier=make_notifier(workshop, body=sometimes))
    await workshop.queue.submit(broken)
    good = await workshop.queue.submit(make_spec(webhook_url=receiver.url))
    await until(lambda: bool(receiver.requests))
    assert json.loads(receiver.requests[0][2])["id"] == good.spec.id


def is_waiting(workshop: Workshop) -> bool:
    """Return whether a webhook is still to be delivered."""
    return workshop.queue.store.runners.outlook("").webhook_in_s is not None
