"""Jobs with sections over HTTP: checks, ids, keys and the audio routes."""

from __future__ import annotations

import asyncio
import gc
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from stable_audio_serve.api import section_audio
from stable_audio_serve.api.streams import StreamLimits
from stable_audio_serve.audio.writer import AudioWriter
from stable_audio_serve.core.keys import hash_key
from tests.api.compat.serving import make_app, make_client, serve_app
from tests.api.test_buckets import storage_args
from tests.api.test_jobs import wait
from tests.object_storage import Faults, ObjectStorage
from tests.patience import PATIENCE_S, until

BODY = {"prompt": "rain", "seed": 3}
ID = "0123456789abcdef0123456789abcd"

# The longest clip of the test backend's models: 5 s for demo, 120 s for small-sfx.
WRONG: list[tuple[dict[str, Any], list[tuple[Any, ...]]]] = [
    ({"sections": []}, [("sections",)]),
    ({"sections": [{"prompt": "x"}]}, [("sections", 0, "duration")]),
    ({"sections": [{"duration": 4, "promt": "x"}]}, [("sections", 0, "promt")]),
    (
        {"sections": [{"duration": 4}, {"duration": 0.5}, {"duration": 109}]},
        [("sections", 1, "duration"), ("sections", 2, "duration")],
    ),
    ({"model": "demo", "sections": [{"duration": 2}, {"duration": 3}]}, [("sections", 1, "duration")]),
    ({"sections": [{"duration": 4, "prompt": " "}]}, [("sections", 0, "prompt")]),
    ({"sections": [{"duration": 100}] * 19}, [("sections",)]),
    (
        {"sections": [{"duration": 1e308}] * 2},
        [("sections", 0, "duration"), ("sections", 1, "duration"), ("sections",)],
    ),
    ({"sections": [{"duration": 4}], "overlap_s": 61}, [("overlap_s",)]),
    ({"sections": [{"duration": 4}], "overlap_s": 130}, [("overlap_s",)]),
    ({"sections": [{"duration": 61}], "overlap_s": 130}, [("overlap_s",), ("sections", 0, "duration")]),
    ({"sections": [{"duration": 4}], "overlap_s": 0.01}, [("overlap_s",)]),
    ({"overlap_s": 2}, [("overlap_s",)]),
    ({"sections": [{"duration": 4}], "duration": 5}, [("duration",)]),
    ({"sections": [{"duration": 4}], "batch_size": 2, "peaks": "scale"}, [("batch_size",), ("peaks",)]),
    ({"sections": [{"duration": 4}], "loop": True}, [("loop",)]),
    ({"sections": [{"duration": 4}], "prompts": ["a"], "seeds": [1]}, [("prompts",), ("seeds",)]),
    ({"duration": 1800}, [("duration",)]),
]


class SlowWriter(AudioWriter):
    """A writer that waits before each block until it may go on. Subclasses have their own counts."""

    may_go: threading.Event
    num_begun = num_ended = 0

    def write(self, block: Any) -> None:
        type(self).num_begun += 1
        self.may_go.wait(PATIENCE_S)
        try:
            super().write(block)
        finally:
            type(self).num_ended += 1


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> type[SlowWriter]:
    """Returns the class of the writers of sections. At first, they do not wait."""
    own = type("Writer", (SlowWriter,), {"may_go": threading.Event()})
    own.may_go.set()
    monkeypatch.setattr(section_audio, "AudioWriter", own)
    return own


@pytest.mark.parametrize(("fields", "places"), WRONG)
async def test_wrong_fields_are_named(
    client: httpx.AsyncClient, fields: dict[str, Any], places: list[tuple[Any, ...]]
) -> None:
    for method, path in (("POST", "/jobs"), ("PUT", f"/jobs/{ID}77")):
        reply = await client.request(method, path, json=BODY | fields)
        assert reply.status_code == 422
        assert [tuple(fault["loc"]) for fault in reply.json()["detail"]] == [("body", *place) for place in places]
    assert (await client.get(f"/jobs/{ID}77")).status_code == 404


async def test_same_request_with_an_id_returns_the_same_piece(client: httpx.AsyncClient) -> None:
    body = BODY | {"sections": [{"duration": 20}, {"prompt": "thunder", "duration": 100}], "duration": 120}
    first = await client.put(f"/jobs/{ID}78", json=body)
    assert first.status_code == 202
    again = await client.put(f"/jobs/{ID}78", json=body)
    assert (again.json(), again.headers["idempotent-replayed"]) == (first.json(), "true")
    other = body | {"sections": [{"duration": 20}, {"prompt": "wind", "duration": 100}]}
    assert (await client.put(f"/jobs/{ID}78", json=other)).status_code == 409
    status = (await client.get(f"/jobs/{ID}78")).json()
    assert (status["mode"], status["duration"]) == ("long-piece", 120)
    assert (status["progress"]["sections_done"], status["progress"]["sections"]) == (0, 2)


