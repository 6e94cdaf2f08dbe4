"""Programs written against a client library, run in a process of their own; they print what they saw as JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from tests.patience import PATIENCE_S

ONE_SECOND = 44 + 4 * 44100  # bytes of a WAV file


async def run_script(*command: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """What the program printed; it must succeed."""
    client = await asyncio.create_subprocess_exec(
        *command, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(PATIENCE_S):
        out, err = await client.communicate()
    assert client.returncode == 0, err.decode()
    seen: dict[str, Any] = json.loads(out)
    return seen


def check_output(output: dict[str, Any], base: str) -> None:
    """Fal's output of a second of audio."""
    file = output["audio_file"]
    assert file["url"].startswith(f"{base}/files/")
    assert (file["content_type"], file["file_size"]) == ("audio/wav", ONE_SECOND)
