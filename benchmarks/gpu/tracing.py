"""What a device did: kernels, copies and waits from torch's profiler, and the gaps between the steps of an engine.

`StepWatch` is called on the thread that uses the device. On a CPU the outermost operators stand in for kernels.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_ASKS = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cuGraphLaunch")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
_BACKENDS = {
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_efficient_attention": "memory efficient",
    "_scaled_dot_product_cudnn_attention": "cudnn",
    "_scaled_dot_product_attention_math": "math",
}
_NAME_LENGTH = 120


class Span(NamedTuple):
    """One piece of device work, times in microseconds."""

    name: str
    kind: str
    began_us: float
    ended_us: float


@dataclass(frozen=True, slots=True)
class Trace:
    """Device work in order of its beginning, and counts of host calls and operators by name."""

    spans: Sequence[Span]
    host_calls: Counter[str]
    operators: Counter[str]

    @property
    def launches(self) -> int:
        """Kernels, or operators on a CPU."""
        return sum(span.kind == self.counted for span in self.spans)

    @property
    def counted(self) -> str:
        """What launches are: kernel, or operator where no work of a device was seen."""
        return "kernel" if any(span.kind in _DEVICE_WORK for span in self.spans) else "operator"

    @property
    def host_launches(self) -> int:
        """Times the host asked the device for work; a captured step takes one."""
        return sum(count for name, count in self.host_calls.items() if name.startswith(_ASKS))

    @property
    def waits(self) -> int:
        """Times the host waited for the device."""
        return sum(count for name, count in self.host_calls.items() if name.startswith(_WAITS) and "Async" not in name)

    @property
    def copies_to_device(self) -> int:
        """Copies from the host."""
        return sum(span.kind == "gpu_memcpy" and "HtoD" in span.name for span in self.spans)

    @property
    def busy_us(self) -> float:
        """Time with anything running."""
        busy_us, reached_us = 0.0, float("-inf")
        for span in self.spans:
            busy_us += max(0.0, span.ended_us - max(span.began_us, reached_us))
            reached_us = max(reached_us, span.ended_us)
        return busy_us

    @property
    def span_us(self) -> float:
        """Time from the first beginning to the last end."""
        return max((span.ended_us for span in self.spans), default=0.0) - self.spans[0].began_us if self.spans else 0.0

    @property
    def attention(self) -> dict[str, int]:
        """Calls by the kind of kernel that attention took; empty unless operators were traced."""
        found: Counter[str] = Counter()
        for name, count in self.operators.items():
            for operator, backend in _BACKENDS.items():
                if name.removeprefix("aten::").startswith(operator):
                    found[backend] += count
        return dict(found)


class Tracer:
    """Records between `start` and `stop`, both on the thread that uses the device."""

    def __init__(self, device: torch.device, *, operators: bool) -> None:
        """`operators` records those of the host too, which slows it down; on a CPU they are the device's work."""
        on_cuda = device.type == "cuda"
        activities = [ProfilerActivity.CUDA] if on_cuda else []
        if operators or not on_cuda:
            activities.append(ProfilerActivity.CPU)
        self._device = device
        self._profile = profile(activities=activities)

    def start(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # nothing of before belongs into the trace
        self._profile.start()

    def stop(self) -> Trace:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            return read_trace(json.loads(path.read_text())["traceEvents"])


def prepare(device: torch.device) -> None:
    """Load the profiler; the first time must be on the process's main thread."""
    tracer = Tracer(device, operators=False)
    tracer.start()
    tracer.stop()


def read_trace(events: Iterable[dict[str, Any]]) -> Trace:
    """From the events of a Chrome trace. Without any device work, the outermost operators are taken for it."""
    whole = [event for event in events if event.get("ph") == "X"]
    spans = [_span(event, event["cat"]) for event in whole if event.get("cat") in _DEVICE_WORK]
    operators = [event for event in whole if event.get("cat") == "cpu_op"]
    host = Counter(event["name"] for event in whole if event.get("cat") in {"cuda_runtime", "cuda_driver"})
    if not spans:
        spans = _outermost(operators)
    spans.sort(key=lambda span: span.began_us)
    return Trace(spans, host, Counter(event["name"] for event in operators))


def _span(event: dict[str, Any], kind: str) -> Span:
    began_us = float(event["ts"])
    return Span(event["name"][:_NAME_LENGTH], kind, began_us, began_us + float(event.get("dur", 0.0)))


def _outermost(events: Sequence[dict[str, Any]]) -> list[Span]:
    found: list[Span] = []
    for event in sorted(events, key=lambda event: (event["ts"], -event.get("dur", 0.0))):
        span = _span(event, "operator")
        if not found or span.began_us >= found[-1].ended_us:
            found.append(span)
    return found


def top_kernels(traces: Sequence[Trace], *, most: int = 20) -> list[dict[str, Any]]:
    """Returns the kernels with the most time: name, calls, milliseconds, share of all."""
    taken_us: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for trace in traces:
        for span in trace.spans:
            taken_us[span.name] += span.ended_us - span.began_us  # type: ignore[assignment]  # a sum, not a count
            calls[span.name] += 1
    total_us = sum(taken_us.values()) or 1.0
    return [
        {"name": name, "calls": calls[name], "total_ms": us / 1000.0, "share": us / total_us}
        for name, us in taken_us.most_common(most)
    ]


class _Step(NamedTuple):
    began: Any  # a CUDA event or a host time in milliseconds
    ended: Any
    follows_step: bool  # nothing else of the model ran since the step before


@dataclass(slots=True)
class Seen:
    """What was asked for while a watch looked away."""

    has_step: bool = False


class StepWatch:
    """Watches the denoiser calls of a running engine once it is `armed`: the first `skip` pass, of the next `steps` the
    gaps are taken, of as many after those the kernels, `per_trace` at a time. `finished` is set in the end."""

    def __init__(self, device: torch.device, *, skip: int, steps: int, per_trace: int, operators: bool = False) -> None:
        self._device = device
        self._skip = skip
        self._num_steps = steps
        self._per_trace = per_trace
        self._operators = operators
        self._seen = 0
        self._traced = 0
        self._steps: list[_Step] = []
        self._began: Any = None
        self._follows = False
        self._tracer: Tracer | None = None
        self._unwatched: Seen | None = None
        self.traces: list[Trace] = []
        self.steps_in_traces: list[int] = []
        self.armed = threading.Event()
        self.finished = threading.Event()

    @contextmanager
    def looking_away(self) -> Iterator[Seen]:
        """Within it calls are not counted, only seen: they are captured, or part of what was. Gives what was seen."""
        self._unwatched = Seen()
        try:
            yield self._unwatched
        finally:
            self._unwatched = None

    def step_begins(self) -> None:
        """Before a denoiser call, or a captured step."""
        if self._unwatched is not None:
            self._unwatched.has_step = True
            return
        if not self.armed.is_set():
            return
        self._seen += 1
        timed_until = self._skip + self._num_steps
        if self._skip < self._seen <= timed_until:
            self._began = self._now()
        elif self._seen > timed_until and not self.finished.is_set():
            self._turn_trace()

    def step_ends(self) -> None:
        """After it; the device may still run."""
        if self._unwatched is not None:
            return
        if self._began is not None:
            self._steps.append(_Step(self._began, self._now(), self._follows))
            self._began = None
        self._follows = True

    def something_else(self) -> None:
        """Before any other call of the model."""
        self._follows = False

    def gaps_ms(self) -> list[float]:
        """Returns the time on the device from the end of a step to the beginning of the next, with guidance and update
        unless they were captured too, where nothing else of the model was between. Only after `finished`."""
        pairs = zip(self._steps, self._steps[1:], strict=False)
        return [_elapsed_ms(before.ended, step.began) for before, step in pairs if step.follows_step]

    def step_ms(self) -> float:
        """Returns the median time of a denoiser call on the device. Only after `finished`."""
        return median(_elapsed_ms(step.began, step.ended) for step in self._steps)

    def _turn_trace(self) -> None:
        if self._tracer is None:
            self._tracer, self._traced = Tracer(self._device, operators=self._operators), 0
            self._tracer.start()
        elif self._traced == self._per_trace:
            self.traces.append(self._tracer.stop())
            self.steps_in_traces.append(self._traced)
            self._tracer = None
            if sum(self.steps_in_traces) >= self._num_steps:
                self.finished.set()
            else:
                self._turn_trace()
        self._traced += 1

    def _now(self) -> Any:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            return event
        return time.perf_counter() * 1000.0


def _elapsed_ms(earlier: Any, later: Any) -> float:
    if isinstance(earlier, float):
        return float(later - earlier)
    later.synchronize()
    return float(earlier.elapsed_time(later))
