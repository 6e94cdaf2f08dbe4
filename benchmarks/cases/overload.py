"""What a server still does when three times as much is asked of it as it can do, how soon it says no, how soon it is as
before, and how soon clients are served that come again when Retry-After says: on the real model, and on a stand-in
whose device is a clock.

The server has the same model twice: with a queue for everything, which shows what it can do at best, and with one as
short as an operator would set who wants every accepted request to be in time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.arrivals import Arrival, draw_arrivals
from benchmarks.cases.engine import resolve_model
from benchmarks.compare.quiet import describe_quiet, measure_in_quiet
from benchmarks.http_load import Load, LoadGenerator, Sent, load_generator, require_clips
from benchmarks.metrics import percentile
from benchmarks.servers.process import model_args, running_server, write_config
from benchmarks.settings import CaseSettings
from stable_audio_serve.models.registry import ModelEntry

_MIX = "demo-fast"
_SIDES = {"model": "stable_audio_serve.serving.app:build", "stand_in": "benchmarks.servers.timed:build"}
_PEAK, _BOUNDED = "peak", "bounded"
_SLACK, _LEAST_S = 5.0, 1.0  # in time is within five times the time alone, or a second
_NORMAL_RATIO = 1.5
_NORMAL_IN_A_ROW = 3
_ALONE_S = (0.5, 4.0, 13.0)  # clips whose times alone are measured, the others' lie between; seconds
_SHOWS_S = 4.0  # the one that shows whether the server is as before
_ALONE_CALLS = 5
_WARM_UP_CALLS = 10
_FEW = 4  # attempts, after which clients give up
_SEED = 1


@dataclass(frozen=True, slots=True)
class OverloadLoad:
    """`factor` times the capacity is offered for `seconds`; capacity is that of two bursts of `burst` requests, one
    before and one after, because a shared machine's pace changes. The bounded model accepts `max_queue_s` of predicted
    work. After the end a lone request is sent again and again for up to `patience_s`. Then `returning_factor` times the
    capacity is offered for `returning_s` by clients that come again as they are told. `sides`: the model, and a
    stand-in whose device is a clock.
    """

    factor: float = 3.0
    seconds: float = 20.0
    returning_factor: float = 1.5
    returning_s: float = 10.0
    burst: int = 50
    max_queue_s: float = 0.5
    patience_s: float = 60.0
    sides: tuple[str, ...] = ("model",)


FULL = OverloadLoad(seconds=60.0, returning_s=30.0, burst=150, sides=("model", "stand_in"))


def run_overload_case(settings: CaseSettings, load: OverloadLoad | None = None) -> dict[str, Any]:
    """`settings.rounds` rounds on each side, the worse counts. Raises RuntimeError for a wrong answer in the burst."""
    load = load or (FULL if settings.full else OverloadLoad())
    sides = {side: _measure(settings, load, import_path=_SIDES[side]) for side in load.sides}
    return {
        "load": asdict(load),
        "mix": _MIX,
        "target": {
            "goodput_over_peak_ratio": 0.9,
            "refusal_p50_ms": 20.0,
            "refusal_p99_ms": 100.0,
            "normal_after_s": 30.0,
            "served_within_four_tries_share": 0.95,
        },
        "is_void": any(figures["is_void"] for figures in sides.values()),
        **sides,
    }


def _measure(settings: CaseSettings, load: OverloadLoad, *, import_path: str) -> dict[str, Any]:
    entry = resolve_model(settings.model)
    models = [model_args(entry, name=name, threads=settings.threads) for name in (_PEAK, _BOUNDED)]
    models[1]["max_queue_s"] = load.max_queue_s
    with tempfile.TemporaryDirectory() as folder:
        ingress = {"max_ongoing_requests": 10_000}  # the model's bound is what counts here
        config = write_config(
            Path(folder), entry, threads=settings.threads, import_path=import_path, models=models, ingress=ingress
        )
        with running_server(config) as server, load_generator(server.url) as client:
            measured = [measure_in_quiet(partial(_round, client, load, entry=entry)) for _ in range(settings.rounds)]
    rounds = [figures for figures, _ in measured]
    return {
        "worst_goodput_over_peak_ratio": min(figures["goodput_over_peak_ratio"] for figures in rounds),
        "worst_finished_over_peak_ratio": min(figures["finished_over_peak_ratio"] for figures in rounds),
        "worst_refusal_p50_ms": max(figures["refusal_p50_ms"] for figures in rounds),
        "worst_refusal_p99_ms": max(figures["refusal_p99_ms"] for figures in rounds),
        "worst_normal_after_s": max(figures["normal_after_s"] for figures in rounds),
        "worst_served_within_four_tries_share": min(
            figures["returning"]["served_within_four_tries_share"] for figures in rounds
        ),
        "other_answers": sum(figures["other_answers"] for figures in rounds),
        "refusals_without_retry_after": sum(figures["refusals_without_retry_after"] for figures in rounds),
        **describe_quiet([watch for _, watch in measured]),
        "rounds": rounds,
    }


def _round(client: LoadGenerator, load: OverloadLoad, *, entry: ModelEntry) -> dict[str, Any]:
    def draw(count: int, rate_hz: float | None = None) -> tuple[Arrival, ...]:
        longest_s = entry.card.max_duration_s
        return draw_arrivals(_MIX, rate_hz=rate_hz, count=count, seed=_SEED, max_duration_s=longest_s).arrivals

    burst = draw(load.burst)
    client.send(_PEAK, burst[:_WARM_UP_CALLS])
    peak = _burst(client, burst, entry=entry)
    alone_ms = _measure_alone(client, steps=burst[0].steps, longest_s=entry.card.max_duration_s)
    rate_hz = load.factor * peak.rate_hz
    offered = draw(round(rate_hz * load.seconds), rate_hz)
    over = client.send(_BOUNDED, offered)
    ended_at = time.perf_counter() - max(0.0, over.span_s - offered[-1].at_s)
    lone, lone_ms = _lone(_SHOWS_S, steps=burst[0].steps), alone_ms[_SHOWS_S]
    normal_after_s = _wait_until_normal(
        client, lone, limit_ms=_NORMAL_RATIO * lone_ms, since=ended_at, patience_s=load.patience_s
    )
    peaks = [peak, _burst(client, burst, entry=entry)]
    returning_hz = load.returning_factor * peak.rate_hz
    returning = client.send_until_admitted(_BOUNDED, draw(round(returning_hz * load.returning_s), returning_hz))
    burst_work_ms = sum(times_alone_ms(burst, alone_ms))
    return {
        "peak_rps": [peak.rate_hz for peak in peaks],
        "offered_rps": rate_hz,
        "alone_p50_ms": alone_ms,
        "normal_after_s": normal_after_s,
        **summarize_overload(
            over,
            work_ms=times_alone_ms(offered, alone_ms),
            peak_work_ms_per_s=sum(burst_work_ms / peak.span_s for peak in peaks) / len(peaks),
        ),
        "returning": summarize_returns(returning),
    }


def _burst(client: LoadGenerator, burst: Sequence[Arrival], *, entry: ModelEntry) -> Load:
    peak = client.send(_PEAK, burst)
    require_clips(peak, burst, channels=entry.card.channels, sample_rate_hz=entry.card.sample_rate_hz)
    return peak


def times_alone_ms(arrivals: Sequence[Arrival], measured_ms: Mapping[float, float]) -> list[float]:
    """Returns each request's time on an idle server, on straight lines between those measured by clip length."""
    lengths_s, times_ms = list(measured_ms), list(measured_ms.values())
    return [float(np.interp(arrival.duration_s, lengths_s, times_ms)) for arrival in arrivals]


