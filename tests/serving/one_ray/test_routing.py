"""Our router balances calls by the work that real replicas publish, even if many calls are made at once."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Sequence
from itertools import count
from typing import Any

import pytest
from ray import serve

from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.core.pricing import Prices
from stable_audio_serve.core.settings import ModelSettings, ReplicaSettings, Settings
from stable_audio_serve.serving.placement import model_options, plan_deployments
from stable_audio_serve.serving.work_ledger import ReplicaWork

pytestmark = [pytest.mark.server, pytest.mark.slow]
REPLICAS = 2
PRICES = Prices(row_ms=0.0, evaluation_ms=1.0, evaluated_second_ms=0.0, audio_second_ms=0.0)
SHORT, MIDDLING, LONG = 10, 100, 600_000  # steps of a request; a step takes a millisecond
_PAUSE_S = 0.2
_NEVER_S = 3600.0  # published work never expires, because replicas on a busy machine may publish late


class TimedReplica:
    """A replica that runs one request after another. A step takes a millisecond."""

    def __init__(self) -> None:
        self._device = asyncio.Lock()
        self._left_ms: dict[int, float] = {}

    async def generate(self, request: GenerationRequest) -> tuple[int, float]:
        """Run a request. Return this replica's process id and the request's time in milliseconds."""
        self._left_ms[request.seed] = ms = PRICES.of_request(request)
        try:
            async with self._device:
                await asyncio.sleep(ms / 1000.0)
        finally:
            del self._left_ms[request.seed]
        return os.getpid(), ms

    def record_routing_stats(self) -> dict[str, Any]:
        return ReplicaWork.now(sum(self._left_ms.values()), PRICES).to_dict()


class Caller:
    """A process that calls the replicas through one handle, like the server's HTTP process."""

    def __init__(self, handle: object) -> None:
        self._handle = handle
        self._seeds = count()

    def _generate(self, steps: int) -> Any:
        request = GenerationRequest(prompt="x", duration_s=1.0, seed=next(self._seeds), steps=steps)
        return self._handle.generate.remote(request)  # type: ignore[attr-defined]

    async def burst(self, steps: Sequence[int]) -> Counter[int]:
        """Send requests with these numbers of steps at once.

        Return the milliseconds of work that each replica received.
        """
        shares: Counter[int] = Counter()
        for place, ms in await asyncio.gather(*map(self._generate, steps)):
            shares[place] += round(ms)
        return shares

    async def avoid_a_busy_replica(self, number: int) -> list[Counter[int]]:
        """Make one replica busy. Then send short calls one after another, and then the same number at once.

        Return two counters, one for each way of sending: how many calls each replica received.
        """
        busy = self._generate(LONG)
        try:
            one_by_one: Counter[int] = Counter()
            for _ in range(number):
                await asyncio.sleep(_PAUSE_S)  # in this time the replicas publish their work
                place, _ = await self._generate(SHORT)
                one_by_one[place] += 1
            burst = await asyncio.gather(*(self._generate(SHORT) for _ in range(number)))
        finally:
            busy.cancel()
        return [one_by_one, Counter(place for place, _ in burst)]


@pytest.fixture
def caller(running_serve: None) -> Any:
    replicas = ReplicaSettings(min_replicas=REPLICAS, max_replicas=REPLICAS)
    plan = plan_deployments(Settings(models=(ModelSettings(name="demo", replicas=replicas, num_cpus=0.0),)))
    options = model_options(plan, plan.settings.models[0], cluster_gpus=0.0) | {"graceful_shutdown_timeout_s": 0.0}
    options["request_router_config"]["request_router_kwargs"]["old_after_s"] = _NEVER_S
    model = serve.deployment(TimedReplica).options(**options).bind()
    return serve.run(serve.deployment(Caller).options(ray_actor_options={"num_cpus": 0}).bind(model))


async def test_calls_go_to_the_replica_with_the_least_work(caller: Any) -> None:
    for steps in ([MIDDLING] * 36, [MIDDLING] * 36, [SHORT, SHORT, SHORT, MIDDLING] * 9):
        await asyncio.sleep(2 * _PAUSE_S)
        shares = await caller.burst.remote(steps)
        assert len(shares) == REPLICAS
        assert max(shares.values()) <= sum(steps) / REPLICAS + 2 * MIDDLING
    one_by_one, at_once = await caller.avoid_a_busy_replica.remote(20)
    assert list(one_by_one.values()) == list(at_once.values()) == [20]
    assert one_by_one.keys() == at_once.keys()
    for _ in range(100):  # the replica whose long call was cancelled must receive calls again
        if len(await caller.burst.remote([SHORT] * 10)) == REPLICAS:
            return
    pytest.fail("a replica whose call was cancelled gets nothing any more")
