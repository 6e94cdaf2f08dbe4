"""Long pieces through the client: submission, sections, the stream while a piece is made, and replays."""

from __future__ import annotations

import asyncio
import io
import struct
from collections.abc import Callable

import httpx
import numpy as np
import pytest
import soundfile
from fastapi import FastAPI

from stable_audio_serve.api.streams import StreamLimits
from stable_audio_serve.client import JobProgress, Retries
from stable_audio_serve.core import errors
from tests.backends import PausingBackend
from tests.client.conftest import ASYNC, IN_ONE_LOOP, Caller, Served, serve
from tests.client.test_jobs import losing_the_first_answer
from tests.patience import PATIENCE_S, until

pytestmark = [pytest.mark.server, IN_ONE_LOOP]

SECTIONS = [{"duration": 1.0}, {"prompt": "thunder", "duration": 1.5}, {"duration": 1.0}]
HEADER_BYTES = 44


def samples(data: bytes) -> np.ndarray:
    audio, rate_hz = soundfile.read(io.BytesIO(data), dtype="int16")
    assert rate_hz == 44100
    return np.asarray(audio)


async def test_piece_and_its_sections_have_the_same_samples(served: Served, connect: Callable[..., Caller]) -> None:
    call = connect(served.url)
    progress: list[JobProgress] = []
    job = await call("jobs.submit", "rain", seed=5, sections=SECTIONS, overlap_s=0.5)
    assert (job.duration_s, job.mode, job.progress.num_sections) == (3.5, "long-piece", 3)
    job = await call("jobs.wait", job.id, on_progress=progress.append)
    assert [request.prompt for _, request in served.backend.requests] == ["rain", "thunder", "rain"]
    assert progress[-1].num_sections == 3
    assert job.progress.sections_done == 3
    whole = samples((await call("jobs.fetch", job)).content)
    assert len(whole) == int(3.5 * 44100)
    parts = [samples(await call("jobs.section", job.id, number)) for number in (1, 2, 3)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    streamed = b"".join(await call("jobs.audio_chunks", job.id))
    assert struct.unpack_from("<I", streamed, 40) == (0xFFFFFFFF,)
    np.testing.assert_array_equal(np.frombuffer(streamed, "<i2", offset=HEADER_BYTES).reshape(-1, 2), whole)
    with pytest.raises(errors.NotFoundError, match="1 to 3"):
        await call("jobs.section", job.id, 4)


async def test_first_section_is_sent_while_the_second_is_made() -> None:
    assert StreamLimits().section_poll_s < 1  # listeners get a section less than a second after it was stored
    async with serve(PausingBackend()) as served, httpx.AsyncClient(base_url=served.url, timeout=PATIENCE_S) as http:
        body = {"prompt": "rain", "sections": [{"duration": 2.0}] * 3, "response_format": "flac"}
        path = (await http.post("/jobs", json=body)).json()["status_url"]
        async with http.stream("GET", f"{path}/audio", params={"follow": "1"}) as reply:
            assert (reply.status_code, reply.headers["content-type"]) == (200, "audio/wav")
            chunks = reply.aiter_bytes()
            num_bytes = 0
            while num_bytes < HEADER_BYTES + 4 * 1.9 * 44100:
                num_bytes += len(await anext(chunks))
            assert num_bytes < HEADER_BYTES + 4 * 2.0 * 44100
            await until(lambda: served.backend.num_running == 1)
            served.backend.released.set()
            num_bytes += sum([len(chunk) async for chunk in chunks])
        assert num_bytes == HEADER_BYTES + 4 * 6 * 44100


@ASYNC
async def test_stream_goes_on_after_the_server_process_was_replaced(
    server: tuple[FastAPI, Served], served: Served, connect: Callable[..., Caller]
) -> None:
    call, draining = connect(served.url, retries=Retries(most=50, first_pause_s=0.02)), server[0].state.draining
    served.backend.delay_s = 0.2
    job = await call("jobs.submit", "rain", seed=5, sections=[{"duration": 1.0}] * 4)
    following = asyncio.create_task(call("jobs.audio_chunks", job.id))
    while (await call("jobs.get", job.id)).progress.sections_done < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    draining.drain()
    while draining.num_left:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    draining.resume()
    streamed = b"".join(await following)
    whole = samples((await call("jobs.fetch", await call("jobs.wait", job.id))).content)
    np.testing.assert_array_equal(np.frombuffer(streamed, "<i2", offset=HEADER_BYTES).reshape(-1, 2), whole)


@ASYNC
async def test_stream_of_a_cancelled_piece_ends_with_its_last_section(
    served: Served, connect: Callable[..., Caller]
) -> None:
    call = connect(served.url)
    served.backend.delay_s = 0.4
    job = await call("jobs.submit", "rain", sections=[{"duration": 1.0}] * 9, response_format="mp3")

    async def cancel() -> None:
        while (await call("jobs.get", job.id)).progress.sections_done < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await call("jobs.cancel", job.id)

    cancelling = asyncio.create_task(cancel())
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as http:
        reply = await http.get(f"/jobs/{job.id}/audio", params={"follow": "1"})
    await cancelling
    ended = await call("jobs.get", job.id)
    assert ended.status == "cancelled"
    assert reply.headers["content-type"] == "audio/mpeg"
    audio, _ = soundfile.read(io.BytesIO(reply.content))
    assert len(audio) == pytest.approx(44100 * ended.progress.sections_done, abs=3000)
    assert len(samples_of_mp3(await call("jobs.section", job.id, 1))) == pytest.approx(44100, abs=4000)
    with pytest.raises(errors.NotFoundError, match="section 9 is not finished"):
        await call("jobs.section", job.id, 9)


def samples_of_mp3(data: bytes) -> np.ndarray:
    audio, _ = soundfile.read(io.BytesIO(data))
    return np.asarray(audio)


@ASYNC
async def test_replay_of_a_piece_has_the_same_bytes(served: Served, connect: Callable[..., Caller]) -> None:
    call = connect(served.url)
    job = await call("jobs.submit", "rain", seed=5, sections=SECTIONS, overlap_s=0.5)
    result = await call("jobs.fetch", await call("jobs.wait", job.id))
    recipe = result.clips[0].recipe
    assert [section["duration"] for section in recipe["sections"]] == [1.0, 1.5, 1.0]
    for origin in (recipe, result.content):
        async with losing_the_first_answer(served.url) as (url, heads):
            again = await connect(url)("replay", origin)
        assert [head.split(b" HTTP")[0] for head in heads[:2]] == [b"POST /v1/audio/replay"] * 2
        assert again.content == result.content
        assert again.replay == "close"  # not "exact", because the test backend reports no device
    assert len((await call("jobs.list")).jobs) == 3
