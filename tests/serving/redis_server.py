"""A real Redis server, in which Ray's head node stores its state. The program must be installed on this machine.

If Redis is not installed, tests that need Redis are skipped with a warning, or fail if CI=true.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.serving.launched import free_port

_PATIENCE_S = 30.0


@contextmanager
def running_redis(folder: Path) -> Iterator[str]:
    """Run a Redis server that stores nothing on disk. Yields its `host:port`."""
    if (program := shutil.which("redis-server")) is None:
        problem = "it is not installed (Debian and Ubuntu: apt-get install redis-server)"
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI needs Redis: {problem}")
        pytest.skip(f"NOT TESTED WITH REDIS: {problem}")
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with (folder / "redis.log").open("w") as log:
        process = subprocess.Popen([program, *options], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + _PATIENCE_S
        while "Ready to accept connections" not in (folder / "redis.log").read_text():
            assert process.poll() is None, (folder / "redis.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(_PATIENCE_S)
