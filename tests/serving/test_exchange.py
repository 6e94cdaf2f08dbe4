"""What an ingress replica makes of others that cannot be told, with handles that fail as Ray's do."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import DeploymentUnavailableError

from stable_audio_serve.serving import exchange as module
from stable_audio_serve.serving.exchange import PromiseExchange
from stable_audio_serve.serving.overload import Word


class Others:
    """The broadcast fails in one way after the other, then they hear."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.heard: list[Mapping[str, Word]] = []
        self.has_heard = asyncio.Event()

    def broadcast(self, method: str, teller: str, words: Mapping[str, Word]) -> Any:
        assert method == "hear_promises"
        if self.failures and isinstance(self.failures[0], ValueError):
            raise self.failures.pop(0)

        async def results_async(**_: object) -> None:
            if self.failures:
                raise self.failures.pop(0)
            self.heard.append(words)
            self.has_heard.set()

        return SimpleNamespace(results_async=results_async)


async def test_goes_on_telling_whatever_one_time_ended_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.001)
    others = Others(
        TimeoutError(), ActorDiedError(), DeploymentUnavailableError(SimpleNamespace()), ValueError("no controller")
    )
    words = {"small-sfx": Word(came=(1,))}
    backend: Any = SimpleNamespace(tell=lambda: words)
    exchange = PromiseExchange(backend, ingress=others)  # type: ignore[arg-type]
    telling = asyncio.create_task(exchange.run())
    async with asyncio.timeout(20):
        await others.has_heard.wait()
    assert others.heard[0] == words
    telling.cancel()


async def test_does_not_hear_itself() -> None:
    heard: list[Mapping[str, Word]] = []
    exchanges = [PromiseExchange(SimpleNamespace(hear=heard.append), ingress=Others()) for _ in range(2)]  # type: ignore[arg-type]
    for exchange in exchanges:
        exchange.hear(exchanges[0]._name, {"small-sfx": Word(num_done=1)})
    assert heard == [{"small-sfx": Word(num_done=1)}]
