"""Counts and means over the last seconds, which a replica reports. The clock is fake."""

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


def test_mean_covers_the_steps_of_ten_seconds() -> None:
    clock = Hand()
    meter = StepMeter(NullMetrics(), clock=clock)
    meter.observe("engine_rows_per_step", 100, model="m")  # of the warm-up, which does not count
    meter.open()
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


def test_many_steps_in_a_second_take_two_numbers() -> None:
    clock = Hand()
    meter = StepMeter(NullMetrics(), clock=clock)
    meter.open()
    for second in range(30):
        clock.now = 100.0 + second
        for _ in range(1000):
            meter.observe("engine_rows_per_step", 4, model="m")
    assert meter.rows_per_step == 4
    assert len(meter._steps._seconds) <= 11


def test_sum_covers_a_minute() -> None:
    clock = Hand()
    requests = RecentSum(60, clock=clock)
    assert requests.total == 0
    for second in range(200):  # 10,000 requests, 50 a second
        clock.now = 1000.0 + second
        for _ in range(50):
            requests.add()
    assert requests.total == 50 * 61  # the last sixty seconds and the current one
    assert len(requests._seconds) == 61
    clock.now += 30
    assert requests.total == 50 * 31
    clock.now += 31
    assert requests.total == 0