def summarize_overload(load: Load, *, work_ms: Sequence[float], peak_work_ms_per_s: float) -> dict[str, Any]:
    """Returns the figures of one overload.

    Work is counted in times alone, because a short run's accepted requests may happen to be short ones. What is left
    when the arrivals end does not count as done meanwhile. Refusals take from the scheduled arrival.
    """
    finished = [sent for sent in load.sent if sent.outcome == "finished"]
    refused = [sent for sent in load.sent if sent.outcome == "refused"]
    others = [sent for sent in load.sent if sent.outcome == "failed"]
    span_s = max(sent.due_at for sent in load.sent)
    meanwhile = [
        (sent, alone_ms)
        for sent, alone_ms in zip(load.sent, work_ms, strict=True)
        if sent.outcome == "finished" and sent.ended_at <= span_s
    ]
    in_time = [pair for pair in meanwhile if pair[0].latency_ms <= max(_SLACK * pair[1], _LEAST_S * 1000.0)]
    peak_ms = peak_work_ms_per_s * span_s
    return {
        "goodput_over_peak_ratio": sum(alone_ms for _, alone_ms in in_time) / peak_ms,
        "finished_over_peak_ratio": sum(alone_ms for _, alone_ms in meanwhile) / peak_ms,
        "finished_p95_ms": _percentile([sent.latency_ms for sent in finished], 0.95),
        "refused_share": len(refused) / len(load.sent),
        "refusal_p50_ms": _percentile([sent.latency_ms for sent in refused], 0.5),
        "refusal_p99_ms": _percentile([sent.latency_ms for sent in refused], 0.99),
        "refusals_without_retry_after": sum(sent.retry_after_s is None for sent in refused),
        "other_answers": len(others),
        "first_other_answer": others[0].error if others else None,
        "client_cores": load.client_cores,
        "client_late_p99_ms": _percentile([sent.late_ms for sent in load.sent], 0.99),
    }


