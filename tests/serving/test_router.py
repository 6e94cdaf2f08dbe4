"""Which replica our router chooses, given what replicas have published. The replicas are fake, without a cluster."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from ray.serve.request_router import RunningReplica

from stable_audio_serve.core.generation import GenerationRequest, Lora
from stable_audio_serve.core.pricing import Prices
from stable_audio_serve.serving.routing import LeastWorkRouter
from stable_audio_serve.serving.work_ledger import ReplicaWork

CALL = SimpleNamespace(args=[GenerationRequest(prompt="x", duration_s=1.0, seed=1, steps=10)])


class Router(LeastWorkRouter):  # type: ignore[misc]  # Ray has no types
    """Our router without the constructor of Ray Serve's base class, which needs a cluster."""

    def __init__(self, reports: dict[str, ReplicaWork | None], *, old_after_s: float = 3600.0) -> None:
        self.initialize_state(model="demo", old_after_s=old_after_s)
        self._ledger.update({name: work.to_dict() if work else {} for name, work in reports.items()})
        self.replicas: list[Any] = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in reports]

    async def choose(self, call: Any = CALL) -> list[list[str]]:
        ranks: list[list[RunningReplica]] = await self.choose_replicas(self.replicas, call)
        return [[replica.replica_id.unique_id for replica in rank] for rank in ranks]


def report(backlog_ms: float, *, step_ms: float = 1.0, adapters: tuple[str, ...] = ()) -> ReplicaWork:
    prices = Prices(row_ms=0.0, evaluation_ms=step_ms, evaluated_second_ms=0.0, audio_second_ms=0.0)
    return ReplicaWork.now(backlog_ms, prices, adapters=adapters)


async def test_replica_that_would_finish_first_is_ranked_first() -> None:
    router = Router({"busy": report(1e9), "free": report(0.0), "slow": report(0.0, step_ms=1e7)})
    for _ in range(20):
        assert await router.choose() == [["free"], ["slow"], ["busy"]]


async def test_of_equal_replicas_one_with_the_adapter_is_first() -> None:
    loaded = report(0.0, adapters=("a" * 64,))
    router = Router({"plain": report(0.0), "loaded": loaded, "busy": replace(loaded, backlog_ms=1e9)})
    call = SimpleNamespace(args=[replace(CALL.args[0], loras=(Lora("vinyl", sha256="a" * 64),))])
    for _ in range(20):
        assert await router.choose(call) == [["loaded"], ["plain"], ["busy"]]


async def test_expired_reports_are_ignored_and_two_replicas_are_drawn() -> None:
    router = Router({"busy": report(1e9), "free": report(0.0), "new": None}, old_after_s=-1.0)
    drawn: Counter[str] = Counter()
    for _ in range(300):
        (rank,) = await router.choose()
        assert len(rank) == 2
        drawn.update(rank)
    assert all(150 < times < 250 for times in drawn.values())  # the expected value is 200, the standard deviation 8


async def test_silent_replica_gets_its_share_of_random_choices() -> None:
    router = Router({"busy": report(1e9), "free": report(0.0), "silent": None})
    router._ledger._replicas["silent"].reported_at -= 2 * 3600.0
    choices = [await router.choose() for _ in range(300)]
    by_work = [ranks for ranks in choices if len(ranks) == 3]
    assert {ranks[0][0] for ranks in by_work} == {"free"}
    assert 50 < len(choices) - len(by_work) < 150  # the expected value is 100, the standard deviation 8


async def test_without_replicas_the_choice_is_empty() -> None:
    assert await Router({}).choose() == []
    assert await Router({"only": None}).choose(None) == [["only"]]
