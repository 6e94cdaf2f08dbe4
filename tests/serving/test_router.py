"""What the router makes of replicas' words: on replicas that are only names, without a cluster."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

from ray.serve.request_router import RunningReplica

from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.core.pricing import Prices
from stable_audio_serve.serving.routing import LeastWorkRouter
from stable_audio_serve.serving.work_ledger import ReplicaWork

CALL = SimpleNamespace(args=[GenerationRequest(prompt="x", duration_s=1.0, seed=1, steps=10)])


class Router(LeastWorkRouter):  # type: ignore[misc]  # Ray has no types
    """The hooks alone: Serve's own part needs a cluster."""

    def __init__(self, words: dict[str, ReplicaWork | None], *, old_after_s: float = 3600.0) -> None:
        self.initialize_state(model="demo", old_after_s=old_after_s)
        self.choices: Counter[str] = Counter()
        self._ledger.update({name: work.to_dict() if work else {} for name, work in words.items()})
        self.replicas: list[Any] = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in words]

    async def choose(self, call: Any = CALL) -> list[list[str]]:
        ranks: list[list[RunningReplica]] = await self.choose_replicas(self.replicas, call)
        self.choices["queue" if len(ranks) == 1 else "work"] += 1
        return [[replica.replica_id.unique_id for replica in rank] for rank in ranks]


def says(backlog_ms: float, *, step_ms: float = 1.0) -> ReplicaWork:
    return ReplicaWork.now(
        backlog_ms, Prices(row_ms=0.0, evaluation_ms=step_ms, evaluated_second_ms=0.0, audio_second_ms=0.0)
    )


async def test_the_replica_that_will_be_done_first_comes_first() -> None:
    router = Router({"busy": says(1e9), "free": says(0.0), "slow": says(0.0, step_ms=1e7)})
    for _ in range(20):
        assert await router.choose() == [["free"], ["slow"], ["busy"]]
    assert router.choices == {"work": 20}


async def test_of_old_words_nothing_is_believed_and_two_are_drawn() -> None:
    router = Router({"busy": says(1e9), "free": says(0.0), "new": None}, old_after_s=-1.0)
    drawn: Counter[str] = Counter()
    for _ in range(300):
        (rank,) = await router.choose()
        drawn.update(rank)
    assert router.choices == {"queue": 300}
    assert all(150 < times < 250 for times in drawn.values())  # 200 expected, standard deviation 8


async def test_one_silent_replica_of_several_costs_its_share_of_the_choices() -> None:
    router = Router({"busy": says(1e9), "free": says(0.0), "silent": None})
    router._ledger._replicas["silent"].heard_at -= 2 * 3600.0
    first = Counter([ranks[0][0] for ranks in [await router.choose() for _ in range(300)] if len(ranks) == 3])
    assert set(first) == {"free"}
    assert 50 < router.choices["queue"] < 150  # 100 expected, standard deviation 8


async def test_without_replicas_there_is_nothing_to_choose() -> None:
    assert await Router({}).choose() == []
    assert await Router({"only": None}).choose(None) == [["only"]]
