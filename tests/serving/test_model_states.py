"""A real server with models that have no replica at first, cannot be loaded, or are full."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.patience import PATIENCE_S, wait_until
from tests.served.conftest import make_body
from tests.serving.conftest import LAZY, TINY, model
from tests.serving.launched import LaunchedServer, write_config

pytestmark = [pytest.mark.server, pytest.mark.slow]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weight file of the model `fragile`, which tests may damage."""
    return shutil.copytree(TINY, tmp_path_factory.mktemp("models") / "fragile") / "model.safetensors"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Iterator[LaunchedServer]:
    """Run a server: `tiny` is preloaded, `lazy` starts without replicas and has a short queue, `broken` cannot load."""
    folder = tmp_path_factory.mktemp("server")
    broken = tmp_path_factory.mktemp("models") / "broken"
    shutil.copytree(TINY, broken)
    (broken / "model.safetensors").write_bytes(b"nothing of use")
    scaling = {"max_replicas": 2, "target_wait_s": 3, "downscale_delay_s": 123}
    args = {
        "models": [
            model("tiny", max_queue_s=1e6, replicas={"max_replicas": 1}),
            model("lazy", LAZY, max_queue_s=1.0, replicas=scaling),
            model("broken", str(broken)),
            model("fragile", str(weights.parent)),
        ]
    }
    once = {"RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1"}  # `broken` can never start, so one attempt is enough
    launched = LaunchedServer(write_config(folder, args), environment={"STABLE_AUDIO_MAX_STEPS": "1000"} | once)
    try:
        yield launched.wait_until_ready()
    finally:
        launched.stop(number=signal.SIGKILL)


def test_model_at_zero_replicas_answers_its_first_request(server: LaunchedServer) -> None:
    assert server.client.get("/health").json()["models"]["lazy"]["stage"] == "idle"
    assert server.pids("ServeReplica:audio:lazy") == []  # reading the status starts no replica
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(server.client.post, "/generate", json=make_body(model="lazy"))
        stages = set()
        while not held.done():
            stages.add(server.client.get("/health").json()["models"]["lazy"]["stage"])
            time.sleep(0.1)
    assert "waking" in stages
    assert stages <= {"idle", "waking", "ready"}  # never "loading", which would mean that requests are refused
    assert held.result().status_code == 200
    assert "lazy" in server.client.get("/health").json()["loaded_models"]


def test_unloadable_model_is_refused_long_before_the_deadline(server: LaunchedServer) -> None:
    for _ in range(2):
        response = server.client.post("/generate", json=make_body(model="broken"))
        assert response.status_code == 503
        assert "broken failed to load; the server's log says why" in response.json()["detail"]
        assert "retry-after" not in response.headers  # retrying is useless
    health = server.client.get("/health").json()
    assert health["models"]["broken"]["stage"] == "failed"
    assert health["status"] == "ok"


def test_model_that_cannot_start_again_refuses_requests(server: LaunchedServer, weights: Path) -> None:
    """Ray Serve tries to start it without end. Meanwhile, requests do not wait for their whole time limit."""
    assert server.client.post("/generate", json=make_body(model="fragile")).status_code == 200
    kept = weights.rename(weights.with_suffix(".kept"))
    weights.write_bytes(b"nothing of use")
    (replica,) = server.pids("ServeReplica:audio:fragile")
    os.kill(replica, signal.SIGKILL)
    response = server.client.post("/generate", json=make_body(model="fragile"))
    assert response.status_code == 503
    assert "fragile lost its replicas and failed to load again" in response.json()["detail"]
    assert "retry-after" in response.headers
    assert server.client.get("/health").json()["models"]["fragile"]["stage"] == "failed"
    kept.rename(weights)
    wait_until(lambda: server.client.post("/generate", json=make_body(model="fragile")).status_code == 200)


def test_overload_is_a_503_with_a_retry_time(server: LaunchedServer) -> None:
    def ask(seed: int) -> httpx.Response:
        return server.client.post("/generate", json=make_body(model="lazy", duration=20, steps=300, seed=seed))

    with ThreadPoolExecutor(30) as pool:
        responses = list(pool.map(ask, range(30)))
    assert {response.status_code for response in responses} == {200, 503}
    refused = [response for response in responses if response.status_code == 503]
    assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
    assert all(response.json()["detail"] for response in refused)


def test_autoscaling_settings_reach_serve(server: LaunchedServer) -> None:
    settings = server.deployment_settings()
    tiny, lazy = (settings[name]["autoscaling_config"] for name in ("tiny", "lazy"))
    assert (tiny["min_replicas"], tiny["max_replicas"]) == (1, 1)
    assert (lazy["min_replicas"], lazy["max_replicas"]) == (0, 2)
    assert lazy["policy"]["policy_kwargs"] == {"target_wait_s": 3}
    assert (lazy["upscale_delay_s"], lazy["downscale_delay_s"]) == (3, 123)


def test_a_refused_configuration_leaves_the_server_ready(server: LaunchedServer) -> None:
    """The last test, because Ray Serve lists no deployments from now on."""
    with server.look_inside("tests.serving.redeploy", json.dumps({"modle": "tiny"})) as program:
        program.communicate()
    probes = []
    deadline = time.monotonic() + PATIENCE_S
    while "modle" not in server.output:
        assert time.monotonic() < deadline, server.output
        probes.append(server.client.get("/ready").status_code)
    time.sleep(1.0)  # until the status was read again
    assert {*probes, server.client.get("/ready").status_code} == {200}
