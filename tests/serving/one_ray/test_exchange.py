"""Processes of one deployment tell each other whom they refused, through Ray Serve."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any

import pytest
from ray import serve

from stable_audio_serve.core.errors import OverloadedError, QueueFullError
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.serving.backend import RayBackend
from stable_audio_serve.serving.exchange import EVERY_S, PromiseExchange
from stable_audio_serve.serving.overload import Word
from stable_audio_serve.serving.placement import INGRESS_NAME
from tests.backends import make_catalog

pytestmark = [pytest.mark.server, pytest.mark.slow]

APPLICATION, MODEL = "audio", "small-sfx"
ROOM_IN_S = 30.0
TRIES = 5  # on a busy machine; each adds two seconds at most without the others' words


class AlwaysFull:
    """In the place of a model's handle."""

    class generate:
        @staticmethod
        async def remote(_: GenerationRequest) -> QueueFullError:
            return QueueFullError("full", retry_after_s=ROOM_IN_S, num_ahead=10, ahead_s=10.0)


class Asked:
    """An ingress replica without HTTP, before a model that does a request a second."""

    def __init__(self) -> None:
        handles: Any = {MODEL: AlwaysFull}
        self._backend = RayBackend(make_catalog(), handles, application=APPLICATION, num_callers=2)
        ingress = serve.get_deployment_handle(INGRESS_NAME, APPLICATION, _check_exists=False)
        self._exchange = PromiseExchange(self._backend, ingress=ingress)
        self._telling = asyncio.get_running_loop().create_task(self._exchange.run())

    async def hear_promises(self, teller: str, words: Mapping[str, Word]) -> None:
        self._exchange.hear(teller, words)

    async def pid(self) -> int:
        return os.getpid()

    async def refuse(self, number: int, *, of: int) -> float | None:
        """Returns what the last of so many clients of replica `of` is told; None from other replicas."""
        if of != os.getpid():
            return None
        told_s = 0.0
        for _ in range(number):
            try:
                await self._backend.generate(MODEL, GenerationRequest(prompt="rain", duration_s=1.0, seed=1))
            except OverloadedError as error:
                told_s = error.retry_after_s or 0.0
        return told_s


@pytest.fixture
def ingress(running_serve: None) -> Any:
    options = {"name": INGRESS_NAME, "num_replicas": 2, "ray_actor_options": {"num_cpus": 0}}
    options["graceful_shutdown_timeout_s"] = 0.0
    return serve.run(serve.deployment(Asked).options(**options).bind(), name=APPLICATION, route_prefix=None)


async def test_who_was_refused_by_one_is_expected_by_the_other(ingress: Any) -> None:
    one, other = await ingress.broadcast("pid").results_async()
    told: list[float] = []
    for _ in range(TRIES):
        await ingress.broadcast("refuse", 20, of=one).results_async()
        await asyncio.sleep(2 * EVERY_S)
        told += filter(None, await ingress.broadcast("refuse", 1, of=other).results_async())
        if told[-1] > ROOM_IN_S + 20:  # behind the twenty, of whom one is done each second
            return
    pytest.fail(f"clients of its own are all that it knows: {told}")
