"""Our policy against Ray Serve's own on the same bursts of unlike clips, with the same bounds and delays, on a virtual
clock; the case `autoscale` of the benchmarks measures it on a real server.
"""

from __future__ import annotations

import pytest
from ray.serve.config import AutoscalingConfig

from benchmarks.arrivals import draw_arrivals, to_request
from benchmarks.servers.timed import DEVICE, predict_stages
from benchmarks.workload import MIXES, Mix
from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.serving.scaling import Goal
from tests.serving.fleet import ByRequests, ByWork, play

_WIDE = MIXES["demo-wide"]
_UP_S, _DOWN_S, _AFTER_S = 1.0, 10.0, 10.0


def bursts(*, on_s: float, off_s: float, seed: int) -> list[tuple[float, float]]:
    """Three bursts at six requests a second, about two devices' work: (arrival, work) in seconds."""
    mix = Mix("bursts", _WIDE.durations_s, _WIDE.steps, on_s=on_s, off_s=off_s)
    rate_hz, count = 6.0 * on_s / (on_s + off_s), round(3 * 6.0 * on_s)
    arrivals = draw_arrivals(mix, rate_hz=rate_hz, count=count, seed=seed, max_duration_s=12.0)
    card = ModelCard("a", "f")
    return [(a.at_s, predict_stages(DEVICE, to_request(a, card)).total_ms / 1000.0) for a in arrivals]


@pytest.mark.parametrize(("on_s", "off_s"), [(30.0, 30.0), (20.0, 40.0), (60.0, 60.0)])
@pytest.mark.parametrize("load_s", [2.0, 8.0])
@pytest.mark.slow
def test_bursts_wait_less_and_cost_no_more(on_s: float, off_s: float, load_s: float) -> None:
    p95, time = [], []
    for seed in (1, 2, 3):
        requests = bursts(on_s=on_s, off_s=off_s, seed=seed)
        goal = Goal(target_wait_s=1.0, grow_after_s=_UP_S, shrink_after_s=_DOWN_S)
        config = AutoscalingConfig(max_replicas=8, upscale_delay_s=_UP_S, downscale_delay_s=_DOWN_S)
        ours, serves = (
            play(requests, policy, max_replicas=8, load_s=load_s, after_s=_AFTER_S)
            for policy in (ByWork(goal, load_s=load_s), ByRequests(config))
        )
        p95.append(ours.p95_s / serves.p95_s)
        time.append(ours.replica_s / serves.replica_s)
    assert sum(p95) / 3 <= 0.8
    assert sum(time) / 3 <= 1.0
