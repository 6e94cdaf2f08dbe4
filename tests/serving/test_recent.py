"""Sums of the last seconds, by hand."""

from __future__ import annotations

from stable_audio_serve.serving.recent import RecentSum
from tests.serving.test_step_meter import Hand


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
