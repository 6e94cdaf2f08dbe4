"""Run scripts that use a client library in a separate process and print their results as JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from tests.patience import PATIENCE_S

ONE_SECOND = 44 + 4 * 44100  # size of a WAV file in bytes


async def run_script(*command: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Run a script and return the JSON it prints. Fails if the script fails."""
    client = await asyncio.create_subprocess_exec(
        *command, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(PATIENCE_S):
        out, err = await client.communicate()
    assert client.returncode == 0, err.decode()
    results: dict[str, Any] = json.loads(out)
    return results


def check_output(output: dict[str, Any], base: str) -> None:
    """Assert that `output` is fal's JSON for one second of WAV audio, with a file URL that starts with `base`."""
    file = output["audio_file"]
    assert file["url"].startswith(f"{base}/files/")
    assert (file["content_type"], file["file_size"]) == ("audio/wav", ONE_SECOND)
