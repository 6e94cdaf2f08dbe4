"""The server that all files of this folder share: `make test` gives them to one process, and it ends with the last."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator

import pytest

from tests.serving.conftest import LAZY, TINY, model
from tests.serving.launched import LaunchedServer, write_config


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedServer]:
    """One server in HAProxy mode: `tiny` is preloaded, `lazy` starts at zero, and takes little, `broken` cannot."""
    broken = tmp_path_factory.mktemp("models") / "broken"
    shutil.copytree(TINY, broken)
    (broken / "model.safetensors").write_bytes(b"nothing of use")
    args = {
        "models": [
            model("tiny", aliases=["little"], max_queue_s=1e6, replicas={"max_replicas": 1}),
            model(
                "lazy",
                LAZY,
                max_queue_s=1.0,
                replicas={"max_replicas": 2, "target_wait_s": 3, "downscale_delay_s": 123},
            ),
            model("broken", str(broken)),
        ]
    }
    config = write_config(tmp_path_factory.mktemp("server"), args)
    launched = LaunchedServer(
        config,
        environment={
            "STABLE_AUDIO_MAX_STEPS": "1000",
            "STABLE_AUDIO_MAX_DURATION": "20",
            "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1",  # what is broken is not better the second time
            "http_proxy": "http://127.0.0.1:9",  # meant for the outside world: must not matter on this machine
        },
    )
    try:
        yield launched.wait_until_ready()
    finally:
        launched.stop(number=signal.SIGKILL)
