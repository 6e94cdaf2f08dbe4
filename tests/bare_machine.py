"""A Python where only torch, numpy, transformers, safetensors, pytest and their needs are installed: the installed
packages without those of the web, Ray, audio files and databases.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# httpx stays: transformers' own client of the hub needs it.
ABSENT = (
    "ray", "fastapi", "starlette", "uvicorn", "pydantic", "soundfile", "soxr", "structlog", "typer", "rich", "psycopg",
    "pytest_asyncio", "pytest_timeout", "xdist", "boto3", "matplotlib",
)  # fmt: skip
_HIDDEN = re.compile(
    rf"(?:_?(?:{'|'.join(ABSENT)})\w*|httptools|multipart|python_multipart|pytest_xdist|stable_audio_serve"
    r"|__editable__.*)(?:-.*|\..*)?",
    re.IGNORECASE,
)


def find_packages() -> Iterator[Path]:
    """Yields what stays of the installed packages."""
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not _HIDDEN.fullmatch(entry.name) and entry.suffix != ".pth":
            yield entry


class BareMachine:
    """Runs commands there. `packages` is a folder of links."""

    python = f"{sys.executable} -S"

    def __init__(self, packages: Path) -> None:
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(packages)]),
            "PYTHONNOUSERSITE": "1",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *arguments: str, environment: Mapping[str, str] = {}) -> str:
        """Run `python arguments` in the project's root; it must succeed. Returns what it printed."""
        return self.run_command(*self.python.split(), *arguments, environment=environment)

    def run_command(self, *command: str, environment: Mapping[str, str] = {}) -> str:
        """Run any command likewise."""
        done = subprocess.run(
            command, env=self._environment | environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout


@pytest.fixture(scope="session")
def bare_machine(tmp_path_factory: pytest.TempPathFactory) -> BareMachine:
    folder = tmp_path_factory.mktemp("packages")
    for entry in find_packages():
        (folder / entry.name).symlink_to(entry)
    return BareMachine(folder)
