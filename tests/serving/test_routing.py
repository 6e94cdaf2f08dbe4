"""Requests are shared out evenly among replicas, also when all come at once: on real replicas that count their own."""

from __future__ import annotations

import asyncio
import os
from collections import Counter

import pytest
import ray
from ray import serve

from stable_audio_serve.core.catalog import ModelCatalog
from stable_audio_serve.core.settings import ModelSettings, ReplicaSettings, Settings
from stable_audio_serve.serving.placement import model_options, plan_deployments

pytestmark = [pytest.mark.ray, pytest.mark.slow]
REPLICAS, REQUESTS = 3, 36
_NOTED_S = 0.3  # until the router has noted that an answer is there
# After this long without requests Serve asks the replicas for their queues again, and sends a burst's first requests to
# others than were chosen; Serve's own 10 s would make the test wait.
_QUEUES_FORGOTTEN_S = 0.1


class Counted:
    """Takes as long as somebody holds it."""

    async def generate(self, seconds: float) -> int:
        await asyncio.sleep(seconds)
        return os.getpid()


class Caller:
    """An ingress: one process with one handle."""

    def __init__(self, handle: object) -> None:
        self._handle = handle

    async def call(self, count: int, seconds: float) -> Counter[int]:
        return Counter(await asyncio.gather(*(self._handle.generate.remote(seconds) for _ in range(count))))  # type: ignore[attr-defined]

    async def call_beside_long_ones(self, count: int) -> Counter[int]:
        """Short calls one after another while all replicas but one are busy."""
        generate = self._handle.generate.remote  # type: ignore[attr-defined]
        places: Counter[int] = Counter()
        await asyncio.sleep(_NOTED_S)
        busy = [generate(60.0) for _ in range(REPLICAS - 1)]
        for _ in range(count):
            await asyncio.sleep(_NOTED_S)
            places[await generate(0.0)] += 1
        for response in busy:
            response.cancel()
        return places


async def test_bursts_after_a_pause_are_shared_out_evenly_and_busy_replicas_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_SERVE_QUEUE_LENGTH_CACHE_TIMEOUT_S", str(_QUEUES_FORGOTTEN_S))
    replicas = ReplicaSettings(min_replicas=REPLICAS, max_replicas=REPLICAS)
    plan = plan_deployments(Settings(models=(ModelSettings(name="demo", replicas=replicas, num_cpus=0.0),)))
    assert isinstance(plan.catalog, ModelCatalog)
    options = model_options(plan, plan.settings.models[0], cluster_gpus=0.0) | {"graceful_shutdown_timeout_s": 0.0}
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"location": "NoServer"})
    try:
        model = serve.deployment(Counted).options(**options).bind()
        caller = serve.run(serve.deployment(Caller).options(ray_actor_options={"num_cpus": 0}).bind(model))
        for _ in range(3):
            await asyncio.sleep(_NOTED_S)
            shares = await caller.call.remote(REQUESTS, 1.0)
            assert len(shares) == REPLICAS
            assert max(shares.values()) <= REQUESTS / REPLICAS + 2
        beside = await caller.call_beside_long_ones.remote(10)
        assert max(beside.values()) >= 9
    finally:
        serve.shutdown()
        ray.shutdown()
