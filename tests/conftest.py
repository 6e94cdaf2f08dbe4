"""Settings and fixtures of all tests.

Each process computes with one thread, because several threads on shared cores are slower and vary. Hypothesis has no
time limit per example, because a busy machine is not a fault.
"""

from __future__ import annotations

import gc
import logging
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from hypothesis import settings

if TYPE_CHECKING:
    from tests.object_storage import ObjectStorage

from tests.databases import postgres, postgres_url

__all__ = ["postgres", "postgres_url"]

os.environ.setdefault("OMP_NUM_THREADS", "1")
_SHARING = ("/served", "/one_ray", "/playground")  # the files of each folder share a server, a Ray or a browser
settings.register_profile("default", deadline=None, max_examples=20, derandomize=True)
settings.register_profile("long", deadline=None, max_examples=500)  # for `make test-all`
settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest tests first: tests with the shared server, then other tests that start programs."""
    items.sort(key=lambda item: (not item.nodeid.startswith("tests/served/"), not item.get_closest_marker("server")))


def pytest_collection_finish() -> None:
    """Collect garbage less often and skip loaded modules. Collection took a fifth of the time of the API tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5000, 10, 30)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distribute tests as `--dist loadfile` does, but send all files of the folders in `_SHARING` to one process."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            folder, _, _ = nodeid.partition("/test_")
            return folder if folder.endswith(_SHARING) else super()._split_scope(nodeid)

        def _reschedule(self, node: Any) -> None:
            # Give a process its next file when it has one test left. xdist would do so at two tests, too early if
            # a test takes minutes.
            if self._pending_of(self.assigned_work[node]) <= 1:
                super()._reschedule(node)

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def _restored_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore logging, which commands and replicas configure. Loggers are not cached, or they would keep it."""
    configure = structlog.configure

    def configure_uncached(*processors: Any, **options: Any) -> None:
        configure(*processors, **options | {"cache_logger_on_first_use": False})

    monkeypatch.setattr(structlog, "configure", configure_uncached)
    ours = logging.getLogger("stable_audio_serve")
    handlers, propagate, level = ours.handlers, ours.propagate, ours.level
    yield
    ours.handlers, ours.propagate = handlers, propagate
    ours.setLevel(level)
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def _object_storage() -> Iterator[ObjectStorage]:
    from tests.object_storage import running_object_storage  # moto is slow to load, and few tests need it

    with running_object_storage() as storage:
        yield storage


@pytest.fixture
def object_storage(_object_storage: ObjectStorage) -> Iterator[ObjectStorage]:
    """Yields an S3 service behind a proxy. The proxy passes on all requests unless a test sets its `faults`."""
    yield _object_storage
    _object_storage.proxy.reset()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """Yields a mounted file system of 1 MiB."""
    with _mounted(tmp_path / "disk", num_mib=1) as folder:
        yield folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yields a mounted file system of 8 MiB, large enough for a job database."""
    with _mounted(tmp_path / "small-disk", num_mib=8) as folder:
        yield folder


@contextmanager
def _mounted(folder: Path, *, num_mib: int) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={num_mib}m", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a file system of {num_mib} MiB cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)
