"""Jobs and uploads while there is no storage space: on file systems of a few MiB, and with a full bucket."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Collection
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.compat.serving import make_hasty_client
from tests.api.test_buckets import storage_args
from tests.api.test_jobs import BODY, submit, wait
from tests.audio_files import make_audio_file
from tests.backends import ToneBackend
from tests.object_storage import Faults, ObjectStorage
from tests.patience import PATIENCE_S, until

pytestmark = pytest.mark.server

NUM_JOBS = 12
_AT_ONCE = 4  # a job runner computes at most this many jobs of a model at once


def fill(disk: Path) -> Callable[[], None]:
    """Fill the disk with one file. Returns a function that deletes the file."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler.unlink


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


async def job_store(client: httpx.AsyncClient) -> str:
    state: str = (await client.get("/health")).json()["job_store"]["state"]
    return state


async def wait_until_full(client: httpx.AsyncClient) -> None:
    """Wait until `/health` calls the job store full. A check that takes over a second gives the state before it."""
    async with asyncio.timeout(PATIENCE_S):
        while await job_store(client) != "full":  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def last_lease_until(database: sqlite3.Connection) -> float:
    (at,) = database.execute("SELECT max(lease_until) FROM jobs WHERE state = 'running'").fetchone()
    return at or 0.0


async def show_all(client: httpx.AsyncClient, tickets: Collection[dict[str, Any]]) -> list[dict[str, Any]]:
    return [(await client.get(f"/jobs/{ticket['id']}")).json() for ticket in tickets]


async def expect_jobs_wait_for_space(
    client: httpx.AsyncClient, backend: ToneBackend, *, make_full: Callable[[], object], make_room: Callable[[], object]
) -> None:
    """Assert that, on a full disk, few jobs are computed and none fails, and that all finish when there is space."""
    make_full()
    tickets = [await submit(client, duration=0.2) for _ in range(NUM_JOBS)]
    await wait_until_full(client)
    async with asyncio.timeout(PATIENCE_S):
        while {status["status"] for status in await show_all(client, tickets)} != {"queued"}:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    num_computed = len(backend.requests)
    assert num_computed <= _AT_ONCE
    await asyncio.sleep(0.3)  # time for several attempts to write
    assert len(backend.requests) == num_computed
    waiting = await show_all(client, tickets)
    assert {status["status"] for status in waiting} == {"queued"}
    assert sum(status["attempts"] for status in waiting) == num_computed
    make_room()
    for ticket in tickets:
        status = await wait(client, ticket)
        assert status["status"] == "succeeded"
        assert len((await client.get(status["download_url"])).content) > 0
    assert len(backend.requests) == NUM_JOBS + num_computed
    assert await job_store(client) == "ok"


async def test_queue_survives_a_full_disk(tiny_disk: Path, tmp_path: Path) -> None:
    jobs = {"database_url": f"sqlite:///{tmp_path / 'jobs.db'}"}
    async with make_hasty_client(output_dir=str(tiny_disk), jobs=jobs) as (client, backend):
        give_back: list[Callable[[], None]] = []
        await expect_jobs_wait_for_space(
            client,
            backend,
            make_full=lambda: give_back.append(fill(tiny_disk)),
            make_room=lambda: give_back.pop()(),
        )
        assert len(names(tiny_disk)) == NUM_JOBS


@pytest.mark.server
async def test_queue_survives_a_full_bucket(object_storage: ObjectStorage) -> None:
    full = Faults(answer=(507, "InsufficientStorage"), only="PUT")
    bucket, proxy = object_storage.make_bucket(), object_storage.proxy
    async with make_hasty_client(
        storage=storage_args(object_storage, bucket, public_base_url=f"{object_storage.server_url}/{bucket}")
    ) as (client, backend):
        await expect_jobs_wait_for_space(
            client,
            backend,
            make_full=lambda: setattr(proxy, "faults", full),
            make_room=lambda: setattr(proxy, "faults", Faults()),
        )
    assert len(object_storage.keys(bucket)) == NUM_JOBS


async def test_too_large_result_becomes_a_dead_letter(tiny_disk: Path, tmp_path: Path) -> None:
    jobs = {"database_url": f"sqlite:///{tmp_path / 'jobs.db'}", "max_attempts": 2}
    async with make_hasty_client(output_dir=str(tiny_disk), jobs=jobs) as (client, _):
        failed = await wait(client, await submit(client, duration=10.0))  # a file of 1.76 MB, larger than the disk
        assert (failed["status"], failed["attempts"], failed["error"]) == ("failed", 2, "the disk is full")
        source = make_audio_file(duration_s=10.0)
        form = {"prompt": "rain", "duration": "1"}
        refused = await client.post("/jobs/variations", data=form, files={"audio": source})
        assert (refused.status_code, refused.json()["detail"]) == (507, "the disk is full")
        assert names(tiny_disk) == []
        fine = await wait(client, await submit(client, duration=1.0))
        assert fine["status"] == "succeeded"
        assert len((await client.get(fine["download_url"])).content) > 176_000


