"""The server's behaviour if its job database or files folder is moved, deleted or replaced while it runs."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from stable_audio_serve.core.errors import StorageError
from stable_audio_serve.core.settings import JobSettings, Settings
from stable_audio_serve.jobs.open import open_queue, prepare_stores
from stable_audio_serve.jobs.store import sqlite
from tests.api.compat.serving import make_hasty_client
from tests.api.test_job_stores import expect_body, submissions
from tests.api.test_jobs import BODY, submit, wait
from tests.audio_files import make_audio_file
from tests.backends import open_event
from tests.jobs.conftest import make_spec
from tests.parameters import some
from tests.patience import until

pytestmark = pytest.mark.server

FILES = ("jobs.db", "jobs.db-wal", "jobs.db-shm")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Returns the folder of the job database."""
    folder = tmp_path / "database"
    folder.mkdir()
    return folder


def settings_of(place: Path) -> dict[str, Any]:
    return {"jobs": {"database_url": f"sqlite:///{place / 'jobs.db'}"}}


def move(place: Path, target: Path, names: tuple[str, ...] = FILES) -> None:
    target.mkdir(exist_ok=True)
    for name in names:
        (place / name).rename(target / name)


def snapshot(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(place.iterdir())}


async def state_of(client: httpx.AsyncClient) -> tuple[str, str]:
    """Returns the job store's state and reason. Checks that /health and /ready report the same values."""
    health, ready = [(await client.get(path)).json() for path in ("/health", "/ready")]
    assert health["job_store"] == ready["job_store"]
    assert ready["ready"] is True  # the routes that need no job store still work
    return health["job_store"]["state"], health["job_store"]["reason"]


async def expect_refusals(client: httpx.AsyncClient, *, at_once: int = 1, may_read: bool = False) -> None:
    """Assert that in every dialect, requests that need the job store are refused.

    Each request is sent `at_once` times concurrently, because concurrent requests open new database connections. With
    `may_read`, requests that only read jobs are not sent.
    """
    for name, ask in submissions(client).items():
        if may_read and name.endswith((" list", " status", " events")):
            continue
        for reply in await asyncio.gather(*(ask() for _ in range(at_once))):
            assert reply.status_code == 503, (name, reply.text)
            assert int(reply.headers["retry-after"]) >= 1, name
            expect_body(name.split()[0], reply)
    assert (await client.post("/v1/audio/generations", json=BODY)).status_code == 200


