"""For all tests: one thread per process, because parallel maths on shared cores is slower and varies. No time limit per
Hypothesis example, because a busy machine is not a bug.
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
_SHARING = ("/served", "/one_ray", "/playground")  # each folder's files share one server, one Ray or one browser
settings.register_profile("default", deadline=None, max_examples=20, derandomize=True)
settings.register_profile("long", deadline=None, max_examples=500)  # `make test-all`
settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest tests: the shared server, then other tests that start programs."""
    items.sort(key=lambda item: (not item.nodeid.startswith("tests/served/"), not item.get_closest_marker("server")))


def pytest_collection_finish() -> None:
    """Collect garbage less often and exclude loaded modules: it took a fifth of the time of the API tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5000, 10, 30)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Use `--dist loadfile`, but send all files of some folders to one process."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            folder, _, _ = nodeid.partition("/test_")
            return folder if folder.endswith(_SHARING) else super()._split_scope(nodeid)

        def _reschedule(self, node: Any) -> None:
            # A process gets its next file when one test of its last file is left; xdist waits for two, maybe minutes.
            if self._pending_of(self.assigned_work[node]) <= 1:
                super()._reschedule(node)

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def _logs_as_they_were(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore logging after commands and replicas configure it. Cached loggers would keep a configuration."""
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
    """An S3 service over HTTP behind a proxy, which passes all requests until a test sets its `faults`."""
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
