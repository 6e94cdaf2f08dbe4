"""What a replica counts of its last seconds, on a clock that the test sets."""

from __future__ import annotations

from dataclasses import dataclass

from stable_audio_serve.core.metrics import NullMetrics
from stable_audio_serve.serving.metrics import RecentSum, StepMeter


@dataclass
class Hand:
    now: float = 100.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


def test_the_mean_of_ten_seconds_with_steps_and_nothing_else() -> None:
    clock = Hand()
    meter = StepMeter(NullMetrics(), clock=clock)
    assert meter.rows_per_step is None
    meter.observe("engine_denoise_ms", 1000, model="m")
    assert meter.rows_per_step is None
    for rows in (1, 2, 6):
        meter.observe("engine_rows_per_step", rows, model="m")
    assert meter.rows_per_step == 3
    clock.now += 9.5
    meter.observe("engine_rows_per_step", 11, model="m")
    assert meter.rows_per_step == 5
    clock.now += 1
    assert meter.rows_per_step == 11
    clock.now += 60
    assert meter.rows_per_step is None


def test_a_hundred_thousand_steps_a_second_are_two_numbers() -> None:
    clock = Hand()
    meter = StepMeter(NullMetrics(), clock=clock)
    for second in range(30):
        clock.now = 100.0 + second
        for _ in range(1000):
            meter.observe("engine_rows_per_step", 4, model="m")
    assert meter.rows_per_step == 4
    assert len(meter._steps._seconds) <= 11


def test_counts_a_minute_and_forgets_it() -> None:
    clock = Hand()
    requests = RecentSum(60, clock=clock)
    assert requests.total == 0
    for second in range(200):  # 10,000 requests, 50 a second
        clock.now = 1000.0 + second
        for _ in range(50):
            requests.add()
    assert requests.total == 50 * 61  # sixty whole seconds and the one that runs
    assert len(requests._seconds) == 61
    clock.now += 30
    assert requests.total == 50 * 31
    clock.now += 31
    assert requests.total == 0
