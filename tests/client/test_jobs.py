from __future__ import annotations

import asyncio
import io
import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx
import pytest
import soundfile
from starlette.types import Receive, Scope, Send

from stable_audio_serve.client import Job, JobProgress, operations
from stable_audio_serve.client.answers import read_job
from stable_audio_serve.core import errors
from tests.audio_files import make_audio_file
from tests.client.conftest import ASYNC, IN_ONE_LOOP, POLLS, Caller, Served, serve
from tests.patience import PATIENCE_S, until
from tests.sockets import listening

pytestmark = [pytest.mark.server, IN_ONE_LOOP]


async def test_a_job_is_followed_and_downloaded(
    served: Served, connect: Callable[..., Caller], *, tmp_path: Path
) -> None:
    call = connect(served.url)
    events: list[JobProgress] = []
    job = await call("jobs.submit", "rain", duration=0.5, seed=11)
    job = await call("jobs.wait", job.id, on_progress=events.append)
    assert (job.status, job.seeds, job.duration_s) == ("succeeded", (11,), 0.5)
    assert events
    assert [event.fraction for event in events] == sorted(event.fraction for event in events)
    path = await call("jobs.download", job, tmp_path / "take.wav")
    audio, _ = soundfile.read(path)
    assert len(audio) == 22050
    take = await call("generate", "rain", duration=0.5, seed=11)
    assert path.read_bytes() == take.content
    assert sorted(os.listdir(tmp_path)) == ["take.wav"]
    path = await call("jobs.download", job, tmp_path)
    assert path == tmp_path / f"{job.id}-{take.clips[0].file_name}"
    assert path.read_bytes() == take.content
    (clip,) = (await call("jobs.fetch", job)).clips
    assert replace(clip, file_name=take.clips[0].file_name) == take.clips[0]
    several = await call("jobs.submit", "rain", duration=0.5, seed=11, batch_size=2)
    fetched = await call("jobs.fetch", (await call("jobs.wait", several.id)).id)
    assert [clip.seed for clip in fetched.clips] == [11, 12]
    assert fetched.clips[0].content == take.content


async def test_sources_are_uploaded(served: Served, connect: Callable[..., Caller]) -> None:
    call = connect(served.url)
    audio = io.BytesIO(make_audio_file(duration_s=1.0))
    job = await call("jobs.submit_variation", audio.getvalue(), "rain", duration=1.0, init_noise_level=0.5)
    assert (await call("jobs.wait", job.id)).mode == "audio-to-audio"
    assert served.backend.last.init_noise_level == 0.5
    job = await call("jobs.submit_inpaint", audio.getvalue(), "rain", regions=[(0.5, 1.0)], duration=1.0)
    assert (await call("jobs.wait", job.id)).mode == "inpainting"
    assert served.backend.last.inpaint_regions_s == ((0.5, 1.0),)


async def test_the_same_idempotency_key_returns_the_same_job(served: Served, connect: Callable[..., Caller]) -> None:
    call = connect(served.url)
    first = await call("jobs.submit", "rain", duration=0.1, idempotency_key="order-1")
    again = await call("jobs.submit", "rain", duration=0.1, idempotency_key="order-1")
    other = await call("jobs.submit", "rain", duration=0.1)
    assert first.id == again.id != other.id
    with pytest.raises(errors.ConflictError) as caught:
        await call("jobs.submit", "hail", duration=0.1, idempotency_key="order-1")
    assert caught.value.code == "idempotency_key_reused"