async def test_durations_are_added_up_without_rounding_errors(client: httpx.AsyncClient) -> None:
    for durations, total_s in (([7.2] * 250, 1800), ([1.4] * 3, 4.2)):
        body = BODY | {"sections": [{"duration": duration} for duration in durations]}
        reply = await client.post("/jobs", json=body)
        assert reply.status_code == 202, reply.text
        assert (await client.get(reply.json()["status_url"])).json()["duration"] == total_s


async def test_piece_that_ended_without_a_section_has_no_audio(client: httpx.AsyncClient) -> None:
    path = (await client.post("/jobs", json=BODY | {"sections": [{"duration": 4}]})).json()["status_url"]
    await client.delete(path)
    for query in ("", "?follow=1"):
        reply = await client.get(f"{path}/audio{query}")
        assert (reply.status_code, reply.json()["detail"]) == (409, "the job has no audio: it is cancelled")


async def test_job_without_sections_has_none(client: httpx.AsyncClient) -> None:
    ticket = (await client.post("/jobs", json=BODY)).json()
    assert "sections" not in (await client.get(ticket["status_url"])).json()["progress"]
    for query in ("section=1", "follow=1"):
        assert (await client.get(f"{ticket['status_url']}/audio?{query}")).status_code == 409
    for query in ("section=0", "section=x", "section=1&follow=1"):
        assert (await client.get(f"{ticket['status_url']}/audio?{query}")).status_code == 422


async def test_unfinished_section_is_not_found(client: httpx.AsyncClient) -> None:
    ticket = (await client.post("/jobs", json=BODY | {"sections": [{"duration": 4}]})).json()
    reply = await client.get(f"{ticket['status_url']}/audio?section=1")
    assert (reply.status_code, reply.json()["detail"]) == (404, "section 1 is not finished: the job is queued, 0 are")


async def test_head_of_a_growing_piece_has_no_length(client: httpx.AsyncClient) -> None:
    ticket = (await client.post("/jobs", json=BODY | {"sections": [{"duration": 4}]})).json()
    reply = await client.head(f"{ticket['status_url']}/audio?follow=1")
    assert (reply.status_code, reply.headers["content-type"]) == (200, "audio/wav")
    assert "content-length" not in reply.headers


@pytest.mark.server
async def test_unreadable_sections_are_an_error_before_the_answer(object_storage: ObjectStorage) -> None:
    storage = storage_args(object_storage, object_storage.make_bucket())
    async with make_client(storage=storage) as (client, _):
        ticket = (await client.post("/jobs", json=BODY | {"sections": [{"duration": 2}] * 2})).json()
        await wait(client, ticket)
        object_storage.proxy.faults = Faults(answer=(403, "AccessDenied"), only="GET")
        for query in ("section=1", "follow=1"):
            reply = await client.get(f"{ticket['status_url']}/audio?{query}")
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
        object_storage.proxy.faults = Faults()
        assert len((await client.get(f"{ticket['status_url']}/audio?follow=1")).content) > 4 * 44_100 * 4


@pytest.mark.server
async def test_lost_sections_of_an_ended_piece_are_not_found(tmp_path: Path) -> None:
    async with make_client(output_dir=str(tmp_path)) as (client, _):
        ticket = (await client.post("/jobs", json=BODY | {"sections": [{"duration": 2}] * 2})).json()
        await wait(client, ticket)
        for file in (tmp_path / "sections").iterdir():
            file.unlink()
        for query in ("section=1", "section=2", "follow=1"):
            reply = await client.get(f"{ticket['status_url']}/audio?{query}")
            assert (reply.status_code, reply.json()["detail"]) == (404, "the file no longer exists")
        assert (await client.get(f"{ticket['status_url']}/audio")).status_code == 200


