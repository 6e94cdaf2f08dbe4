from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from stable_audio_serve.jobs.job import Job
from stable_audio_serve.jobs.notifier import Notifier
from stable_audio_serve.jobs.outbox import Outbox
from tests.jobs.conftest import Workshop, make_spec, wait_for
from tests.jobs.test_webhooks import Receiver, receiving


def body(job: Job) -> Mapping[str, Any]:
    return {"id": job.spec.id, "state": job.state}


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


def make_notifier(workshop: Workshop, **options: Any) -> Notifier:
    outbox = Outbox(workshop.queue.store.database)
    return Notifier(outbox, body, **{"allow_hosts": ["127.0.0.1"], "retry_delays_s": (0.05, 0.05, 0.05)} | options)


async def test_the_end_of_a_job_is_told_once(workshop: Workshop, receiver: Receiver) -> None:
    await workshop.start_runner(notifier=make_notifier(workshop))
    told = await workshop.queue.submit(make_spec(webhook_url=receiver.url))
    silent = await workshop.queue.submit(make_spec())
    await workshop.finished(told)
    await workshop.finished(silent)
    await wait_for(lambda: bool(receiver.requests))
    await workshop.finished(await workshop.queue.submit(make_spec()))
    assert [json.loads(sent) for _, _, sent in receiver.requests] == [{"id": told.spec.id, "state": "succeeded"}]


async def test_a_cancelled_job_is_told_too(workshop: Workshop, receiver: Receiver) -> None:
    job = await workshop.queue.submit(make_spec(webhook_url=receiver.url))
    await workshop.queue.cancel("sa3", job.spec.id)
    await workshop.start_runner(notifier=make_notifier(workshop))
    await wait_for(lambda: bool(receiver.requests))
    assert json.loads(receiver.requests[0][2])["state"] == "cancelled"


async def test_a_failed_delivery_is_tried_again(workshop: Workshop, receiver: Receiver) -> None:
    good, receiver.answer = receiver.answer, b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n"
    await workshop.start_runner(notifier=make_notifier(workshop))
    await workshop.queue.submit(make_spec(webhook_url=receiver.url))
    await wait_for(lambda: len(receiver.requests) == 2)
    receiver.answer = good
    await wait_for(lambda: not due(workshop))
    assert 3 <= len(receiver.requests) <= 4
    assert len({sent for _, _, sent in receiver.requests}) == 1


async def test_after_the_last_retry_it_is_given_up(workshop: Workshop, receiver: Receiver) -> None:
    receiver.answer = b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n"
    await workshop.start_runner(notifier=make_notifier(workshop))
    await workshop.queue.submit(make_spec(webhook_url=receiver.url))
    await wait_for(lambda: len(receiver.requests) == 4 and not due(workshop))


async def test_what_was_not_delivered_is_delivered_after_a_restart(workshop: Workshop, receiver: Receiver) -> None:
    first = await workshop.start_runner()
    job = await workshop.finished(await workshop.queue.submit(make_spec(webhook_url=receiver.url)))
    await first.close()
    assert receiver.requests == []
    await workshop.start_runner(notifier=make_notifier(workshop))
    await wait_for(lambda: bool(receiver.requests))
    assert json.loads(receiver.requests[0][2])["id"] == job.spec.id


async def test_a_receiver_that_hangs_delays_no_job(workshop: Workshop, receiver: Receiver) -> None:
    receiver.delay_s = 5
    await workshop.start_runner(notifier=make_notifier(workshop))
    await workshop.queue.submit(make_spec(webhook_url=receiver.url))
    await wait_for(lambda: bool(receiver.requests))
    assert (await workshop.finished(await workshop.queue.submit(make_spec()))).state == "succeeded"


async def test_a_private_target_is_not_called_at_delivery_either(workshop: Workshop, receiver: Receiver) -> None:
    await workshop.start_runner(notifier=make_notifier(workshop, allow_hosts=[]))
    await workshop.queue.submit(make_spec(webhook_url=receiver.url))
    await wait_for(lambda: bool(due(workshop)))
    await wait_for(lambda: not due(workshop))
    assert receiver.num_connections == 0


async def test_a_body_that_cannot_be_made_holds_up_no_other(workshop: Workshop, receiver: Receiver) -> None:
    broken = make_spec(webhook_url=receiver.url)

    def sometimes(job: Job) -> Mapping[str, Any]:
        if job.spec.id == broken.id:
            raise RuntimeError("a bug")
        return body(job)

    await workshop.start_runner(
        notifier=Notifier(Outbox(workshop.queue.store.database), sometimes, allow_hosts=["127.0.0.1"])
    )
    await workshop.queue.submit(broken)
    good = await workshop.queue.submit(make_spec(webhook_url=receiver.url))
    await wait_for(lambda: bool(receiver.requests))
    assert json.loads(receiver.requests[0][2])["id"] == good.spec.id


def due(workshop: Workshop) -> bool:
    """Whether anybody is still to be told, now or later."""
    return workshop.queue.store.look("").webhook_in_s is not None
