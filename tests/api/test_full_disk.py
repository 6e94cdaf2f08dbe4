"""Jobs and uploads where the disk is full: a real file system of 1 MiB."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx

from tests.api.compat.serving import make_client
from tests.audio_files import make_audio_file


async def ended(client: httpx.AsyncClient, seconds: float) -> dict[str, Any]:
    """The status of a job for a clip of this length, whose file has 176 kB per second."""
    ticket = await client.post("/jobs", json={"prompt": "rain", "duration": seconds})
    assert ticket.status_code == 202, ticket.text
    async with asyncio.timeout(20):
        while True:
            status: dict[str, Any] = (await client.get(ticket.json()["status_url"])).json()
            if status["completed_at"]:
                return status
            await asyncio.sleep(0.02)


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


async def test_a_full_disk_is_said_and_nothing_is_left_of_what_did_not_fit(tiny_disk: Path, tmp_path: Path) -> None:
    jobs = {"database_url": f"sqlite:///{tmp_path / 'jobs.db'}"}
    async with make_client(output_dir=str(tiny_disk), jobs=jobs) as (client, _):
        failed = await ended(client, 10.0)
        assert (failed["status"], failed["attempts"]) == ("failed", 1)
        assert "no room left" in failed["error"]
        source = make_audio_file(duration_s=10.0)
        form = {"prompt": "rain", "duration": "1"}
        refused = await client.post("/jobs/variations", data=form, files={"audio": source})
        assert (refused.status_code, refused.json()["detail"]) == (507, "the disk is full")
        assert names(tiny_disk) == []
        fine = await ended(client, 1.0)
        assert fine["status"] == "succeeded"
        assert len((await client.get(fine["download_url"])).content) > 176_000
