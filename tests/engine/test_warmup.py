"""The engine's warm-up: which call times it uses, which it ignores as disturbed, and how long it may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from stable_audio_serve.engine.build import resolve_policy
from stable_audio_serve.engine.calls.warmup import WarmUp, step_calls
from stable_audio_serve.engine.hardware.device import open_device
from stable_audio_serve.engine.options import PLAIN, EngineOptions
from stable_audio_serve.engine.scheduling.batching import BatchPolicy, OneRowPerCall
from stable_audio_serve.engine.scheduling.cost import CostModel
from stable_audio_serve.sampling.noise import SeededNoise
from tests.factories import FakeClock, ToyModel


class Timed:
    """A toy model whose calls advance a fake clock, by a time that depends on the number of rows."""

    def __init__(
        self,
        *,
        lazy_s: float = 0.0,
        planning_s: float = 0.0,
        disturbed: Sequence[int] = (),
        slower: float = 1.0,
        most_rows: int = 1000,
    ) -> None:
        """The first call of each kind takes `lazy_s` longer, and the first one with each number of rows `planning_s`.
        The calls with the indices `disturbed` take 20 ms longer.

        There is no memory for more than `most_rows` rows or prompts.
        """
        self.clock = FakeClock()
        self.calls: list[str] = []
        self._shapes: set[tuple[str, int]] = set()
        self._lazy_s, self._planning_s, self._disturbed, self._slower = lazy_s, planning_s, disturbed, slower
        self._most_rows = most_rows
        self.model = ToyModel(on_call=self._take)

    def _take(self, name: str, items: Sequence[object]) -> None:
        if name == "condition":  # this call runs on the host, before the measured calls
            return
        if len(items) > self._most_rows:
            raise torch.OutOfMemoryError("too many rows for this device")
        self.clock.now += 0.001 * self._slower * (2.0 + len(items))
        self.clock.now += self._lazy_s if name not in self.calls else 0.0
        self.clock.now += self._planning_s if (name, len(items)) not in self._shapes else 0.0
        self.clock.now += 0.02 if len(self.calls) in self._disturbed else 0.0
        self.calls.append(name)
        self._shapes.add((name, len(items)))

    def warm_up(self, *, budget_s: float, policy: BatchPolicy | None = None, max_tokens: int = 0) -> CostModel:
        cost = CostModel()
        device = open_device(torch.device("cpu"), clock=self.clock)
        WarmUp(
            self.model,
            cost,
            policy=policy or OneRowPerCall(),
            max_tokens=max_tokens,
            max_prompts=4,
            noise_factory=SeededNoise,
            device=device,
            budget_s=budget_s,
        ).run()
        return cost


def test_lazy_initialisation_counts_neither_as_cost_nor_as_budget() -> None:
    lazy, plain = Timed(lazy_s=30.0), Timed()
    costs = [timed.warm_up(budget_s=2.0) for timed in (lazy, plain)]
    assert lazy.calls == plain.calls
    for work in ("text", "denoise", "decode", "encode"):
        first, second = (cost.call_ms(work, rows=1, frames=64) for cost in costs)  # type: ignore[arg-type]
        assert first == pytest.approx(second)


def test_calls_that_need_too_much_memory_are_not_timed() -> None:
    costs = [Timed(most_rows=most).warm_up(budget_s=1000.0) for most in (2, 1000)]
    assert [cost.call_ms("text", rows=1, frames=0) for cost in costs] == pytest.approx([3.0, 3.0])


def test_the_fastest_of_three_runs_counts() -> None:
    disturbed = Timed(disturbed=[call for call in range(1000) if call % 3]).warm_up(budget_s=1000.0)
    alone = Timed().warm_up(budget_s=1000.0)
    for rows in (1, 2):
        calls = [cost.call_ms("denoise", rows=rows, frames=64) for cost in (disturbed, alone)]
        assert calls[0] == pytest.approx(calls[1])


def test_long_calls_run_twice_and_short_calls_three_times() -> None:
    short, long = Timed(), Timed(slower=50.0)  # a call takes 3 ms or more, and 150 ms or more
    costs = [timed.warm_up(budget_s=1000.0) for timed in (short, long)]
    num_short, num_long = (timed.calls.count("denoise") - 1 for timed in (short, long))  # without the untimed first run
    assert num_short * 2 == num_long * 3 > 0
    assert costs[1].call_ms("denoise", rows=1, frames=64) == pytest.approx(150.0)


def test_the_first_run_of_a_shape_may_take_longer() -> None:
    # All clips are padded to the same length, so calls with equal numbers of rows have the same shape.
    options, cpu = EngineOptions(mode="fast", frame_grid=512), open_device(torch.device("cpu"), clock=FakeClock())
    policy = resolve_policy(ToyModel().spec, options, device=cpu, features=PLAIN, cost=CostModel())
    planning, plain = (
        Timed(planning_s=seconds).warm_up(budget_s=1000.0, policy=policy, max_tokens=8 * 512) for seconds in (0.2, 0.0)
    )
    for rows in (1, 8):
        calls = [cost.call_ms("denoise", rows=rows, frames=512) for cost in (planning, plain)]
        assert calls[0] == pytest.approx(calls[1])


def test_the_budget_limits_runs_but_each_kind_is_measured_once() -> None:
    timed = Timed(slower=1000.0)
    cost = timed.warm_up(budget_s=5.0)
    assert set(timed.calls) == {"encode_text", "denoise", "decode", "encode_audio"}
    assert timed.clock.now - 1000.0 < 2 * 4 * 4.0  # four kinds, each run once untimed and once timed, at most 4 s
    assert cost.call_ms("denoise", rows=1, frames=64) > 1000.0


def test_steps_are_measured_alone_guided_and_in_groups() -> None:
    options = EngineOptions(mode="fast", max_step_tokens=2048)
    cpu = open_device(torch.device("cpu"), clock=FakeClock())

    def shapes(policy: BatchPolicy, frames: int, *, max_tokens: int) -> set[tuple[int, int]]:
        return {group for call in step_calls(policy, frames, max_tokens=max_tokens) for group in call.groups}

    policy = resolve_policy(ToyModel().spec, options, device=cpu, features=PLAIN, cost=CostModel())
    assert shapes(policy, 64, max_tokens=2048) == {(rows, 64) for rows in (1, 2, 4, 8, 32)}
    assert shapes(policy, 256, max_tokens=2048) == {(rows, 256) for rows in (1, 2, 4, 8)}
    assert shapes(OneRowPerCall(), 256, max_tokens=0) == {(1, 256), (2, 256)}


def test_warm_up_compiles_every_kind_of_call_before_timing_any() -> None:
    numbers_of_rows: list[int] = []

    def note(name: str, items: Sequence[object]) -> None:
        if name == "denoise":
            numbers_of_rows.append(len(items))

    timed = Timed()
    timed.model = ToyModel(on_call=note)
    timed.warm_up(budget_s=0.0)
    plain, timed.model.spec = len(numbers_of_rows), replace(timed.model.spec, is_compiled=True)
    numbers_of_rows.clear()
    timed.warm_up(budget_s=0.0)
    assert numbers_of_rows[:4] == [1, 2, 1, 2]  # for text only, then for requests with a source: one row, two rows
    assert len(numbers_of_rows) == plain + 4
