"""Measures a server that gets three times as many requests as it can serve.

The server has the same model twice. The model `peak` has a long queue, which shows the best throughput. The model
`bounded` has a queue so short that every accepted request should be in time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.dialects import OverHttp
from benchmarks.figures import capacity_rps, fit_alone_ms, is_in_time, percentile, span_s, worst
from benchmarks.load import Record, describe_quiet, in_quiet, play, play_alone, play_clips, play_until_served
from benchmarks.models import CaseSettings, resolve_model
from benchmarks.servers.process import serving
from benchmarks.workload import Arrival, draw_arrivals
from stable_audio_serve.core.catalog import ModelCard

_MIX = "demo-fast"
_NORMAL_RATIO, _NORMAL_IN_A_ROW, _PATIENCE_S = 1.5, 3, 60.0
_ALONE_S = (0.5, 4.0, 13.0)  # clip lengths (seconds) whose time on the idle server is measured, not interpolated
_SHOWS_S = 4.0  # length (seconds) of the clip whose latency shows whether the server is back to normal
_ALONE_CALLS, _WARM_UP_CALLS = 5, 10
_FEW_TRIES = 4
_FACTOR, _RETURNING_FACTOR = 3.0, 1.5
_LARGER_IS_BETTER = ("goodput_over_peak_ratio", "served_within_four_tries_share")
_SMALLER_IS_BETTER = ("refusal_p50_ms", "refusal_p99_ms", "normal_after_s")
_MAX_QUEUE_S = 0.5  # seconds of predicted work in the short queue
# For the short and the full benchmark: seconds of overload, seconds in which clients that obey Retry-After arrive, and
# number of requests in a burst.
_LOADS = ({"seconds": 20, "returning_s": 10, "burst": 50}, {"seconds": 60, "returning_s": 30, "burst": 150})


async def measure(settings: CaseSettings) -> dict[str, Any]:
    """Measure `settings.rounds` rounds. The result is the worst round.

    The capacity is measured with a burst of requests before the overload and another one after it, because the speed of
    a shared machine changes. Raises RuntimeError for a wrong response in a burst.
    """
    load = _LOADS[settings.full]
    entry = resolve_model(settings.model)
    names = {"peak": {}, "bounded": {"max_queue_s": _MAX_QUEUE_S}}
    async with serving(entry, names, threads=settings.threads) as sides:
        take = partial(_round, sides["peak"], sides["bounded"], load=load, card=entry.card)
        measured = [await in_quiet(take) for _ in range(settings.rounds)]
    quiet = describe_quiet([foreign_cores for _, foreign_cores in measured])
    figures = worst_of([figures for figures, _ in measured]) | quiet
    return {"load": load, "mix": _MIX, "is_void": quiet["is_void"], "model": figures}


def worst_of(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the worst value and all values of each figure. The worst value is None if no round has the figure."""
    figures: dict[str, Any] = {}
    for name in (*_LARGER_IS_BETTER, *_SMALLER_IS_BETTER):
        values = [one[name] for one in rounds if one[name] is not None]
        figures[f"worst_{name}"] = None
        if values:
            figures |= worst(f"worst_{name}", values, larger_is_better=name in _LARGER_IS_BETTER)
    return {**figures, "rounds": rounds}


