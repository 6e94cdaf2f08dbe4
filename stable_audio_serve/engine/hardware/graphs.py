"""Captures model calls as CUDA graphs, one per call shape. A graph saves time because the host starts it with a single
launch. A call whose shape has no graph runs eagerly and is counted. Shapes that occur often are captured later, one at
a time, so that no request waits long. The time and the memory of captures are limited.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from stable_audio_serve.core.clock import Clock
from stable_audio_serve.core.metrics import Metrics
from stable_audio_serve.engine.hardware.device import Device, DeviceLostError, Moment

log = logging.getLogger(__name__)

_SHARE = 0.1  # while requests wait, captures take at most this fraction of the time
# The difference between a replayed and an eager call must be at least this far below the level of the eager results.
AGREEMENT_DB = 50.0


def difference_db(actual: Tensor, expected: Tensor) -> float:
    """Return the level of `actual - expected` relative to the level of `expected`, in dB.

    Equal bits give -inf, also if they are NaN. Unequal bits give inf if a value is NaN or infinite, or if `expected` is
    all zeros. Waits for the device.
    """
    if torch.equal(actual.view(torch.int32), expected.view(torch.int32)):
        return -math.inf
    error, level = (float(x.double().square().sum()) for x in (actual - expected, expected))
    if not math.isfinite(error) or level == 0.0:
        return math.inf
    return 10.0 * math.log10(error / level) if error else -math.inf


Kind = Literal["denoise", "decode"]

MOST_GRAPHS = 192
_MISSES_TO_CAPTURE = 2  # capture a shape when it has occurred twice, because many shapes occur only once


class Shape(Protocol):
    """Everything that is fixed in the CUDA graph of a call, as a hashable value."""

    @property
    def kind(self) -> Kind: ...

    @property
    def size(self) -> int:
        """The number of latent frames or tokens of the call, padding included. A larger size takes longer."""
        ...

    @property
    def num_inputs(self) -> int:
        """The number of float32 values that the call reads from its input memory."""
        ...

    @property
    def num_outputs(self) -> int:
        """The number of float32 values that the call writes to its output memory."""
        ...


@dataclass(frozen=True, slots=True)
class CallMemory:
    """The tensors from which a CUDA graph reads its inputs and to which it writes its outputs. All graphs of a kind use
    the same memory, because they never run at the same time.
    """

    inputs: Tensor
    outputs: Tensor


class CaptureRoom:
    """Limits the memory of CUDA graphs. Used by one thread.

    All graphs of a kind share one memory pool, which is as large as the largest call needs. In addition, each graph
    takes some memory of the driver.
    """

    def __init__(self, device: Device, *, max_bytes: int | None) -> None:
        """If `max_bytes` is None, there is no limit, and memory is not counted."""
        self._device = device
        self._max_bytes = max_bytes
        self._largest: dict[Kind, int] = {}
        self._call_bytes: dict[Kind, float] = {}
        self._too_large: dict[Kind, int] = {}
        self.num_bytes = 0

    def expect(self, kind: Kind, *, call_bytes: float) -> None:
        """Set how many bytes the temporary tensors of a kind of calls take per latent frame or token."""
        self._call_bytes[kind] = call_bytes

    def has_room(self, shape: Shape) -> bool:
        """Whether a graph of this shape is expected to fit. The pool grows only if the call is the largest so far, and
        only by the difference.
        """
        if shape.size >= self._too_large.get(shape.kind, math.inf):
            return False
        if self._max_bytes is None:
            return True
        longer = max(0, shape.size - self._largest.get(shape.kind, 0))
        return self.num_bytes + longer * self._call_bytes.get(shape.kind, 0.0) < self._max_bytes

    def refuse(self, shape: Shape) -> None:
        """Remember that the device's memory did not suffice for a graph of this shape, so larger ones do not fit."""
        self._too_large[shape.kind] = min(shape.size, self._too_large.get(shape.kind, shape.size))

    @contextmanager
    def counted(self, shape: Shape) -> Iterator[None]:
        """Count the memory that a capture within this context takes, even if the capture fails."""
        before = self._used()
        try:
            yield
        finally:
            self.num_bytes += max(0, self._used() - before)
            self._largest[shape.kind] = max(shape.size, self._largest.get(shape.kind, 0))

    def _used(self) -> int:
        memory = None if self._max_bytes is None else self._device.memory()
        return 0 if memory is None else memory.used