def summarize_returns(clients: Sequence[Sequence[Sent]]) -> dict[str, Any]:
    """Returns what became of clients that come again as they are told; the attempts of each, in order of arrival."""
    refused = [attempts for attempts in clients if attempts[0].outcome == "refused"]
    served = [attempts for attempts in clients if attempts[-1].outcome == "finished"]
    return {
        "clients": len(clients),
        "refused_at_first": len(refused),
        "never_served": len(clients) - len(served),
        "most_attempts": max(len(attempts) for attempts in clients),
        "served_within_four_tries_share": sum(len(attempts) <= _FEW for attempts in served) / len(clients),
        "refusal_p50_ms": _percentile([attempts[0].latency_ms for attempts in refused], 0.5),
    }


def _measure_alone(client: LoadGenerator, *, steps: int, longest_s: float) -> dict[float, float]:
    lengths_s = [min(seconds, longest_s) for seconds in _ALONE_S]
    return {
        seconds: median(s.latency_ms for s in client.send_alone(_BOUNDED, [_lone(seconds, steps=steps)] * _ALONE_CALLS))
        for seconds in lengths_s
    }


def _lone(duration_s: float, *, steps: int) -> Arrival:
    return Arrival(0.0, "a low drone", duration_s, seed=1, steps=steps)


def _wait_until_normal(
    client: LoadGenerator, lone: Arrival, *, limit_ms: float, since: float, patience_s: float
) -> float:
    """Returns the seconds from `since` until the first of three requests in a row was sent that took no longer than
    `limit_ms`; `patience_s` if there were none by then."""
    normal: list[float] = []
    while time.perf_counter() - since < patience_s:
        sent_at = time.perf_counter()
        (sent,) = client.send_alone(_BOUNDED, [lone])
        is_normal = sent.outcome == "finished" and sent.latency_ms <= limit_ms
        normal = [*normal, sent_at - since] if is_normal else []
        if len(normal) == _NORMAL_IN_A_ROW:
            return max(0.0, normal[0])
    return patience_s


def _percentile(values: Sequence[float], share: float) -> float:
    return percentile(values, share) if values else 0.0


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """What a server still does at three times its capacity."""
    return [
        {
            "side": side,
            "goodput_over_peak": results[side]["worst_goodput_over_peak_ratio"],
            "finished_over_peak": results[side]["worst_finished_over_peak_ratio"],
            "refusal_p50_ms": results[side]["worst_refusal_p50_ms"],
            "refusal_p99_ms": results[side]["worst_refusal_p99_ms"],
            "normal_after_s": results[side]["worst_normal_after_s"],
            "served_within_four_tries": results[side]["worst_served_within_four_tries_share"],
            "other_answers": results[side]["other_answers"],
        }
        for side in _SIDES
        if side in results
    ]