async def test_pieces_of_keys(tmp_path: Path, writer: type[SlowWriter]) -> None:
    (tmp_path / "keys").write_text(f"alice:{hash_key('alice')} audio-seconds-per-minute=10\nbob:{hash_key('bob')}\n")
    limits = StreamLimits(max_open_per_client=1)
    async with make_client(api={"key_file": str(tmp_path / "keys")}, stream_limits=limits) as (client, backend):
        alice, bob = ({"Authorization": f"Bearer {name}"} for name in ("alice", "bob"))
        body = BODY | {"sections": [{"duration": 6}] * 5}
        too_long = body | {"sections": [{"duration": 6}, {"duration": 11}]}
        assert (await client.post("/jobs", json=too_long, headers=alice)).status_code == 403
        path = f"/jobs/{ID}79"
        # The piece has 30 s, three times the key's limit per minute.
        assert (await client.put(path, json=body, headers=alice)).status_code == 202

        status: dict[str, Any] = {}
        while not status or status["status"] == "running" or not status["progress"]["sections_done"]:
            await asyncio.sleep(0.02)
            status = (await client.get(path, headers=alice)).json()
        assert (status["status"], status["progress"]["sections_done"], status["attempts"]) == ("queued", 1, 0)
        assert (await client.get(f"{path}/audio?section=1", headers=alice)).status_code == 200
        for query in ("section=1", "follow=1"):
            assert (await client.get(f"{path}/audio?{query}", headers=bob)).status_code == 404
            assert (await client.get(f"{path}/audio?{query}")).status_code == 404
        num_begun = writer.num_begun
        writer.may_go.clear()
        following = asyncio.create_task(client.get(f"{path}/audio?follow=1", headers=alice))
        await until(lambda: writer.num_begun > num_begun)
        for query in ("section=1", "follow=1"):
            assert (await client.get(f"{path}/audio?{query}", headers=alice)).status_code == 429
        writer.may_go.set()
        following.cancel()
        await asyncio.wait([following])
        refused = await client.post("/v1/audio/generations", json=BODY | {"duration": 5}, headers=alice)
        assert refused.status_code == 429  # the section counts
        assert len(backend.requests) == 1
        assert (await client.delete(path, headers=alice)).status_code == 200
        assert (await client.get(f"{path}/audio?section=1", headers=alice)).status_code == 200


async def test_downloads_of_sections_count_as_open_streams() -> None:
    async with (
        serve_app(stream_limits=StreamLimits(max_open_per_client=1)) as (port, _),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client,
    ):
        ticket = (await client.post("/jobs", json=BODY | {"sections": [{"duration": 100}]})).json()
        await wait(client, ticket)
        path = f"{ticket['status_url']}/audio?section=1"
        replies = await asyncio.gather(*(client.head(path) for _ in range(4)))  # the length is known when it is encoded
        assert {reply.status_code for reply in replies} == {200, 429}
        async with client.stream("GET", path) as unread:
            assert (unread.status_code, unread.headers["content-length"]) == (200, str(44 + 100 * 44_100 * 4))
            reply = await client.get(path)
            assert (reply.status_code, int(reply.headers["retry-after"]) > 0) == (429, True)
        statuses = [429]
        async with asyncio.timeout(PATIENCE_S):
            while statuses[-1] == 429:
                statuses.append((await client.get(path)).status_code)
        assert statuses[-1] == 200


async def test_a_client_that_leaves_while_a_section_is_encoded_is_no_error(
    writer: type[SlowWriter], capfd: pytest.CaptureFixture[str]
) -> None:
    async with make_client() as (client, _):
        ticket = (await client.post("/jobs", json=BODY | {"sections": [{"duration": 2}], "format": "mp3"})).json()
        await wait(client, ticket)
        writer.may_go.clear()
        download = asyncio.create_task(client.get(f"{ticket['status_url']}/audio?section=1"))
        await until(lambda: writer.num_begun == 1)
        download.cancel()
        await asyncio.wait([download])
        writer.may_go.set()
        await until(lambda: writer.num_ended == 1)
    gc.collect()  # frees the encoder, which writes the end of its file
    assert capfd.readouterr().err == ""


async def test_downloads_of_sections_leave_a_thread_for_clips(writer: type[SlowWriter]) -> None:
    async with make_client() as (client, _):
        ticket = (await client.post("/jobs", json=BODY | {"sections": [{"duration": 2}] * 2})).json()
        await wait(client, ticket)
        writer.may_go.clear()
        path = f"{ticket['status_url']}/audio"
        downloads = [asyncio.create_task(client.get(f"{path}?{query}")) for query in ("section=1", "follow=1") * 3]
        try:
            await until(lambda: writer.num_begun > 0)
            await asyncio.sleep(0.5)  # for the other downloads to reach the encoder
            async with asyncio.timeout(30):
                reply = await client.post("/v1/audio/generations", json=BODY | {"duration": 1})
            assert (reply.status_code, writer.num_begun) == (200, 1)
        finally:
            writer.may_go.set()
        assert [reply.status_code for reply in await asyncio.gather(*downloads)] == [200] * 6


async def test_downloads_without_a_key_do_not_wait_for_other_addresses(writer: type[SlowWriter]) -> None:
    async with make_app() as (app, _):
        one, other = (
            httpx.AsyncClient(transport=httpx.ASGITransport(app, client=(address, 1)), base_url="http://localhost")
            for address in ("192.0.2.1", "192.0.2.2")
        )
        ticket = (await one.post("/jobs", json=BODY | {"sections": [{"duration": 2}]})).json()
        await wait(one, ticket)
        writer.may_go.clear()
        path = f"{ticket['status_url']}/audio?section=1"
        downloads = [asyncio.create_task(client.get(path)) for client in (one, one, other)]
        try:
            await until(lambda: writer.num_begun == 2)
        finally:
            writer.may_go.set()
        assert [reply.status_code for reply in await asyncio.gather(*downloads)] == [200] * 3