async def _round(peak: OverHttp, bounded: OverHttp, *, load: Mapping[str, int], card: ModelCard) -> dict[str, Any]:
    def draw(count: int, rate_hz: float | None = None) -> tuple[Arrival, ...]:
        return draw_arrivals(_MIX, rate_hz=rate_hz, count=count, seed=1, max_duration_s=card.max_duration_s)

    burst = draw(load["burst"])
    play_burst = partial(play_clips, peak, burst, sample_rate_hz=card.sample_rate_hz)
    await play(peak, burst[:_WARM_UP_CALLS])
    bursts = [await play_burst()]
    lone = {seconds: Arrival(0.0, "a low drone", seconds, seed=1, steps=burst[0].steps) for seconds in _ALONE_S}
    probes = {}
    for seconds, clip in lone.items():
        alone = await play_alone(bounded, [clip] * _ALONE_CALLS)
        probes[seconds] = sorted(alone, key=lambda record: record.latency_ms)[_ALONE_CALLS // 2]
    alone_ms = fit_alone_ms(list(probes.values()))
    peak_hz = capacity_rps(bursts[0])
    offered = draw(round(_FACTOR * peak_hz * load["seconds"]), _FACTOR * peak_hz)
    started_at = time.perf_counter()
    over = await play(bounded, offered)
    limit_ms, ended_at = _NORMAL_RATIO * probes[_SHOWS_S].latency_ms, started_at + offered[-1].at_s
    normal_after_s = await _wait_until_normal(bounded, lone[_SHOWS_S], limit_ms=limit_ms, since=ended_at)
    bursts.append(await play_burst())
    returning_hz = _RETURNING_FACTOR * peak_hz
    returning = await play_until_served(bounded, draw(round(returning_hz * load["returning_s"]), returning_hz))
    burst_work_ms = sum(map(alone_ms, bursts[0]))
    return {
        "peak_rps": [capacity_rps(records) for records in bursts],
        "normal_after_s": normal_after_s,
        **summarize_overload(
            over,
            work_ms=list(map(alone_ms, over)),
            peak_work_ms_per_s=sum(burst_work_ms / span_s(records) for records in bursts) / len(bursts),
        ),
        "served_within_four_tries_share": share_served(returning),
    }


def summarize_overload(
    records: Sequence[Record], *, work_ms: Sequence[float], peak_work_ms_per_s: float
) -> dict[str, Any]:
    """Returns the figures of one overload: goodput as a share of the peak work rate, and times to a refusal.

    A request counts with its time on an idle server (`work_ms`), because accepted requests may be shorter than refused
    ones. Requests that end after the last arrival do not count. The time to a refusal begins at the scheduled arrival,
    and is None if nothing was refused.
    """
    refusals_ms = [record.latency_ms for record in records if record.outcome == "refused"]
    last_due_at = max(record.due_at for record in records)
    in_time_ms = sum(
        ms
        for record, ms in zip(records, work_ms, strict=True)
        if record.ended_at <= last_due_at and is_in_time(record, alone_ms=ms)
    )
    return {
        "goodput_over_peak_ratio": in_time_ms / (peak_work_ms_per_s * last_due_at),
        "refusal_p50_ms": percentile(refusals_ms, 50) if refusals_ms else None,
        "refusal_p99_ms": percentile(refusals_ms, 99) if refusals_ms else None,
    }


def share_served(clients: Sequence[Sequence[Record]]) -> float:
    """Returns the share of clients that were served in at most four attempts. The clients obey Retry-After.

    `clients` has the records of all attempts of each client.
    """
    served = [attempts for attempts in clients if attempts[-1].is_finished and len(attempts) <= _FEW_TRIES]
    return len(served) / len(clients)


async def _wait_until_normal(bounded: OverHttp, lone: Arrival, *, limit_ms: float, since: float) -> float:
    """Returns the seconds from `since` until the server is back to normal, at most _PATIENCE_S.

    The server counts as normal from the first of three successive requests that each take at most `limit_ms`.
    """
    normal: list[float] = []
    while time.perf_counter() - since < _PATIENCE_S:
        sent_at = time.perf_counter()
        (record,) = await play(bounded, [lone])
        normal = [*normal, sent_at - since] if record.is_finished and record.latency_ms <= limit_ms else []
        if len(normal) == _NORMAL_IN_A_ROW:
            return max(0.0, normal[0])
    return _PATIENCE_S


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """Returns a table with one row, the worst round."""
    figures = results["model"]
    refusals_ms = {percent: figures[f"worst_refusal_{percent}_ms"] for percent in ("p50", "p99")}
    return [
        {
            "goodput over peak": figures["worst_goodput_over_peak_ratio"],
            **{f"refusals {p} (ms)": "not measured" if ms is None else ms for p, ms in refusals_ms.items()},
            "normal after (s)": figures["worst_normal_after_s"],
            "served within four tries": figures["worst_served_within_four_tries_share"],
        }
    ]
