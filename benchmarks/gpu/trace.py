"""Records a GPU's work with torch's profiler: kernels, copies, launches, waits, and the share of time in which the GPU
was busy. On a CPU nothing is recorded.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_ASKS = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cuGraphLaunch")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
_NAME_LENGTH, _MOST_KERNELS = 120, 20


async def trace(device: torch.device, run: Callable[[], Awaitable[object]]) -> dict[str, Any]:
    """Call `run` and return figures of the device work that all threads launched during the call."""
    is_cuda = device.type == "cuda"
    profiler = profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU])
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
    """Returns figures of a Chrome trace. `host_launches` counts a CUDA graph once; `kernels` counts its kernels."""
    whole = [event for event in events if event.get("ph") == "X"]
    work = sorted((event for event in whole if event.get("cat") in _DEVICE_WORK), key=lambda event: event["ts"])
    host = [event["name"] for event in whole if event.get("cat") in {"cuda_runtime", "cuda_driver"}]
    busy_us, reached_us = 0.0, float("-inf")
    taken_us: Counter[str] = Counter()
    for event in work:
        ended_us = event["ts"] + event.get("dur", 0.0)
        busy_us += max(0.0, ended_us - max(event["ts"], reached_us))
        reached_us = max(reached_us, ended_us)
        taken_us[event["name"][:_NAME_LENGTH]] += event.get("dur", 0.0)
    span_us = reached_us - work[0]["ts"] if work else 0.0
    return {
        "span_ms": span_us / 1000.0,
        "busy_share": busy_us / span_us if span_us else None,
        "idle_ms": (span_us - busy_us) / 1000.0,
        "kernels": sum(event["cat"] == "kernel" for event in work),
        "host_launches": sum(name.startswith(_ASKS) for name in host),
        "waits": sum(name.startswith(_WAITS) and "Async" not in name for name in host),
        "copies_to_device": sum(event["cat"] == "gpu_memcpy" and "HtoD" in event["name"] for event in work),
        "top_kernels": [
            {"name": name, "total_ms": us / 1000.0, "share": us / max(1.0, taken_us.total())}
            for name, us in taken_us.most_common(_MOST_KERNELS)
        ],
    }
