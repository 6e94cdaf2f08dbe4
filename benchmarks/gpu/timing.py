"""Times and memory of a device: what waits for it and what reads it. Knows no model."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from statistics import median

import torch

from benchmarks.gpu.subjects import Sizes


def synchronize(device: torch.device) -> None:
    """Wait for queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(run: Callable[[], object], *, device: torch.device, sizes: Sizes) -> float:
    """Returns the median milliseconds of a call from an idle device to an idle device, after one that does not
    count."""
    run()
    return median(_times_ms(run, device=device, sizes=sizes))


def _times_ms(run: Callable[[], object], *, device: torch.device, sizes: Sizes) -> list[float]:
    taken_ms: list[float] = []
    while len(taken_ms) < sizes.least_repeats or (
        len(taken_ms) < sizes.repeats and sum(taken_ms) < 1000.0 * sizes.repeat_s
    ):
        synchronize(device)
        started_at = time.perf_counter()
        run()
        synchronize(device)
        taken_ms.append((time.perf_counter() - started_at) * 1000.0)
    return taken_ms


def alternating_ms(
    first: Callable[[], object], second: Callable[[], object], *, device: torch.device, sizes: Sizes
) -> tuple[float, float]:
    """Returns the median milliseconds of each of two calls that take turns."""
    taken_ms: tuple[list[float], list[float]] = [], []
    first(), second()
    while len(taken_ms[0]) < sizes.least_repeats or (
        len(taken_ms[0]) < sizes.repeats and sum(map(sum, taken_ms)) < 2000.0 * sizes.repeat_s
    ):
        for run, own in zip((first, second), taken_ms, strict=True):
            synchronize(device)
            started_at = time.perf_counter()
            run()
            synchronize(device)
            own.append((time.perf_counter() - started_at) * 1000.0)
    return median(taken_ms[0]), median(taken_ms[1])


def forget_peak(device: torch.device) -> None:
    """Let the peak begin at what is held now; a CPU process cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Returns the most memory that tensors held since `forget_peak`; on a CPU the process's peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reserved_bytes(device: torch.device) -> int:
    """Returns what the allocator has taken from the device; on a CPU the process's peak."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else peak_bytes(device)


def held_bytes(device: torch.device) -> int:
    """Returns the memory that tensors hold now; on a CPU the process's peak."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else peak_bytes(device)
