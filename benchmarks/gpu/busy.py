"""Part 2 of the GPU benchmarks: a busy engine. Measures steps per second, idle time and kernels of the device, the
speed of equal clips that arrive together relative to the ideal speed, and the engine's memory and its growth.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from itertools import count
from typing import Any

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.published import CLIPS, FLOPS, ClipRow
from benchmarks.gpu.trace import trace
from benchmarks.load import send_in_flight
from benchmarks.pieces import Pieces

_GROWING, _FULL = "small 5 s", "small 30 s"
_BY_NAME = {row.name: row for row in CLIPS}
_IN_FLIGHT = 8


async def measure(bench: Bench, pieces: Pieces) -> dict[str, Any]:
    """Returns the figures for the goals P9, P10 and P11, by clip."""
    profiles, crowds = {}, {}
    for row in bench.clips:
        if row.crowd_share is not None:
            profiles[row.name] = await pieces.attempt(f"profile {row.name}", partial(_profile, bench, row))
            crowds[row.name] = await pieces.attempt(f"crowd {row.name}", partial(_measure_crowd, bench, row))
    full = await pieces.attempt("memory full", partial(_measure_full, bench, _BY_NAME[_FULL]))
    growth = await pieces.attempt("memory growth", partial(_measure_growth, bench, _BY_NAME[_GROWING]))

    def figures(measured: Mapping[str, Any], key: str) -> dict[str, Any]:
        return {name: values[key] for name, values in measured.items() if values}

    return {
        **{key: figures(profiles, key) for key in ("steps_per_s", "gpu_busy_share", "idle_ms_per_step")},
        "roofline_share_crowd": figures(crowds, "roofline_share"),
        "memory_full_over_predicted_ratio": full and full["over_predicted_ratio"],
        "memory_growth_share": growth and growth["growth_share"],
        "profiles": profiles,
        "memory": {"full": full, "growth": growth},
    }


async def _profile(bench: Bench, row: ClipRow) -> dict[str, Any]:
    """Keep many requests in flight, trace the device for a while, and return figures from the trace."""
    side, seeds = await bench.side(row.model, "ours"), count()

    async def repeat() -> None:
        while True:
            await side.generate(await bench.clip(row, seed=next(seeds)))

    async def wait(seconds: float) -> None:
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # raises an error of a request

    tasks = [asyncio.create_task(repeat()) for _ in range(bench.sizes.active)]
    try:
        await wait(bench.sizes.busy_before_s)
        steps, misses = side.captures.num_steps, side.captures.num_misses
        traced = await trace(bench.device, lambda: wait(bench.sizes.traced_s))
        steps, misses = side.captures.num_steps - steps, side.captures.num_misses - misses
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return {
        "in_flight": bench.sizes.active,
        "steps": steps,
        "steps_per_s": steps / bench.sizes.traced_s,
        "gpu_busy_share": traced["busy_share"],
        "idle_ms_per_step": traced["idle_ms"] / max(1, steps),
        "kernels_per_step": traced["kernels"] / max(1, steps),
        "host_launches_per_step": traced["host_launches"] / max(1, steps),
        "captured": side.captures.num_captured,
        "misses_meanwhile": misses,
        "trace": traced,
    }


async def _measure_crowd(bench: Bench, row: ClipRow) -> dict[str, Any]:
    """Measure the rate of clips that are requested together, absolute and as a share of the ideal rate."""
    side = await bench.side(row.model, "ours")
    requests = [await bench.clip(row, seed=seed) for seed in range(bench.sizes.crowd)]
    (taken_ms,) = await bench.times_ms(lambda: asyncio.gather(*map(side.generate, requests)))
    rate_hz = 1000.0 * len(requests) / taken_ms
    ideal_s = row.clip_tflop * 1e12 / FLOPS
    return {"clips": len(requests), "requests_per_s": rate_hz, "roofline_share": ideal_s * rate_hz}


async def _measure_full(bench: Bench, row: ClipRow) -> dict[str, Any]:
    """Compare the engine's peak memory with many rows in flight with a linear extrapolation from few rows."""
    side, (few, more), full = await bench.side(row.model, "ours"), bench.sizes.few_rows, bench.sizes.full_rows
    peaks: dict[int, int] = {}
    for rows in (few, more, full):
        bench.forget_peak()
        await asyncio.gather(*[side.generate(await bench.clip(row, seed=seed)) for seed in range(rows)])
        peaks[rows] = bench.peak_bytes()
    predicted = peaks[few] + max(0.0, (peaks[more] - peaks[few]) / (more - few)) * (full - few)
    return {
        "clip": row.name,
        "peak_gb_by_rows": {str(rows): value / 1e9 for rows, value in peaks.items()},
        "predicted_gb": predicted / 1e9,
        "over_predicted_ratio": peaks[full] / predicted,
    }


async def _measure_growth(bench: Bench, row: ClipRow) -> dict[str, Any]:
    """Measure how much the engine's memory grows between a first part and all of many requests.

    Memory is read while no request is in flight.
    """
    side, (settled, all_of_them) = await bench.side(row.model, "ours"), bench.sizes.requests
    held: list[int] = []
    for seeds in (range(settled), range(settled, all_of_them)):
        requests = [await bench.clip(row, seed=seed) for seed in seeds]
        await send_in_flight(side.generate, requests, num_in_flight=_IN_FLIGHT)
        held.append(bench.held_bytes())
    return {
        "requests": [settled, all_of_them],
        "held_gb": [n / 1e9 for n in held],
        "growth_share": held[1] / held[0] - 1,
    }
