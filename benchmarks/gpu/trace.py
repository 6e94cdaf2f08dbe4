"""Records the work of a GPU during a call, with torch's profiler.

The record has kernels, copies, launches and waits, and the share of time in which the GPU was busy. On a CPU, only
operators can be recorded.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.engines import ALL, PLAIN, Machine
from benchmarks.gpu.results import Results
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.engine.profile import battery

_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_GRAPHS = ("cudaGraphLaunch", "cuGraphLaunch")
_ASKS = ("cudaLaunchKernel", "cuLaunchKernel", *_GRAPHS)
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
# Parts of the names of attention operators and kernels. The names also show which backend computes the attention.
_ATTENTION = ("scaled_dot_product", "flash", "fmha", "attention", "cudnn_attn", "varlen")
_LENGTHS_S = (5.0, 30.0, 120.0)
_NAME_LENGTH, _MOST_KERNELS = 120, 20


async def measure(machine: Machine, results: Results) -> None:
    """Store the kernels and the attention operators that each model uses with all features, and without any.

    They are recorded for single clips of several lengths with two steps, and for the requests of the start-up check.
    """
    for name in ("small", "medium", "open"):
        model = machine.load(name, decode=None)
        longest_s = min(model.spec.card.max_duration_s, machine.sizes.longest_s)
        shapes = {"battery": battery(model.spec, longest_s=machine.sizes.longest_s)}
        alone = GenerationRequest("rain", 1.0, 0, steps=2, duration_padding_s=0.0)
        lengths_s = [length_s for length_s in _LENGTHS_S if length_s <= longest_s] or [longest_s]
        clips = {f"{length_s:g} s": [replace(alone, duration_s=length_s)] for length_s in lengths_s}
        for features, kind in ((ALL, "accelerated"), (PLAIN, "plain")):
            async with machine.engine(model, features) as engine:
                for what, requests in (shapes | clips).items():
                    await engine.prepare(*requests)  # initialises the kernels, and captures CUDA graphs
                    traced = await trace(machine.device, partial(engine.together, *requests), operators=True)
                    results.record(f"{name}.{kind}.{what}", traced)
            del engine


async def trace(
    device: torch.device, run: Callable[[], Awaitable[object]], *, operators: bool = False
) -> dict[str, Any]:
    """Call `run` and return figures of the device work that all threads launch during the call.

    If `operators` is true, torch's operators are recorded, too, which slows the host down. No thread may run one when
    the call ends, because torch may then crash.
    """
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] * is_cuda + [ProfilerActivity.CPU] * operators
    if not activities:
        await run()
        return summarize_trace([])
    profiler = profile(activities=activities, experimental_config=_ExperimentalConfig(profile_all_threads=True))
    profiler.start()
    try:
        await run()
        if is_cuda:
            torch.cuda.synchronize(device)
    finally:
        profiler.stop()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return summarize_trace(json.loads(path.read_text())["traceEvents"])


def summarize_trace(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Returns figures of a Chrome trace.

    A CUDA graph counts once in `host_launches`. In `kernels`, each of its kernels counts. `host_gap_ms` is the median
    time in which the device is idle between two CUDA graphs, because the host has not queued the second one yet. Pauses
    between the kernels of one graph do not count. It is None if there are fewer than two CUDA graphs.
    """
    whole = [event for event in events if event.get("ph") == "X"]
    work = sorted((event for event in whole if event.get("cat") in _DEVICE_WORK), key=lambda event: event["ts"])
    host = [event["name"] for event in whole if event.get("cat") in {"cuda_runtime", "cuda_driver"}]
    named = Counter(event["name"][:_NAME_LENGTH] for event in whole if event.get("cat") in {"cpu_op", "kernel"})
    graphs = {_call_of(event) for event in whole if event["name"].startswith(_GRAPHS)} - {None}
    busy_us, reached_us = 0.0, float("-inf")
    started: set[object] = set()
    idle_us, gaps_us = 0.0, []
    taken_us: Counter[str] = Counter()
    for event in work:
        ended_us = event["ts"] + event.get("dur", 0.0)
        idle_us += max(0.0, event["ts"] - reached_us) if busy_us else 0.0
        if (call := _call_of(event)) in graphs:
            if call not in started and started:
                gaps_us.append(idle_us)
            started.add(call)
            idle_us = 0.0
        busy_us += max(0.0, ended_us - max(event["ts"], reached_us))
        reached_us = max(reached_us, ended_us)
        taken_us[event["name"][:_NAME_LENGTH]] += event.get("dur", 0.0)
    span_us = reached_us - work[0]["ts"] if work else 0.0
    return {
        "span_ms": span_us / 1000.0,
        "busy_share": busy_us / span_us if span_us else None,
        "idle_ms": (span_us - busy_us) / 1000.0,
        "host_gap_ms": median(gaps_us) / 1000.0 if gaps_us else None,
        "kernels": sum(event["cat"] == "kernel" for event in work),
        "host_launches": sum(name.startswith(_ASKS) for name in host),
        "waits": sum(name.startswith(_WAITS) and "Async" not in name for name in host),
        "attention": {name: count for name, count in named.items() if any(part in name.lower() for part in _ATTENTION)},
        "copies_to_device": sum(event["cat"] == "gpu_memcpy" and "HtoD" in event["name"] for event in work),
        "top_kernels": [
            {"name": name, "total_ms": us / 1000.0, "share": us / max(1.0, taken_us.total())}
            for name, us in taken_us.most_common(_MOST_KERNELS)
        ],
    }


def _call_of(event: dict[str, Any]) -> object:
    """Returns the number of the host's call that queued this work, None if unknown. A graph's kernels share it."""
    return event.get("args", {}).get("correlation")
