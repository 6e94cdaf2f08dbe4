"""The Python blocks of docs/clients.md run as one program, in the page's order."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import pytest
import soundfile

from tests.api.compat.serving import serve_app
from tests.backends import RATE_HZ

pytestmark = [pytest.mark.server, pytest.mark.slow]

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"


async def test_blocks_run_as_one_program(tmp_path: Path) -> None:
    program = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL))
    async with serve_app() as (port, _):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", program),
            cwd=tmp_path,
            env={"STABLE_AUDIO_URL": f"http://127.0.0.1:{port}", "PYTHONPATH": str(PAGE.parents[1])},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    assert "steps" in output.decode()
    assert soundfile.info(tmp_path / "rain.wav").frames == 2 * RATE_HZ
    assert soundfile.info(tmp_path / "longer.wav").frames == 5 * RATE_HZ
    names = {path.suffix for path in await asyncio.to_thread(lambda: list(tmp_path.iterdir()))}
    assert names == {".wav", ".flac"}
