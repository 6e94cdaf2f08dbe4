"""Part 1 of the GPU benchmarks: one clip on an idle device. Compares the model alone with and without CUDA graphs, the
engine, and the published times with TensorRT. Also measures memory, and the kernel launches of one clip.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.published import ClipRow
from benchmarks.gpu.trace import trace
from benchmarks.pieces import Pieces

_GRAPHS_GB = 2.0  # allowed peak memory for CUDA graphs, added to 1.1 times the published peak


async def measure(bench: Bench, pieces: Pieces) -> dict[str, Any]:
    """Returns the figures for the goals P7, P8, P9 and P11, by clip."""
    attempts = {row: await pieces.attempt(row.name, partial(_measure_clip, bench, row)) for row in bench.clips}
    clips = {row: clip for row, clip in attempts.items() if clip}
    return {
        "lone_engine_over_allowed_worst_ratio": max(
            (clip["engine_ms"] / max(1.03 * clip["pipeline_ms"], clip["pipeline_ms"] + 1.0) for clip in clips.values()),
            default=None,
        ),
        "lone_pipeline_over_tensorrt_ratio": {
            row.name: clip["pipeline_ms"] / row.tensorrt_ms for row, clip in clips.items() if row.tensorrt_ms
        },
        "roofline_share_alone": {row.name: row.ideal_ms / clip["pipeline_ms"] for row, clip in clips.items()},
        "eager_over_captured_ratio": {row.name: clip["eager_ms"] / clip["pipeline_ms"] for row, clip in clips.items()},
        "memory_peak_over_allowed_gb": {
            row.name: clip["peak_gb"] - (row.peak_gb * 1.1 + _GRAPHS_GB) for row, clip in clips.items() if row.peak_gb
        },
        "clips": {row.name: clip for row, clip in clips.items()},
    }


async def _measure_clip(bench: Bench, row: ClipRow) -> dict[str, Any]:
    await bench.drop()  # otherwise other sides would add to the peak memory
    request, lock = await bench.clip(row), await bench.side(row.model, "lock")
    await bench.times_ms(lambda: lock.generate(request))
    bench.forget_peak()
    await lock.generate(request)
    peak_bytes = bench.peak_bytes()
    eager, ours = await bench.side(row.model, "eager-lock"), await bench.side(row.model, "ours")
    pipeline_ms, eager_ms, engine_ms = await bench.times_ms(
        lambda: lock.generate(request), lambda: eager.generate(request), lambda: ours.generate(request)
    )
    timings = (await lock.generate(request)).timings
    assert timings is not None
    return {
        "duration_s": request.duration_s,
        "steps": request.steps,
        "pipeline_ms": pipeline_ms,
        "eager_ms": eager_ms,
        "engine_ms": engine_ms,
        "text_ms": timings.text_ms,
        "denoise_ms": timings.denoise_ms,
        "decode_ms": timings.decode_ms,
        "steps_per_s": 1000.0 * (request.steps or 0) / timings.denoise_ms,
        "ideal_ms": row.ideal_ms,
        "peak_gb": peak_bytes / 1e9,
        "captured": ours.captures.num_captured,
        "trace": {
            "captured": await trace(bench.device, lambda: ours.generate(request)),
            "eager": await trace(bench.device, lambda: eager.generate(request)),
        },
    }
