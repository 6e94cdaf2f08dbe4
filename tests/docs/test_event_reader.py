"""The JavaScript in docs/jobs.md that reads a job's events runs unchanged in Node, with a server that needs a key."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from stable_audio_serve.core.keys import hash_key
from tests.api.compat.serving import serve_app
from tests.backends import ToneBackend
from tests.patience import PATIENCE_S

pytestmark = [pytest.mark.server, pytest.mark.slow]

PAGE = Path(__file__).parents[2] / "docs" / "jobs.md"
KEY = "secret"


@asynccontextmanager
async def cut_once(port: int) -> AsyncIterator[int]:
    """Run a proxy for the server at `port`. It closes its first connection after one event. Yields the proxy's port."""
    num_connections = 0

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        is_first = num_connections == 1
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", port)
        server_writer.write(await reader.readuntil(b"\r\n\r\n"))
        while data := await server_reader.read(65536):
            writer.write(data)
            if is_first and b"\ndata: " in data:
                break
        await writer.drain()
        writer.close()
        server_writer.close()

    async with await asyncio.start_server(relay, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
    assert num_connections > 1


async def test_reader_sends_its_key_and_resumes_after_a_lost_connection(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        if os.environ.get("CI") == "true":
            pytest.fail("node is not installed")
        pytest.skip("NOT TESTED: node is not installed")
    (snippet,) = re.findall(r"```js\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    backend = ToneBackend(delay_s=1.5)
    async with serve_app(backend, api={"key_hashes": [hash_key(KEY)]}) as (port, _), cut_once(port) as cut:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client:
            headers = {"Authorization": f"Bearer {KEY}"}
            job = (await client.post("/jobs", json={"prompt": "x", "duration": 1}, headers=headers)).json()["id"]
        script = tmp_path / "reader.mjs"
        script.write_text(
            snippet.replace("http://localhost:8000", f"http://127.0.0.1:{cut}")
            .replace("<id>", job)
            .replace("<key>", KEY)
            .replace("console.log(event, data)", "console.log(JSON.stringify([event, data]))")
        )
        process = await asyncio.create_subprocess_exec(
            node, str(script), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(PATIENCE_S):
            out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    events = [json.loads(line) for line in out.decode().splitlines()]
    assert [event for event, _ in events] == ["progress"] * (len(events) - 1) + ["end"]
    assert events[-1][1]["status"] == "succeeded"
    stages = [data["stage"] for _, data in events[:-1]]
    assert (stages[0], stages[-1]) == ("queued", "done")
    assert len(events) == len({json.dumps(event) for event in events})  # no duplicates