async def test_jobs_are_listed_cancelled_and_refused(
    served: Served, connect: Callable[..., Caller], *, tmp_path: Path
) -> None:
    call = connect(served.url)
    served.backend.released.clear()
    jobs = [await call("jobs.submit", "rain", duration=0.1) for _ in range(3)]
    page = await call("jobs.list", limit=2)
    rest = await call("jobs.list", limit=2, cursor=page.next_cursor)
    assert [job.id for job in (*page.jobs, *rest.jobs)] == [job.id for job in reversed(jobs)]
    assert rest.next_cursor is None
    with pytest.raises(errors.ConflictError):
        await call("jobs.download", jobs[0], tmp_path / "none.wav")
    await call("jobs.cancel", jobs[0].id)
    job = await call("jobs.wait", jobs[0].id)
    assert job.status == "cancelled"
    with pytest.raises(errors.CancelledRequestError):
        await call("jobs.download", job, tmp_path / "none.wav")
    with pytest.raises(errors.ConflictError) as caught:
        await call("jobs.cancel", jobs[0].id)
    assert caught.value.code == "job_is_over"
    with pytest.raises(errors.NotFoundError):
        await call("jobs.get", "0" * 32)
    with pytest.raises(errors.NotFoundError):
        await call("jobs.wait", "0" * 32)
    with pytest.raises(ValueError, match="not the id of a job"):
        await call("jobs.get", "../models")
    served.backend.released.set()
    assert os.listdir(tmp_path) == []