@pytest.mark.parametrize("names", [FILES, FILES[:1]], ids=["with its log", "alone"])
async def test_moved_database_is_refused_until_it_is_back(place: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    async with make_hasty_client(**settings_of(place)) as (client, backend):
        assert await state_of(client) == ("ok", None)
        done = await submit(client)
        await wait(client, done)
        backend.released.clear()
        running = await submit(client, seed=5)
        await wait(client, running, "running")
        held, backend.released = backend.released, open_event()
        move(place, tmp_path / "away", names)
        before = snapshot(place)
        await expect_refusals(client, at_once=4)
        assert (await state_of(client))[0] == "moved"
        held.set()
        await until(lambda: backend.num_running == 0)
        await asyncio.sleep(0.2)  # in this time the job runner tries to store the result
        assert snapshot(place) == before
        move(tmp_path / "away", place, names)
        assert (await wait(client, running))["attempts"] == 1
        assert (await wait(client, done))["status"] == "succeeded"
        assert (await wait(client, await submit(client)))["status"] == "succeeded"
        assert await state_of(client) == ("ok", None)


async def test_replaced_database_is_neither_read_nor_written(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    prepare_stores(Settings(output_dir=str(other)))
    async with make_hasty_client(**settings_of(place)) as (client, _):
        done = await submit(client)
        await wait(client, done)
        move(place, tmp_path / "away")
        shutil.copy(other / "jobs.db", place / "jobs.db")
        before = snapshot(place)
        await expect_refusals(client)
        assert snapshot(place) == before
        assert (await state_of(client))[0] == "moved"
        (place / "jobs.db").unlink()
        move(tmp_path / "away", place)
        assert (await wait(client, done))["status"] == "succeeded"


@pytest.mark.parametrize("name", [*FILES[:2], pytest.param(FILES[2], marks=pytest.mark.slow)])
async def test_deleted_store_is_detected_and_a_restart_creates_a_new_one(place: Path, name: str) -> None:
    async with make_hasty_client(**settings_of(place)) as (client, _):
        ticket = await submit(client)
        await wait(client, ticket)
        (place / name).unlink()
        await expect_refusals(client)
        assert not (place / name).exists()
        assert (await state_of(client))[0] == "moved"
    async with make_hasty_client(**settings_of(place)) as (client, _):
        found = (await client.get(f"/jobs/{ticket['id']}")).status_code
        # SQLite merged its write-ahead log into the database file when it closed the database.
        assert found == (404 if name == "jobs.db" else 200)
        await wait(client, await submit(client))


@pytest.mark.parametrize("is_replaced", [False, True])
async def test_later_process_refuses_the_replaced_database_too(place: Path, tmp_path: Path, is_replaced: bool) -> None:
    """A server process that starts while the database file is missing or replaced refuses requests for jobs."""
    settings = Settings(output_dir=str(tmp_path / "outputs"), jobs=JobSettings(**settings_of(place)["jobs"]))
    identity = prepare_stores(settings).identity
    first = open_queue(settings)
    job = await first.submit(make_spec())
    await first.close()
    move(place, tmp_path / "away", FILES[:1])
    if is_replaced:
        prepare_stores(settings)
    later = open_queue(settings, identity=identity)
    for _ in range(2):
        assert (await later.watch.health()).state == "moved"
        with pytest.raises(StorageError):
            await later.submit(make_spec())
        with pytest.raises(StorageError):
            await later.get(job.spec.ref)
    assert list(snapshot(place)) == (["jobs.db"] if is_replaced else [])
    (place / "jobs.db").unlink(missing_ok=True)
    move(tmp_path / "away", place, FILES[:1])
    assert await later.get(job.spec.ref) == job
    await later.close()


def files_moved(folder: Path, away: Path) -> Callable[[], None]:
    def back() -> None:
        away.rename(folder)

    folder.rename(away)
    return back


async def test_moved_files_folder_is_not_recreated(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "outputs"
    async with make_hasty_client(output_dir=str(folder), **settings_of(place)) as (client, backend):
        done = await wait(client, await submit(client))
        backend.released.clear()
        running = await submit(client, seed=5)
        await wait(client, running, "running")
        back = files_moved(folder, tmp_path / "away")
        backend.released.set()
        assert (await client.get(done["download_url"])).status_code == 503
        source = {"audio": make_audio_file(duration_s=1.0)}
        reply = await client.post("/jobs/variations", data={"prompt": "x", "duration": "1"}, files=source)
        assert (reply.status_code, "moved" in reply.json()["detail"]) == (503, True)
        waiting = await wait(client, running, "queued")
        assert "moved" in (await state_of(client))[1]
        more = await submit(client)
        await asyncio.sleep(0.2)  # in this time the job runner checks again whether files can be stored
        assert not folder.exists()
        assert (await wait(client, more, "queued"))["attempts"] == 0
        back()
        assert (await client.get(done["download_url"])).status_code == 200
        assert (await wait(client, running))["attempts"] == waiting["attempts"] + 1
        assert (await wait(client, more))["status"] == "succeeded"
        assert await state_of(client) == ("ok", None)


def linked(place: Path, away: Path) -> None:
    """Move the database file and make its old path a link to it. The write-ahead log stays in the old folder."""
    away.mkdir()
    (place / "jobs.db").rename(away / "jobs.db")
    (place / "jobs.db").symlink_to(away / "jobs.db")


def unlinked(place: Path, away: Path) -> None:
    (place / "jobs.db").unlink()
    (away / "jobs.db").rename(place / "jobs.db")


async def test_link_to_the_moved_file_does_not_start_a_second_log(place: Path, tmp_path: Path) -> None:
    away = tmp_path / "away"
    async with make_hasty_client(**settings_of(place)) as (client, _):
        done = await submit(client)
        await wait(client, done)
        linked(place, away)
        await expect_refusals(client, at_once=4)
        assert (await state_of(client))[0] == "moved"
        assert [path.name for path in away.iterdir()] == ["jobs.db"]
        unlinked(place, away)
        assert (await wait(client, done))["status"] == "succeeded"
        assert (await wait(client, await submit(client)))["status"] == "succeeded"


@pytest.mark.parametrize("is_hard", [False, True])
async def test_path_through_a_link_must_not_change_its_target(place: Path, tmp_path: Path, is_hard: bool) -> None:
    """The database's path may contain a link. If the link's target changes, jobs are refused."""
    away, link = tmp_path / "away", tmp_path / "link"
    away.mkdir()
    link.symlink_to(place)
    queue = open_queue(Settings(output_dir=str(tmp_path / "outputs"), jobs=JobSettings(**settings_of(link)["jobs"])))
    job = await queue.submit(make_spec())
    (place / "jobs.db").rename(away / "jobs.db")
    if is_hard:
        (place / "jobs.db").hardlink_to(away / "jobs.db")
    link.unlink()
    link.symlink_to(away)
    # Take the pooled connection, so that the queue must open a new one.
    held = queue.store.database.engine.connect() if is_hard else None
    with pytest.raises(StorageError):
        await queue.submit(make_spec())
    assert [path.name for path in away.iterdir()] == ["jobs.db"]
    if held is not None:
        held.close()
    link.unlink()
    link.symlink_to(place)
    if not is_hard:
        (away / "jobs.db").rename(place / "jobs.db")
    assert await queue.get(job.spec.ref) == job
    await queue.close()


async def test_emptied_database_keeps_its_log(place: Path, tmp_path: Path) -> None:
    async with make_hasty_client(**settings_of(place)) as (client, _):
        await wait(client, await submit(client))
        (place / "jobs.db").write_bytes(b"")
        before = snapshot(place)
        await expect_refusals(client, at_once=4)
        assert (await state_of(client))[0] == "moved"
        assert snapshot(place) == before


async def test_later_process_keeps_the_log_of_an_emptied_database(place: Path, tmp_path: Path) -> None:
    settings = Settings(output_dir=str(tmp_path / "outputs"), jobs=JobSettings(**settings_of(place)["jobs"]))
    identity = prepare_stores(settings).identity
    first = open_queue(settings, identity=identity)
    await first.submit(make_spec())
    (place / "jobs.db").write_bytes(b"")
    before = snapshot(place)
    later = open_queue(settings, identity=identity)
    assert (await later.watch.health()).state == "moved"
    assert snapshot(place) == before
    await later.close()
    await first.close()


async def test_database_overwritten_by_another_is_detected(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    prepare_stores(Settings(output_dir=str(other)))
    prepare_stores(Settings(output_dir=str(tmp_path), jobs=JobSettings(**settings_of(place)["jobs"])))
    async with make_hasty_client(**settings_of(place)) as (client, _):
        assert (await state_of(client))[0] == "ok"
        await wait(client, await submit(client))
        assert (await state_of(client))[0] == "ok"
        inode, content = (place / "jobs.db").stat().st_ino, (place / "jobs.db").read_bytes()
        shutil.copyfile(other / "jobs.db", place / "jobs.db")
        assert (place / "jobs.db").stat().st_ino == inode
        assert (await state_of(client))[0] == "moved"
        (place / "jobs.db").write_bytes(content)
        assert (await state_of(client))[0] == "ok"


async def test_database_without_jobs_table_is_unavailable(place: Path) -> None:
    async with make_hasty_client(**settings_of(place), run_jobs=False) as (client, _):
        await submit(client)
        with sqlite3.connect(place / "jobs.db") as connection:
            connection.execute("DROP TABLE jobs")
        connection.close()
        assert (await client.get("/jobs")).status_code == 503
        assert (await state_of(client))[0] == "unavailable"


def _garbage(path: Path, _: Path) -> None:
    path.write_bytes(bytes(range(256)) * (path.stat().st_size // 256))


def _zeros(path: Path, _: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _short(path: Path, _: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(8192)


def _another(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("overwrite", some([_garbage, _another, _zeros, _short], [_garbage, _another]))
async def test_overwritten_database_accepts_no_jobs(
    place: Path, tmp_path: Path, overwrite: Callable[[Path, Path], None]
) -> None:
    """Jobs are refused, although open connections still work and SQLite's write-ahead log could store new jobs."""
    other = tmp_path / "other"
    prepare_stores(Settings(output_dir=str(other)))
    async with make_hasty_client(**settings_of(place)) as (client, _):
        await wait(client, await submit(client))
        overwrite(place / "jobs.db", other / "jobs.db")
        await asyncio.sleep(1.1)  # the file is checked once per second
        await expect_refusals(client, may_read=True)
        assert (await state_of(client))[0] in ("moved", "unavailable")


async def test_locked_database_is_unavailable(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "_BUSY_TIMEOUT_S", 0.3)
    async with make_hasty_client(**settings_of(place)) as (client, _):
        await wait(client, await submit(client))
        with closing(sqlite3.connect(place / "jobs.db", isolation_level=None)) as locking:
            locking.execute("BEGIN IMMEDIATE")
            await expect_refusals(client, may_read=True)
            assert (await state_of(client))[0] == "unavailable"
        assert (await wait(client, await submit(client)))["status"] == "succeeded"