async def test_job_database_on_a_full_disk_loses_nothing(small_disk: Path) -> None:
    async with make_hasty_client(output_dir=str(small_disk), jobs={"lease_s": 1.0}) as (client, backend):
        done = await wait(client, await submit(client))
        backend.released.clear()
        running, to_cancel = [await submit(client, seed=seed) for seed in (5, 6)]
        await wait(client, running, "running")
        await wait(client, to_cancel, "running")
        waiting = [await submit(client, seed=seed) for seed in range(8, 14)]
        give_back = fill(small_disk)
        for _ in range(1000):  # SQLite's write-ahead log may have space for a few more jobs
            reply = await client.post("/jobs", json=BODY)
            if reply.status_code != 202:
                break
            waiting.append(reply.json())
        assert (reply.status_code, reply.json()["detail"]) == (507, "the disk of the job database is full")
        assert (await client.get(f"/jobs/{done['id']}")).json() == done
        await wait_until_full(client)
        cancelled = (await client.delete(f"/jobs/{to_cancel['id']}")).status_code
        assert cancelled in (202, 507)
        backend.released.set()
        await until(lambda: backend.num_running == 0)  # all jobs are computed, but not stored
        with closing(sqlite3.connect(f"file:{small_disk / 'jobs.db'}?mode=ro", uri=True)) as database:
            await until(lambda: last_lease_until(database) < time.time())
        give_back()
        if cancelled == 507:
            assert (await client.delete(f"/jobs/{to_cancel['id']}")).status_code in (200, 202, 409)
        assert (await wait(client, to_cancel))["status"] in ("cancelled", "succeeded")
        for ticket in (running, *waiting):
            assert (await wait(client, ticket))["status"] == "succeeded"
        assert await job_store(client) == "ok"


def test_fill_leaves_no_space_on_the_disk(tiny_disk: Path) -> None:
    fill(tiny_disk)
    with pytest.raises(OSError, match="No space") as caught:
        os.posix_fallocate(os.open(tiny_disk / "more", os.O_CREAT | os.O_WRONLY), 0, 1)
    assert caught.value.errno == errno.ENOSPC


async def test_upload_needs_room_for_a_temporary_file(tiny_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audio = make_audio_file(duration_s=30)
    data_uri = f"data:audio/wav;base64,{b64encode(audio).decode()}"
    async with make_hasty_client() as (client, _):
        make_room = fill(tiny_disk)
        monkeypatch.setattr(tempfile, "tempdir", str(tiny_disk))
        replies = [
            await client.post("/v1/audio/variations", data={"prompt": "x"}, files={"audio": ("a.wav", audio)}),
            await client.post("/generate/style-transfer", data={"prompt": "x"}, files={"audio": ("a.wav", audio)}),
            await client.post("/files/upload", content=audio, headers={"content-type": "audio/wav"}),
            await client.post("/fal-ai/stable-audio-25/audio-to-audio", json={"prompt": "x", "audio_url": data_uri}),
        ]
        assert [(reply.status_code, "no room for temporary files" in reply.text) for reply in replies] == [
            (507, True)
        ] * len(replies)
        make_room()


@pytest.mark.filterwarnings("ignore:Exception ignored from cffi callback")
@pytest.mark.parametrize("response_format", ["wav", "flac"])
async def test_section_needs_room_for_a_temporary_file(
    tiny_disk: Path, monkeypatch: pytest.MonkeyPatch, response_format: str
) -> None:
    async with make_hasty_client() as (client, _):
        job = await submit(client, duration=2, sections=[{"duration": 2}], response_format=response_format)
        await wait(client, job)
        make_room = fill(tiny_disk)
        monkeypatch.setattr(tempfile, "tempdir", str(tiny_disk))
        path = f"{job['status_url']}/audio?section=1"
        reply = await client.get(path)
        assert (reply.status_code, reply.json()["detail"]) == (507, "there is no room for temporary files")
        make_room()
        assert (await client.get(path)).status_code == 200


@pytest.mark.filterwarnings("ignore:Exception ignored from cffi callback")
@pytest.mark.parametrize("response_format", ["wav", "flac"])
async def test_long_piece_names_missing_room_for_temporary_files(
    tiny_disk: Path, monkeypatch: pytest.MonkeyPatch, response_format: str
) -> None:
    async with make_hasty_client(jobs={"max_attempts": 2}) as (client, _):
        make_room = fill(tiny_disk)
        monkeypatch.setattr(tempfile, "tempdir", str(tiny_disk))
        job = await submit(client, duration=2, sections=[{"duration": 2}], response_format=response_format)
        failed = await wait(client, job)
        assert (failed["status"], failed["error"]) == ("failed", "there is no room for temporary files")
        make_room()
        again = await submit(client, duration=1, sections=[{"duration": 1}])
        assert (await wait(client, again))["status"] == "succeeded"
