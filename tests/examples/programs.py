"""Run the programs of `examples/` as child processes, in a temporary folder."""

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


def _enable_ctrl_c() -> None:
    """Make Ctrl-C work in a child process. Without this, a child ignores SIGINT if the tests run in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True, slots=True)
class Programs:
    """Runs examples in `folder` with the server at `url`. Environment variables make the generated clips short."""

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
            preexec_fn=_enable_ctrl_c,
            start_new_session=True,
        )

    async def run(self, name: str, *arguments: str, code: int = 0, **environment: str) -> str:
        """Run an example that must exit with `code`.

        Returns its standard output, or standard error if `code` is not 0.
        """
        process = await self.start(name, *arguments, **environment)
        return await finish(process, code)

    def seconds(self) -> dict[str, float]:
        """Returns the durations in seconds of the audio files in the folder, by path."""
        return {
            str(path.relative_to(self.folder)): round(soundfile.info(path).duration, 2)
            for path in sorted(self.folder.rglob("*.*"))
            if path.suffix in {".wav", ".flac"}
        }


async def finish(process: asyncio.subprocess.Process, code: int) -> str:
    async with asyncio.timeout(PATIENCE_S):
        output, errors = await process.communicate()
    message = errors.decode()
    assert process.returncode == code, message
    assert "Traceback" not in message
    return message if code else output.decode()


async def wait_for(process: asyncio.subprocess.Process, text: str, *, end: bytes = b"\n") -> str:
    """Wait until the process prints a line that contains `text`. Returns the line."""
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE_S):
        while text not in (line := (await process.stdout.readuntil(end)).decode()):
            pass
    return line


def find_examples(suffixes: Sequence[str] = (".py", ".sh")) -> set[str]:
    """Returns the paths of all programs below `examples/`, except the demo model's, which `tests/demo` covers."""
    paths = {path.relative_to(EXAMPLES) for path in EXAMPLES.rglob("*.*") if path.suffix in suffixes}
    return {str(path) for path in paths if path.parts[0] not in ("__init__.py", "demo_model")}