@asynccontextmanager
async def losing_the_first_answer(
    url: str, after: Callable[[], Awaitable[object]] = partial(asyncio.sleep, 0)
) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Forward requests to a server, and lose the first answer, after a call of `after`.

    Yields the URL to send requests to, and a list of the requests' heads.
    """
    heads: list[bytes] = []

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(head := await reader.readuntil(b"\r\n\r\n"))
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        body = await reader.readexactly(int(length[1]) if length else 0)
        there, here = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
        here.write(head.replace(b"keep-alive", b"close") + body)
        answer = await there.read()
        here.close()
        if len(heads) == 1:
            await after()
        else:
            writer.write(answer)
        writer.close()

    async with await asyncio.start_server(forward, "127.0.0.1", 0) as between:
        yield f"http://127.0.0.1:{between.sockets[0].getsockname()[1]}", heads


@ASYNC
async def test_a_cancel_with_a_lost_answer_succeeds(served: Served, connect: Callable[..., Caller]) -> None:
    call = connect(served.url)
    served.backend.released.clear()
    job = await call("jobs.submit", "rain", duration=0.1)
    async with losing_the_first_answer(served.url, lambda: call("jobs.wait", job.id)) as (url, heads):
        lossy = connect(url)
        assert (await lossy("jobs.cancel", job.id)).status == "cancelled"
        assert len(heads) > 1
        with pytest.raises(errors.ConflictError):
            await lossy("jobs.cancel", job.id)
    served.backend.released.set()


@ASYNC
async def test_a_submission_with_a_lost_answer_makes_one_job(served: Served, connect: Callable[..., Caller]) -> None:
    async with losing_the_first_answer(served.url) as (url, heads):
        job = await connect(url)("jobs.submit", "rain", duration=0.1)
        assert [head.split(b" HTTP")[0] for head in heads[:2]] == [b"POST /jobs"] * 2
    assert [each.id for each in (await connect(served.url)("jobs.list")).jobs] == [job.id]


async def test_a_failed_job_raises_its_error(served: Served, connect: Callable[..., Caller], *, tmp_path: Path) -> None:
    call = connect(served.url)
    served.backend.error = errors.InvalidRequestError("too long", field="duration")
    job = await call("jobs.wait", (await call("jobs.submit", "rain", duration=0.1)).id)
    assert (job.status, "too long" in job.error) == ("failed", True)
    with pytest.raises(errors.GenerationError, match="too long"):
        await call("jobs.download", job.id, tmp_path / "none.wav")


async def test_an_interrupted_download_is_retried(
    served: Served, tmp_path: Path, connect: Callable[..., Caller]
) -> None:
    num_seen = 0

    async def bucket(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal num_seen
        num_seen += 1
        length = b"5" if num_seen % 2 else b"10"  # the body has 5 bytes, so every other answer ends too early
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": b"sound"})

    async with listening(bucket, lifespan="off") as port:
        call = connect(served.url)
        job = await call("jobs.wait", (await call("jobs.submit", "rain", duration=0.1)).id)
        num_seen = 1
        sent = {**job.sent, "storage_backend": "s3", "download_url": f"http://127.0.0.1:{port}/take.wav?secret"}
        path = await call("jobs.download", read_job(sent), tmp_path)
        assert path == tmp_path / "take.wav"
        assert path.read_bytes() == b"sound"
        assert os.listdir(tmp_path) == ["take.wav"]
        num_seen = 1
        assert (await call("jobs.fetch", read_job(sent))).content == b"sound"
    assert num_seen == 3


@ASYNC
@pytest.mark.parametrize("status", [None, 403, 404])
async def test_an_unreachable_bucket_is_read_through_the_server(
    served: Served, tmp_path: Path, connect: Callable[..., Caller], status: int | None
) -> None:
    async def bucket(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"<Error/>"})

    async with listening(bucket, lifespan="off") as port:
        call = connect(served.url)
        job = await call("jobs.wait", (await call("jobs.submit", "rain", duration=0.1)).id)
        expected = (await call("jobs.fetch", job)).content
        host = f"127.0.0.1:{port}" if status else "bucket.invalid:8333"
        sent = {**job.sent, "storage_backend": "s3", "download_url": f"http://{host}/take.wav"}
        assert (await call("jobs.download", read_job(sent), tmp_path / "take.wav")).read_bytes() == expected
        assert (await call("jobs.fetch", read_job(sent))).content == expected


async def test_waiting_for_a_job_times_out(served: Served, connect: Callable[..., Caller]) -> None:
    call = connect(served.url)
    served.backend.released.clear()
    job = await call("jobs.submit", "rain", duration=0.1)
    with pytest.raises(errors.DeadlineExceededError):
        await call("jobs.wait", job.id, timeout_s=0.0)
    served.backend.released.set()
    assert (await call("jobs.wait", job.id)).status == "succeeded"


async def test_waiting_for_a_silent_server_times_out(connect: Callable[..., Caller]) -> None:
    async def never_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(never_answer, "127.0.0.1", 0) as silent:
        call = connect(f"http://127.0.0.1:{silent.sockets[0].getsockname()[1]}")
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(errors.DeadlineExceededError, match="did not answer"):
                await call("jobs.wait", "0" * 32, timeout_s=0.1)
        await call.close()


@ASYNC
async def test_without_event_streams_the_client_polls_the_status(connect: Callable[..., Caller]) -> None:
    refusals = Counter[int]()
    async with (
        serve(stream_limits=replace(POLLS, max_open=1), refusals=refusals) as served,
        httpx.AsyncClient(timeout=PATIENCE_S) as other,
    ):
        call = connect(served.url)
        served.backend.released.clear()
        job = await call("jobs.submit", "rain", duration=0.1)
        async with other.stream("GET", f"{served.url}/jobs/{job.id}/events"):
            waiting = asyncio.create_task(call("jobs.follow", job.id))
            await until(lambda: refusals[503])
            await asyncio.sleep(0.3)  # in this time the client asks for the job's status
            served.backend.released.set()
            events = await waiting
    assert isinstance(events[-1], Job)
    assert events[-1].status == "succeeded"


async def test_an_interrupted_stream_resumes_at_the_last_event(served: Served, connect: Callable[..., Caller]) -> None:
    """The proxy of this test ends each event stream after the first bytes."""
    last_ids = []
    async with httpx.AsyncClient(base_url=served.url, timeout=PATIENCE_S) as upstream:

        async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                return
            headers = {name.decode(): value.decode() for name, value in scope["headers"]}
            body = (await receive()).get("body", b"")
            async with upstream.stream(scope["method"], scope["path"], headers=headers, content=body) as answer:
                start = {"type": "http.response.start", "status": answer.status_code}
                await send(start | {"headers": [(b"content-type", answer.headers["content-type"].encode())]})
                is_stream = scope["path"].endswith("/events")
                if is_stream:
                    last_ids.append(headers.get("last-event-id"))
                async for chunk in answer.aiter_raw():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                    if is_stream and b"event: end" not in chunk:
                        break
                await send({"type": "http.response.body"})

        async with listening(proxy, lifespan="off") as port:
            call = connect(f"http://127.0.0.1:{port}")
            job = await call("jobs.submit", "rain", duration=0.1)
            events = await call("jobs.follow", job.id)
    assert isinstance(events[-1], Job)
    assert events[-1].status == "succeeded"
    assert len(set(last_ids)) == len(last_ids)


@ASYNC
async def test_a_stream_refused_by_a_stopping_server_is_opened_again(
    served: Served, connect: Callable[..., Caller], *, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy of this test refuses the first streams as a server does that is stopping."""
    num_refused = 0
    monkeypatch.setattr(operations, "_POLL_S", 0.01)
    async with httpx.AsyncClient(base_url=served.url, timeout=PATIENCE_S) as upstream:

        async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
            nonlocal num_refused
            status, kind = 200, (b"content-type", b"application/json")
            if scope["path"].endswith("/events"):
                num_refused, status = num_refused + 1, 503
                headers = [kind, (b"x-error-kind", (b"unavailable", b"storage", b"stopping")[num_refused % 3])]
                content = b'{"detail": "the server is stopping"}'
            else:
                headers, content = [kind], (await upstream.get(scope["path"])).content
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": content})

        job = await connect(served.url)("jobs.submit", "rain", duration=0.1)
        async with listening(proxy, lifespan="off") as port:
            ended = await connect(f"http://127.0.0.1:{port}")("jobs.wait", job.id)
    assert (ended.status, num_refused) == ("succeeded", 3)


