"""A day's load as one list of arrivals: equally many requests at each of 24 levels of load. Knows no server.

A real day has hundreds of thousands of requests. Here each hour lasts only as long as its share of the requests
takes to arrive, so rare combinations of rows are missed: the count of shapes still rises with the number of requests.
"""

from __future__ import annotations

import math
from dataclasses import replace

from benchmarks.arrivals import Arrival, draw_arrivals
from benchmarks.workload import Mix

HOURS = 24
_LEAST, _MOST = 0.12, 1.2  # of the capacity: in the quietest hour, and in the busiest


def load_of_hour(hour: int) -> float:
    """Returns the share of the capacity that is asked for: a cosine from the quietest hour to the busiest and back."""
    return (_MOST + _LEAST) / 2 - (_MOST - _LEAST) / 2 * math.cos(2 * math.pi * hour / HOURS)


def draw_day(mix: Mix, *, capacity_hz: float, count: int, seed: int, max_duration_s: float) -> list[Arrival]:
    """Returns `count` arrivals of each hour. Hours follow without a pause: what one leaves undone, the next finds."""
    day: list[Arrival] = []
    starts_at = 0.0
    for hour in range(HOURS):
        arrivals = draw_arrivals(
            mix,
            rate_hz=load_of_hour(hour) * capacity_hz,
            count=count,
            seed=HOURS * seed + hour,
            max_duration_s=max_duration_s,
        )
        day += [replace(arrival, at_s=starts_at + arrival.at_s) for arrival in arrivals]
        starts_at = day[-1].at_s
    return day
