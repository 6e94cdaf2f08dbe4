from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.goldens import SA3_GOLDENS
from tests.serving.launched import LaunchedServer, write_config

# Tiny checkpoints with random weights: everything is real but the sound.
TINY = str(SA3_GOLDENS / "tiny-s")
LAZY = str(SA3_GOLDENS / "tiny-l")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedServer]:
    """One server in HAProxy mode: `tiny` is preloaded, `lazy` starts at zero, and takes little, `broken` cannot."""
    broken = tmp_path_factory.mktemp("models") / "broken"
    shutil.copytree(TINY, broken)
    (broken / "model.safetensors").write_bytes(b"nothing of use")
    args = {
        "models": [
            {"name": "tiny", "path": TINY, "aliases": ["little"], "max_queue_s": 1e6, "replicas": {"max_replicas": 1}},
            {
                "name": "lazy",
                "path": LAZY,
                "max_queue_s": 1.0,
                "replicas": {"max_replicas": 2, "target_wait_s": 3, "downscale_delay_s": 123},
            },
            {"name": "broken", "path": str(broken)},
        ]
    }
    config = write_config(tmp_path_factory.mktemp("server"), args)
    launched = LaunchedServer(
        config,
        environment={
            "STABLE_AUDIO_MAX_STEPS": "1000",
            "STABLE_AUDIO_MAX_DURATION": "20",
            "http_proxy": "http://127.0.0.1:9",  # meant for the outside world: must not matter on this machine
        },
    )
    try:
        yield launched.wait_until_ready()
    finally:
        launched.stop()
