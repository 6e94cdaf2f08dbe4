"""A Python where only torch, numpy, transformers, safetensors, pytest, hypothesis and their needs are installed."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PRESENT = ("torch", "transformers", "numpy", "safetensors", "pytest", "hypothesis")
# Some of them come with what is present here, and did not there.
ABSENT = (
    "ray", "fastapi", "starlette", "uvicorn", "pydantic", "soundfile", "soxr", "structlog", "typer", "rich", "psycopg",
    "pytest_asyncio", "pytest_timeout", "xdist", "boto3", "matplotlib", "psutil", "aiohttp", "scipy", "sqlalchemy",
)  # fmt: skip


def find_packages() -> Iterator[Path]:
    """Yields what belongs to the packages that are present and to those which they need."""
    installed = Path(sysconfig.get_paths()["purelib"])
    names: set[str] = set()
    for package in PRESENT:
        _add_needed(package, names)
    parts = {file.parts[0] for name in names for file in distribution(name).files or ()}
    for part in sorted(parts - {"..", "__pycache__"}):
        yield installed / part


def _add_needed(package: str, names: set[str]) -> None:
    name = canonicalize_name(package)
    if name in names or name in ABSENT:
        return
    try:
        requirements = [Requirement(line) for line in distribution(name).requires or ()]
    except PackageNotFoundError:
        return
    names.add(name)
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            _add_needed(requirement.name, names)


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
