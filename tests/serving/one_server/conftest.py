"""The server that all files of this folder share: `make test` gives them to one process, and it ends with the last."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest

from tests.patience import PATIENCE_S
from tests.serving.conftest import LAZY, TINY, model
from tests.serving.launched import LaunchedServer, write_config


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedServer]:
    """One server in HAProxy mode: `tiny` is preloaded, `lazy` starts at zero, and takes little, `broken` cannot."""
    folder = tmp_path_factory.mktemp("server")
    broken = tmp_path_factory.mktemp("models") / "broken"
    shutil.copytree(TINY, broken)
    (broken / "model.safetensors").write_bytes(b"nothing of use")
    args = {
        "models": [
            # A relative path is relative to where the server is started.
            model(
                "tiny", os.path.relpath(TINY, folder), aliases=["little"], max_queue_s=1e6, replicas={"max_replicas": 1}
            ),
            model(
                "lazy",
                LAZY,
                max_queue_s=1.0,
                replicas={"max_replicas": 2, "target_wait_s": 3, "downscale_delay_s": 123},
            ),
            model("broken", str(broken)),
        ]
    }
    launched = LaunchedServer(
        write_config(folder, args),
        environment={
            "STABLE_AUDIO_MAX_STEPS": "1000",
            "STABLE_AUDIO_MAX_DURATION": "20",
            "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1",  # what is broken is not better the second time
            "http_proxy": "http://127.0.0.1:9",  # meant for the outside world: must not matter on this machine
        },
    )
    try:
        launched.probes = probe_start(launched)
        yield launched.wait_until_ready()
    finally:
        launched.stop(number=signal.SIGKILL)


def probe_start(launched: LaunchedServer) -> list[tuple[httpx.Response, int]]:
    """What a server that starts says of its health, and right after it whether it is ready, until it is."""
    answers: list[tuple[httpx.Response, int]] = []
    deadline = time.monotonic() + PATIENCE_S
    with httpx.Client(base_url=launched.url, timeout=30) as client:  # what began to listen and went has no answer
        while time.monotonic() < deadline and not (answers and answers[-1][1] == 200):
            if launched.process.poll() is not None:
                break
            time.sleep(0.05)
            with suppress(httpx.TransportError):  # nobody listens yet, or nobody whom a proxy could ask
                health, ready = client.get("/health"), client.get("/ready").status_code
                if "loaded_models" in health.text:  # else it is a proxy that has nobody to ask yet
                    answers.append((health, ready))
    return answers
