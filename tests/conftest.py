"""Settings and fixtures of all tests.

Each test process computes with one thread. With more threads, test processes that share the cores would be slower, and
results would vary.
Hypothesis has no time limit for an example, because on a busy machine any example may be slow.
"""

from __future__ import annotations

import atexit
import functools
import gc
import logging
import os
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx._transports.default
import pytest
import structlog
from hypothesis import settings

if TYPE_CHECKING:
    from tests.object_storage import ObjectStorage

from tests.databases import postgres, postgres_url
from tests.quick_databases import made_by_alembic, quick_databases

__all__ = ["made_by_alembic", "postgres", "postgres_url", "quick_databases"]

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # runs GPU kernels on the CPU; Triton reads it at its import
_SHARING = ("/served", "/one_ray", "/playground")  # the tests of such a folder share a server, a cluster or a browser
_MARKED = ("chaos", "cluster", "gpu")  # folders in which each test has the mark of the folder's name
settings.register_profile("default", deadline=None, max_examples=20, derandomize=True)
settings.register_profile("long", deadline=None, max_examples=500)  # for `make test-all`
settings.load_profile("default")
httpx._transports.default.create_ssl_context = lambda *args, **options: _create_ssl_context(
    os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"), *args, **options
)
# Print tracebacks without the values of all variables, whose text takes up to 0.1 s of CPU time for each traceback.
structlog.dev.ConsoleRenderer.get_active().exception_formatter = structlog.dev.plain_traceback
gc.disable()  # until all tests are collected, which then takes a seventh less time


@functools.cache
def _create_ssl_context(cert_file: str | None, cert_dir: str | None, *args: Any, **options: Any) -> ssl.SSLContext:
    """Let all httpx clients share the trusted certificates. Otherwise each client reads them again, in 40 ms of CPU
    time. `cert_file` and `cert_dir` are the variables that httpx reads.
    """
    return httpx.create_ssl_context(*args, **options)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip a folder whose tests all have its mark if the option `-m` excludes the mark, to import no module in vain."""
    is_excluded = collection_path.name in _MARKED and f"not {collection_path.name}" in config.option.markexpr
    return True if is_excluded and collection_path.parent == Path(__file__).parent else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest tests first: the tests in tests/served, and then all others with the mark `server`."""
    items.sort(key=lambda item: (not item.nodeid.startswith("tests/served/"), not item.get_closest_marker("server")))


def pytest_collection_finish() -> None:
    """Make Python collect garbage less often, and never in loaded modules. API tests take a fifth less time.

    Python also ignores these modules when pytest collects garbage at the end, which then takes a second less.
    """
    gc.freeze()
    atexit.register(gc.unfreeze)  # otherwise Triton reports its objects as leaked when the process ends
    gc.set_threshold(5000, 10, 30)
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distribute tests like `--dist loadfile`, but run all files of a folder in `_SHARING` in one process."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            folder, _, _ = nodeid.partition("/test_")
            return folder if folder.endswith(_SHARING) else super()._split_scope(nodeid)

        def _reschedule(self, node: Any) -> None:
            # Give a process its next file when it has only one test left. By default, xdist does so when two tests are
            # left. If the two tests take minutes, another process may be idle sooner and should get the file.
            if self._pending_of(self.assigned_work[node]) <= 1:
                super()._reschedule(node)

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def _restored_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After each test, restore the logging configuration, because commands and replicas change it.

    Loggers are not cached, because a cached logger would keep the changed configuration.
    """
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
    from tests.object_storage import running_object_storage

    with running_object_storage() as storage:
        yield storage


@pytest.fixture
def object_storage(_object_storage: ObjectStorage) -> Iterator[ObjectStorage]:
    """Yields an S3 service behind a proxy.

    The proxy passes on all requests, unless a test sets the proxy's `faults`.
    """
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
