"""Runs the examples as a shell does, in a folder of their own."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import soundfile

from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def _hear_ctrl_c() -> None:
    """A shell starts what runs in the background deaf to it, and with it these tests and all their children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True, slots=True)
class Programs:
    """Starts examples against a server, short ones by their environment."""

    folder: Path
    url: str
    python: str = sys.executable

    async def start(self, name: str, *arguments: str, **environment: str) -> asyncio.subprocess.Process:
        path = str(EXAMPLES / name)
        interpreter = "bash" if path.endswith(".sh") else self.python
        short = {"DURATION": "1", "STEPS": "4", "PAUSE_S": "0.2"}
        return await asyncio.create_subprocess_exec(
            *(interpreter, path, *arguments),
            cwd=self.folder,
            env=os.environ
            | {"STABLE_AUDIO_URL": self.url, "BASE": self.url, "PYTHONPATH": str(ROOT)}
            | short
            | environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            preexec_fn=_hear_ctrl_c,
            start_new_session=True,
        )

    async def run(self, name: str, *arguments: str, code: int = 0, **environment: str) -> str:
        """What the example wrote to standard output, or to standard error if it was to fail."""
        process = await self.start(name, *arguments, **environment)
        return await finish(process, code)

    def seconds(self) -> dict[str, float]:
        """The audio files in the folder, with how long each lasts, seconds."""
        return {
            str(path.relative_to(self.folder)): round(soundfile.info(path).duration, 2)
            for path in sorted(self.folder.rglob("*.*"))
            if path.suffix in {".wav", ".flac"}
        }


async def finish(process: asyncio.subprocess.Process, code: int) -> str:
    async with asyncio.timeout(PATIENCE_S):
        output, errors = await process.communicate()
    said = errors.decode()
    assert process.returncode == code, said
    assert "Traceback" not in said
    return said if code else output.decode()


async def wait_for(process: asyncio.subprocess.Process, text: str, *, end: bytes = b"\n") -> str:
    """The line of standard output that has `text`."""
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE_S):
        while text not in (line := (await process.stdout.readuntil(end)).decode()):
            pass
    return line


def find_examples(suffixes: Sequence[str] = (".py", ".sh")) -> set[str]:
    """Paths of the programs below `examples/`, without the demo model's, which `tests/demo` tests."""
    paths = {path.relative_to(EXAMPLES) for path in EXAMPLES.rglob("*.*") if path.suffix in suffixes}
    return {str(path) for path in paths if path.parts[0] not in ("__init__.py", "demo_model")}