# `run(shape, memory)` queues the device work of a call of this shape, with inputs and outputs in `memory`.
Run = Callable[[Any, CallMemory], None]


@dataclass(slots=True, eq=False)
class Captured:
    """A captured call. To run it, write the inputs to `memory`, call `Graphs.replay`, and copy the outputs before the
    next call.

    While `is_confirmed` is False, also run the call eagerly, pass both results to `Graphs.confirm`, and use the eager
    result.
    """

    memory: CallMemory
    replay: Callable[[], None]
    is_confirmed: bool = False


class Graphs:
    """The CUDA graphs of one engine, for call shapes that occur often. Used by the engine thread only."""

    def __init__(
        self,
        device: Device,
        *,
        clock: Clock,
        metrics: Metrics,
        max_bytes: int | None = None,
        off_file: Path | None = None,
        is_exact: bool = False,
    ) -> None:
        """Once the graphs use `max_bytes` of device memory, no more are captured. If it is None, there is no limit.

        `off_file` is written if a failed capture ends the process, and contains the reason. While the file exists,
        nothing is captured, so the process that replaces this one does not fail again.

        If `is_exact`, a captured call must give the same bits as the eager call. Otherwise a difference of 50 dB below
        the level of the result is allowed.
        """
        self._device = device
        self.room = CaptureRoom(device, max_bytes=max_bytes)
        self._clock = clock
        self._rests_until = -math.inf
        # The last capture, from begin to end, while its time is unknown because the device has not finished it.
        self._measuring: tuple[Moment, Moment] | None = None
        self._metrics = metrics
        self._captured: dict[Shape, Captured] = {}  # in the order of their last use
        self._candidates: dict[Shape, Run] = {}
        self._misses: Counter[Shape] = Counter()
        self.off_reason = ""  # why no more calls are captured; empty while calls are captured
        self._off_file = off_file
        self._is_exact = is_exact
        if device.can_capture and off_file and off_file.exists():
            self.off_reason = f"{off_file.read_text()} (delete {off_file} to try again)"
            log.warning("captured calls are off: %s", self.off_reason)
        self._inputs: dict[Kind, Tensor] = {}
        self._outputs: dict[Kind, Tensor] = {}

    def find(self, shape: Shape, run: Run) -> Captured | None:
        """Return the CUDA graph of a shape. Returns None if there is none, and the caller must run the call eagerly.

        In this case, `run` may be captured later, with zeros as inputs. The device work that `run` queues must depend
        only on the shape and the inputs.
        """
        captured = self._captured.pop(shape, None)
        if captured is not None:
            self._captured[shape] = captured
            return captured
        self._metrics.increment("engine_graph_misses", kind=shape.kind)
        if not self.off_reason:
            self._misses[shape] += 1
            self._candidates[shape] = run
        return None

    def capture_next(self, *, is_idle: bool) -> bool:
        """Capture one shape that ran without a graph more than once. Returns False if no capture was tried.

        If `is_idle`, capture the largest shape, because smaller graphs can then use its memory. Otherwise, captures may
        take only a tenth of the time, so capture the shape that ran without a graph most often. In simulated mixed
        traffic, this raises the fraction of replayed calls from 38 to 81 % (small model) and from 9 to 46 % (medium
        model).
        """
        if self.off_reason or not self._record_last_capture(wait=is_idle):
            return False
        if self._clock.monotonic() < self._rests_until and not is_idle:
            return False
        candidates = [
            shape
            for shape in self._candidates
            if self._misses[shape] >= _MISSES_TO_CAPTURE and self.room.has_room(shape)
        ]
        if not candidates:
            return False
        shape = max(candidates, key=lambda shape: (0 if is_idle else self._misses[shape], shape.size))
        with nullcontext() if shape.kind == "denoise" else self._device.on_second_queue():
            began = self._device.mark()
            with self.room.counted(shape):
                self._capture(shape)
            self._measuring = began, self._device.mark()
        return True

    def _capture(self, shape: Shape) -> None:
        """Capture a call. If that fails, capture no more calls in this process.

        If it fails because the device's memory is full, capture only smaller calls from now on.
        """
        self._make_room()
        run = self._candidates.pop(shape)
        del self._misses[shape]
        try:
            memory = CallMemory(
                self._fixed(self._inputs, shape.kind, num=shape.num_inputs).zero_(),
                self._fixed(self._outputs, shape.kind, num=shape.num_outputs),
            )
            replay = self._device.capture(lambda: run(shape, memory))
        except torch.OutOfMemoryError as error:  # the capture itself has ended properly
            log.warning("no memory to capture %s: %s", shape, error)
            self.room.refuse(shape)
            return
        except Exception as error:  # noqa: BLE001 - the call can still run without a graph
            self._device.require_usable(error)
            reason = f"{shape} cannot be captured: {error}"
            self._stop(reason)
            self._end_after_failure(reason)
            return
        self._captured[shape] = Captured(memory, replay)
        self._count(shape.kind)

    def confirm(self, captured: Captured, replayed: Tensor, *, expected: Tensor) -> None:
        """Compare the results of the first replay of a captured call with the results of the eager call, `expected`.

        If they differ too much, drop all graphs, and capture no more in this process. Waits for the device.
        """
        difference = difference_db(replayed, expected)
        captured.is_confirmed = difference <= (-math.inf if self._is_exact else -AGREEMENT_DB)
        if not captured.is_confirmed:
            allowed = "no difference" if self._is_exact else f"-{AGREEMENT_DB:g} dB"
            self._drop_all(f"a captured call differs from the eager one by {difference:.1f} dB (allowed: {allowed})")

    def replay(self, captured: Captured) -> bool:
        """Replay a captured call. Returns True if it was queued.

        If the replay raises, all graphs are dropped, nothing is computed, and the result is False.
        """
        try:
            captured.replay()
        except Exception as error:  # noqa: BLE001 - the call can still run without a graph
            self._device.require_usable(error)
            self._drop_all(f"a captured call cannot be replayed: {error}")
            return False
        return True

    def _drop_all(self, reason: str) -> None:
        """Drop all graphs, and capture no more in this process."""
        self._stop(reason)
        self._captured.clear()
        for kind in get_args(Kind):
            self._count(kind)

    def _stop(self, reason: str) -> None:
        """Make no more captures in this process."""
        self.off_reason = reason
        log.warning("captured calls are off from now on: %s", reason, exc_info=True)
        self._metrics.increment("engine_captures_off")
        self._candidates.clear()

    def _end_after_failure(self, reason: str) -> None:
        """Write `off_file` and raise DeviceLostError, unless the device can still be used after a failed capture."""
        if not self._device.survives_failed_capture:
            try:
                if self._off_file:
                    self._off_file.parent.mkdir(parents=True, exist_ok=True)
                    self._off_file.write_text(reason)
            except OSError as error:
                log.warning("the next process may try captures again: %s", error)
            raise DeviceLostError(f"a capture failed, which this torch does not survive: {reason}")

    def _record_last_capture(self, *, wait: bool) -> bool:
        """Record how long the last capture took. Returns False if the device has not finished it.

        With `wait`, first wait until the device has finished it.
        """
        if self._measuring is not None:
            began, ended = self._measuring
            if wait:
                ended.wait()
            elif not ended.is_reached():
                return False
            self._rests_until = self._clock.monotonic() + ended.ms_since(began) / 1000.0 * (1.0 / _SHARE - 1.0)
            self._measuring = None
        return True

    def _make_room(self) -> None:
        """If there are already `MOST_GRAPHS` graphs, drop the least recently used one."""
        if len(self._captured) >= MOST_GRAPHS:
            dropped = next(iter(self._captured))
            del self._captured[dropped]
            self._count(dropped.kind)

    def _fixed(self, shared: dict[Kind, Tensor], kind: Kind, *, num: int) -> Tensor:
        """Return the first `num` values of the tensor that all graphs of a kind share.

        If the tensor is too small, it is replaced by a larger one. Graphs that were captured before keep the old one.
        """
        if kind not in shared or len(shared[kind]) < num:
            shared[kind] = torch.zeros(num, device=self._device.torch_device)
        return shared[kind][:num]

    def _count(self, kind: Kind) -> None:
        self._metrics.gauge("engine_graphs", float(sum(shape.kind == kind for shape in self._captured)), kind=kind)