@ASYNC
async def test_the_answer_of_another_server_is_an_error(connect: Callable[..., Caller]) -> None:
    async def other(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"object": "list", "data": [{"id": "gpt"}]}'})

    async with listening(other, lifespan="off") as port:
        call = connect(f"http://127.0.0.1:{port}")
        for method in ("models", "jobs.list"):
            with pytest.raises(errors.GenerationError, match="answer cannot be understood"):
                await call(method)


@ASYNC
async def test_after_three_empty_streams_the_client_polls(
    served: Served, connect: Callable[..., Caller], *, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy of this test answers each request for an event stream with an empty stream."""
    num_streams = 0
    monkeypatch.setattr(operations, "_POLL_S", 0.01)
    async with httpx.AsyncClient(base_url=served.url, timeout=PATIENCE_S) as upstream:

        async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
            nonlocal num_streams
            start = {"type": "http.response.start", "status": 200}
            if scope["path"].endswith("/events"):
                num_streams += 1
                await send(start | {"headers": [(b"content-type", b"text/event-stream")]})
                await send({"type": "http.response.body"})
                return
            answer = await upstream.get(scope["path"])
            await send(start | {"headers": [(b"content-type", b"application/json")]})
            await send({"type": "http.response.body", "body": answer.content})
            served.backend.released.set()

        served.backend.released.clear()
        job = await connect(served.url)("jobs.submit", "rain", duration=0.1)
        async with listening(proxy, lifespan="off") as port:
            events = await connect(f"http://127.0.0.1:{port}")("jobs.follow", job.id)
    assert num_streams == 3
    assert [type(each) for each in events[:1]] == [JobProgress]
    assert events[-1].status == "succeeded"


async def test_no_key_is_sent_to_an_upload_link(served: Served, tmp_path: Path, connect: Callable[..., Caller]) -> None:
    """The upload link leads to another host. The client must not send its API key there."""
    paths = []

    async def bucket(scope: Scope, receive: Receive, send: Send) -> None:
        paths.append({name.decode() for name, _ in scope["headers"]})
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"sound"})

    async with listening(bucket, lifespan="off") as port:
        call = connect(served.url, api_key="secret")
        job = await call("jobs.wait", (await call("jobs.submit", "rain", duration=0.1)).id)
        sent = {**job.sent, "storage_backend": "s3", "download_url": f"http://127.0.0.1:{port}/take.wav"}
        path = await call("jobs.download", read_job(sent), tmp_path / "take.wav")
    assert path.read_bytes() == b"sound"
    assert len(paths) == 1
    assert "authorization" not in paths[0]
