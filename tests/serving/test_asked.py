"""An answer of other processes, on a clock of ours."""

from __future__ import annotations

import asyncio

import pytest

from stable_audio_serve.serving import operations as module
from stable_audio_serve.serving.operations import Asked
from tests.factories import FakeClock


class Others:
    """Answer with how often they were asked; while they are held up, late."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.is_free = asyncio.Event()
        self.is_free.set()

    async def __call__(self) -> int:
        self.num_asked += 1
        answer = self.num_asked
        await self.is_free.wait()
        return answer


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 0.05)


async def test_thousands_who_want_it_ask_once_a_second() -> None:
    clock, others = FakeClock(), Others()
    asked = Asked(others, first=0, clock=clock)
    assert set(await asyncio.gather(*(asked.answer() for _ in range(5000)))) == {1}
    clock.now += 0.9
    assert await asked.answer() == 1
    clock.now += 0.2
    assert await asked.answer() == 2


async def test_who_is_late_is_waited_for_a_moment_and_their_last_answer_counts_for_a_few_seconds() -> None:
    clock, others = FakeClock(), Others()
    asked = Asked(others, first=0, clock=clock)
    others.is_free.clear()
    assert await asked.answer() == 0
    others.is_free.set()
    assert await asked.answer() == 1
    others.is_free.clear()
    clock.now += 4.0
    assert await asked.answer() == 1
    clock.now += 4.0
    assert await asked.answer() == 0  # what was true then says nothing now
    others.is_free.set()
    assert await asked.answer() == 2


async def test_an_answer_to_an_earlier_question_is_not_one_to_this_one() -> None:
    clock, others = FakeClock(), Others()
    asked = Asked(others, first=0, clock=clock)
    assert await asked.answer() == 1
    clock.now += 2.0
    others.is_free.clear()
    assert await asked.answer() == 1
    asked.forget()
    others.is_free.set()
    assert await asked.answer() == 3
