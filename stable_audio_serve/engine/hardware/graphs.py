"""Captures model calls as CUDA graphs, one per call shape, because a graph starts with a single launch. A call whose
shape has no graph runs eagerly and is counted. Shapes that occur often are captured later, one at a time, so that no
request waits long. The time and the memory of captures are limited.
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

_SHARE = 0.1  # while requests wait, captures take at most this share of the time
AGREEMENT_DB = 50.0  # least level of results above their difference from the results of a plain call


def difference_db(actual: Tensor, expected: Tensor) -> float:
    """Return the level of the difference relative to `expected`, in dB: -inf for equal bits, inf for NaN in one only.

    Waits for the device.
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
    def inputs(self) -> tuple[int, torch.dtype]:
        """The number of input values and their dtype."""
        ...

    @property
    def num_outputs(self) -> int:
        """The number of float32 values that the call writes to its output memory."""
        ...


@dataclass(frozen=True, slots=True)
class CallMemory:
    """The tensors from which a CUDA graph reads its inputs and to which it writes its outputs. All graphs of a kind
    share them, because these graphs never run at the same time.
    """

    inputs: Tensor
    outputs: Tensor


class CaptureRoom:
    """Limits the memory of CUDA graphs. All graphs of a kind share one pool, which is as large as their largest call;
    each graph takes some more in the driver. Used by one thread.
    """

    def __init__(self, device: Device, *, max_bytes: int | None) -> None:
        """If `max_bytes` is None, there is no limit, and memory is not counted."""
        self._device = device
        self._max_bytes = max_bytes
        self._largest: dict[Kind, int] = {}
        self._call_bytes: dict[Kind, float] = {}
        self.num_bytes = 0

    def expect(self, kind: Kind, *, call_bytes: float) -> None:
        """Set the temporary tensors of calls of a kind, in bytes per latent frame or token."""
        self._call_bytes[kind] = call_bytes

    def has_room(self, shape: Shape) -> bool:
        """Whether a graph of this shape is expected to fit. The pool grows only by what larger calls need more."""
        if self._max_bytes is None:
            return True
        longer = max(0, shape.size - self._largest.get(shape.kind, 0))
        return self.num_bytes + longer * self._call_bytes.get(shape.kind, 0.0) < self._max_bytes

    @contextmanager
    def counted(self, shape: Shape) -> Iterator[None]:
        """Return a context manager for one capture. Its memory is counted even if the capture fails."""
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
    """A captured call. To run it, write its inputs, call `replay`, and copy the outputs before the next call.

    Until `is_confirmed`, run the call eagerly as well, use the eager results and pass both to `Graphs.confirm`.
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
        """Once the graphs use `max_bytes` of device memory, no more are captured. None: no limit.

        `off_file` outlives the process. It is written if a failed capture ends the process, and says why. As long as it
        exists, nothing is captured, so that the process is replaced only once. If `is_exact`, a captured call must have
        the bits of the eager one, else a difference 50 dB below its level is allowed.
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
        self.off_reason = ""  # why no more calls are captured; "": they are
        self._off_file = off_file
        self._is_exact = is_exact
        if off_file and off_file.exists():
            self.off_reason = f"{off_file.read_text()} (delete {off_file} to try again)"
            log.warning("captured calls are off: %s", self.off_reason)
        self._inputs: dict[Kind, Tensor] = {}
        self._outputs: dict[Kind, Tensor] = {}

    def find(self, shape: Shape, run: Run) -> Captured | None:
        """Return the CUDA graph of a shape; None if there is none, so that the caller must run the call eagerly.

        If there is none, `run` may be captured later, with inputs of zeros. The device work of `run` must depend only
        on the shape and the inputs.
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
        """Capture a shape that ran without a graph more than once. Returns False if no shape is worth capturing now.

        If the device `is_idle`, take the largest shape, because smaller graphs can then share its memory. Otherwise
        take the one that ran without a graph most often, because captures take at most a tenth of the time: in
        simulated mixed traffic, 81 instead of 38 % of all calls are then replayed (small), and 46 instead of 9 %
        (medium).
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
        """Capture a call. If that fails, capture no more calls in this process."""
        self._make_room()
        run = self._candidates.pop(shape)
        del self._misses[shape]
        try:
            num_inputs, dtype = shape.inputs
            memory = CallMemory(
                self._fixed(self._inputs, shape.kind, num=num_inputs, dtype=dtype).zero_(),
                self._fixed(self._outputs, shape.kind, num=shape.num_outputs, dtype=torch.float32),
            )
            replay = self._device.capture(lambda: run(shape, memory))
        except DeviceLostError:
            raise
        except Exception as error:  # noqa: BLE001 - the call can still run without a graph
            self._device.require_usable(error)
            reason = f"{shape} cannot be captured: {error}"
            self._stop(reason)
            self._end_after_failure(reason)
            return
        self._captured[shape] = Captured(memory, replay)
        self._count(shape.kind)

    def confirm(self, captured: Captured, replayed: Tensor, *, expected: Tensor) -> None:
        """Compare the first results of a captured call with those of the same call run eagerly.

        If they differ, all captured calls are dropped, and no more are made in this process. Waits for the device.
        """
        difference = difference_db(replayed, expected)
        captured.is_confirmed = difference <= (-math.inf if self._is_exact else -AGREEMENT_DB)
        if not captured.is_confirmed:
            allowed = "no difference" if self._is_exact else f"-{AGREEMENT_DB:g} dB"
            self._drop_all(f"a captured call differs from the eager one by {difference:.1f} dB (allowed: {allowed})")

    def replay(self, captured: Captured) -> bool:
        """Replay a captured call. If the replay raises, drop all graphs and return False; nothing was computed."""
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
        """Raise DeviceLostError if the device does not survive a failed capture."""
        if not self._device.survives_failed_capture:
            try:
                if self._off_file:
                    self._off_file.parent.mkdir(parents=True, exist_ok=True)
                    self._off_file.write_text(reason)
            except OSError as error:
                log.warning("the next process may try captures again: %s", error)
            raise DeviceLostError(f"a capture failed, which this torch does not survive: {reason}")

    def _record_last_capture(self, *, wait: bool) -> bool:
        """Record how long the last capture took. Returns False if the device has not finished it and not `wait`."""
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
        """Drop the graph that was not used for the longest time if there are already `MOST_GRAPHS`."""
        if len(self._captured) >= MOST_GRAPHS:
            dropped = next(iter(self._captured))
            del self._captured[dropped]
            self._count(dropped.kind)

    def _fixed(self, shared: dict[Kind, Tensor], kind: Kind, *, num: int, dtype: torch.dtype) -> Tensor:
        """Return the first `num` values of the memory that all graphs of a kind share. Grows that memory if necessary.

        Graphs that were captured earlier keep the memory from before.
        """
        if kind not in shared or len(shared[kind]) < num:
            shared[kind] = torch.zeros(num, dtype=dtype, device=self._device.torch_device)
        return shared[kind][:num]

    def _count(self, kind: Kind) -> None:
        self._metrics.gauge("engine_graphs", float(sum(shape.kind == kind for shape in self._captured)), kind=kind)
