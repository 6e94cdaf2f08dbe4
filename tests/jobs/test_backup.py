"""The backup and restore commands of docs/operations.md work while a server accepts and runs jobs."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.compat.serving import make_client
from tests.api.test_jobs import show, submit, wait
from tests.backends import ToneBackend
from tests.databases import PostgresServer
from tests.patience import PATIENCE_S, until

pytestmark = pytest.mark.server

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
KINDS = ("sqlite", "postgresql")


async def run_block(title: str, folder: Path, **environ: str) -> None:
    """Run the code block with commands below the heading `title` of docs/operations.md."""
    section = PAGE.read_text().split(f"### {title}\n")[1].split("\n#")[0]
    (commands,) = re.findall(r"```shell\n(.*?)```", section, flags=re.DOTALL)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = await asyncio.create_subprocess_exec(
        "bash", "-euo", "pipefail", "-c", commands, cwd=folder, env={"PATH": path, **environ}
    )
    async with asyncio.timeout(PATIENCE_S):
        assert await process.wait() == 0


@pytest.fixture(params=KINDS)
def urls(request: pytest.FixtureRequest) -> Iterator[tuple[str | None, str | None]]:
    """Yield two database URLs: the server's, and that of an empty database to restore the backup into.

    A URL is None for the default SQLite file.
    """
    if request.param == "sqlite":
        yield None, None
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    made = server.create_database(), server.create_database()
    yield made
    for url in made:
        server.drop_database(url)


def private_backup(folder: Path) -> Path:
    """Return the backup in `folder`. Checks that only the backup's owner can read it."""
    (backup,) = folder.glob("backup-*")
    assert not [path for path in (backup, *backup.iterdir()) if stat.S_IMODE(path.stat().st_mode) & 0o077]
    return backup


def remove_files(folder: Path) -> None:
    """Delete all files except the database."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith(("jobs.db", ".owner")):
            path.unlink()


async def keep_submitting(client: httpx.AsyncClient, tickets: list[dict[str, Any]]) -> None:
    """Submit jobs until cancelled. Every third job has an upload."""
    while True:
        tickets.append(await submit(client, "/jobs" if len(tickets) % 3 else "/jobs/variations"))
        await asyncio.sleep(0.05)


async def audio_of(client: httpx.AsyncClient, ticket: dict[str, Any]) -> bytes:
    reply = await client.get(f"/jobs/{ticket['id']}/audio")
    assert reply.status_code == 200, reply.text
    return reply.content


async def test_backup_of_a_running_server_restores_its_jobs(
    urls: tuple[str | None, str | None], tmp_path: Path
) -> None:
    """After the restore, jobs that had finished before the backup have their audio, and unfinished jobs run again.

    Jobs that were submitted after the backup do not exist.
    """
    kind = "PostgreSQL" if urls[0] else "SQLite"
    live: dict[str, Any] = {"output_dir": str(tmp_path / "outputs"), "jobs": {"database_url": urls[0], "lease_s": 1}}
    backend = ToneBackend()
    async with make_client(backend, **live) as (client, _):
        finished = [await submit(client, path) for path in ("/jobs", "/jobs/variations", "/jobs/inpaint")]
        for ticket in finished:
            await wait(client, ticket)
        audio = [await audio_of(client, ticket) for ticket in finished]
        backend.released.clear()
        unfinished = [await submit(client, path) for path in ("/jobs", "/jobs/variations", "/jobs/inpaint")]
        await wait(client, unfinished[0], "running")
        tickets: list[dict[str, Any]] = []
        busy = asyncio.create_task(keep_submitting(client, tickets))
        await until(lambda: tickets)
        await run_block(f"Backup: {kind}", tmp_path, STABLE_AUDIO_DATABASE_URL=urls[0] or "")
        num_before = len(tickets)
        await until(lambda: len(tickets) > num_before + 3)  # the server keeps working during the backup
        busy.cancel()
        with suppress(asyncio.CancelledError):
            await busy
        later = await submit(client)
        backend.released.set()

    backup = private_backup(tmp_path)
    shutil.rmtree(tmp_path / "outputs")
    target = urls[1] or ""
    await run_block(f"Restore: {kind}", tmp_path, BACKUP=backup.name, STABLE_AUDIO_DATABASE_URL=target)
    restored = live | {"jobs": {"database_url": urls[1], "lease_s": 1}}
    async with make_client(**restored) as (client, _):
        assert [await audio_of(client, ticket) for ticket in finished] == audio
        for ticket in unfinished:
            assert (await wait(client, ticket))["status"] == "succeeded"
            await audio_of(client, ticket)
        assert (await client.get(later["status_url"])).status_code == 404
        known = [ticket for ticket in tickets if (await client.get(ticket["status_url"])).status_code == 200]
        for ticket in known:
            assert (await wait(client, ticket))["status"] == "succeeded"
        assert (await wait(client, await submit(client)))["status"] == "succeeded"


async def test_jobs_with_lost_files_report_an_error(tmp_path: Path) -> None:
    settings = {"output_dir": str(tmp_path / "outputs")}
    backend = ToneBackend()
    async with make_client(backend, **settings) as (client, _):
        finished = await submit(client)
        await wait(client, finished)
        backend.released.clear()
        blocker = await submit(client)
        await wait(client, blocker, "running")
    async with make_client(run_jobs=False, **settings) as (client, _):
        waiting = await submit(client, "/jobs/variations")
    remove_files(tmp_path / "outputs")
    async with make_client(**settings) as (client, _):
        assert (await show(client, finished))["status"] == "succeeded"
        assert (await client.get(f"/jobs/{finished['id']}/audio")).status_code == 404
        status = await wait(client, waiting)
        assert status["status"] == "failed"
        assert "upload is gone" in status["error"]
