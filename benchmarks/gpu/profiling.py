"""Part 2: what a busy engine's device does over 200 steps, how near its speed comes to the ideal, and memory."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from statistics import median
from typing import Any

from benchmarks.client import send_in_flight, send_together
from benchmarks.gpu.published import CLIPS, ClipRow
from benchmarks.gpu.record import Done, Measurement
from benchmarks.gpu.subjects import Bench, make_clip
from benchmarks.gpu.timing import forget_peak, held_bytes, median_ms, peak_bytes, reserved_bytes
from benchmarks.gpu.tracing import StepWatch, top_kernels
from benchmarks.gpu.watched import WatchedModel, watch_device
from benchmarks.metrics import throughput_rps
from benchmarks.sides.captures import Captures
from stable_audio_serve.engine import Engine

_BY_NAME = {row.name: row for row in CLIPS}
_PROFILED = ("small 30 s", "medium 30 s", "open 47 s")
_GROWING = "small 5 s"
_FULL = "small 30 s"
_IN_FLIGHT = 8
_SKIPPED_STEPS = 20
_MOST_WAIT_S = 240.0
_GRAPHS_GB = 2.0  # allowed beyond the published peak


def measurements(bench: Bench, done: Done) -> list[Measurement]:
    """Model by model: profile, speed over the ideal, peaks; then growth and a full engine."""
    found: list[Measurement] = []
    for model in bench.sizes.models:
        rows = [row for row in bench.clips if row.model == model]
        profiled = [row for row in rows if row.name in _PROFILED]
        found += [Measurement(f"profile {row.name}", partial(_profile, bench, row), about_s=45.0) for row in profiled]
        found += [
            Measurement(f"alone {row.name}", partial(_measure_alone, bench, row), about_s=10 + row.ideal_ms / 20)
            for row in rows
            if row.alone_share or row.peak_gb
        ]
        found += [
            Measurement(f"crowd {row.name}", partial(_measure_crowd, bench, row), about_s=10 + row.ideal_ms / 8)
            for row in rows
            if row.crowd_share
        ]
        if model == _BY_NAME[_FULL].model:
            found.append(Measurement("memory full", partial(_measure_full, bench), about_s=30.0))
            found.append(Measurement("memory growth", partial(_measure_growth, bench), about_s=90.0))
    return found


def summarize(done: Done) -> dict[str, Any]:
    """P9, P10 and P11; None where nothing was measured."""
    profiles = {name: done[f"profile {name}"] for name in _PROFILED if f"profile {name}" in done}
    peaks = {
        row.name: done[f"alone {row.name}"]["peak_gb"] - (row.peak_gb * 1.1 + _GRAPHS_GB)
        for row in CLIPS
        if row.peak_gb and f"alone {row.name}" in done
    }
    return {
        "gpu_busy_share": {name: values["gpu_busy_share"] for name, values in profiles.items()},
        "host_gap_between_steps_ms": {name: values["host_gap_between_steps_ms"] for name, values in profiles.items()},
        "roofline_share_alone": _shares(done, "alone"),
        "roofline_share_crowd": _shares(done, "crowd"),
        "memory_peak_over_allowed_gb": peaks,
        "memory_full_over_predicted_ratio": done.get("memory full", {}).get("over_predicted_ratio"),
        "memory_growth_share": done.get("memory growth", {}).get("growth_share"),
    }


def _shares(done: Done, kind: str) -> dict[str, float]:
    names = {row.name: f"{kind} {row.name}" for row in CLIPS}
    return {name: done[key]["roofline_share"] for name, key in names.items() if key in done}


def _profile(bench: Bench, row: ClipRow) -> dict[str, Any]:
    """An engine that always has work; raises RuntimeError if it does not come to its steps in time."""
    sizes = bench.sizes
    skip = min(_SKIPPED_STEPS, sizes.profiled_steps)
    watch = StepWatch(bench.device, skip=skip, steps=sizes.profiled_steps, per_trace=sizes.steps_per_trace)
    model = WatchedModel(bench.model(row.model), watch)  # built before the event loop runs
    captures = Captures()
    misses = bench.run(_keep_busy(bench, row, model=model, watch=watch, captures=captures))
    gaps_ms = watch.gaps_ms()
    busy_us, span_us = (sum(trace.busy_us for trace in watch.traces), sum(trace.span_us for trace in watch.traces))
    steps = sum(watch.steps_in_traces)
    return {
        "in_flight": sizes.active,
        "steps": steps,
        "gpu_busy_share": busy_us / span_us if span_us else None,
        "host_gap_between_steps_ms": median(gaps_ms) if gaps_ms else None,
        "gaps": len(gaps_ms),
        "step_ms": watch.step_ms(),
        "captured": captures.num_captured,
        "misses_meanwhile": misses,
        "kernels_per_step": sum(trace.launches for trace in watch.traces) / steps,
        "host_launches_per_step": sum(trace.host_launches for trace in watch.traces) / steps,
        "waits_per_step": sum(trace.waits for trace in watch.traces) / steps,
        "copies_to_device_per_step": sum(trace.copies_to_device for trace in watch.traces) / steps,
        "top_kernels": top_kernels(watch.traces),
    }


async def _keep_busy(bench: Bench, row: ClipRow, *, model: WatchedModel, watch: StepWatch, captures: Captures) -> int:
    """Returns how many steps were not captured while the watch was on."""
    seeds = count()
    device = watch_device(model, watch)
    async with Engine(model, bench.options, device=device, metrics=captures) as engine:

        async def repeat() -> None:
            while True:
                await engine.generate(make_clip(bench, row, seed=next(seeds)))

        tasks = [asyncio.create_task(repeat()) for _ in range(bench.sizes.active)]
        try:
            ends_at = time.monotonic() + bench.sizes.busy_before_s
            await _wait(tasks, until=lambda: time.monotonic() >= ends_at)
            misses = captures.num_misses
            watch.armed.set()
            await _wait(tasks, until=watch.finished.is_set)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return captures.num_misses - misses


async def _wait(tasks: Sequence[asyncio.Task[None]], *, until: Callable[[], bool]) -> None:
    """Raises what a task raises, and TimeoutError."""
    async with asyncio.timeout(_MOST_WAIT_S):
        while not until():
            ended, _ = await asyncio.wait(tasks, timeout=0.02, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()


def _measure_alone(bench: Bench, row: ClipRow) -> dict[str, Any]:
    """One clip by itself, and the most memory that it needs."""
    side = bench.side(row.model, "lock")
    request = make_clip(bench, row)
    for _ in range(bench.sizes.clips_before):
        bench.run(side.generate(request))
    bench.settle()
    forget_peak(bench.device)
    taken_ms = median_ms(lambda: bench.run(side.generate(request)), device=bench.device, sizes=bench.sizes)
    return {
        "clip_ms": taken_ms,
        "ideal_ms": row.ideal_ms,
        "roofline_share": row.ideal_ms / taken_ms,
        "peak_gb": peak_bytes(bench.device) / 1e9,
        "published_peak_gb": row.peak_gb,
    }


def _measure_crowd(bench: Bench, row: ClipRow) -> dict[str, Any]:
    """Clips that come together, in the engine: each is ideal work for the whole time over their number."""
    side = bench.side(row.model, "ours")
    requests = [make_clip(bench, row, seed=seed) for seed in range(bench.sizes.crowd)]
    for _ in range(bench.sizes.clips_before):
        bench.run(send_together(side.generate, requests))
    bench.settle()
    _, finished = bench.run(send_together(side.generate, requests))
    rate_rps = throughput_rps(finished)
    ideal_ms = row.clip_tflop / 790.0 * 1000.0
    return {
        "clips": len(requests),
        "requests_per_s": rate_rps,
        "ideal_ms": ideal_ms,
        "roofline_share": ideal_ms * rate_rps / 1000.0,
    }


def _measure_full(bench: Bench) -> dict[str, Any]:
    """The peak of a full engine over that which a line through those of few rows predicts for it."""
    row = _BY_NAME[_FULL]
    side = bench.side(row.model, "ours")
    peaks: dict[int, int] = {}
    for rows in (*bench.sizes.few_rows, bench.sizes.full_rows):
        gc.collect()
        forget_peak(bench.device)
        bench.run(send_together(side.generate, [make_clip(bench, row, seed=seed) for seed in range(rows)]))
        peaks[rows] = peak_bytes(bench.device)
    few, more = bench.sizes.few_rows
    per_row = max(0.0, (peaks[more] - peaks[few]) / (more - few))
    predicted = peaks[few] + per_row * (bench.sizes.full_rows - few)
    return {
        "clip": row.name,
        "peak_gb_by_rows": {str(rows): value / 1e9 for rows, value in peaks.items()},
        "predicted_gb": predicted / 1e9,
        "predicted_by": f"a line through {few} and {more} rows",
        "over_predicted_ratio": peaks[bench.sizes.full_rows] / predicted,
    }


def _measure_growth(bench: Bench) -> dict[str, Any]:
    """Memory after many requests over that after some, none in flight."""
    row, sizes = _BY_NAME[_GROWING], bench.sizes
    side = bench.side(row.model, "ours")
    held: list[int] = []
    reserved: list[int] = []
    for start, stop in ((0, sizes.settled_requests), (sizes.settled_requests, sizes.requests)):
        requests = [make_clip(bench, row, seed=seed) for seed in range(start, stop)]
        bench.run(send_in_flight(side.generate, requests, num_in_flight=_IN_FLIGHT))
        gc.collect()
        held.append(held_bytes(bench.device))
        reserved.append(reserved_bytes(bench.device))
    return {
        "requests": [sizes.settled_requests, sizes.requests],
        "held_gb": [value / 1e9 for value in held],
        "reserved_gb": [value / 1e9 for value in reserved],
        "growth_share": held[1] / held[0] - 1.0,
        "reserved_growth_share": reserved[1] / reserved[0] - 1.0,
    }
