"""Steps that were captured once and are asked for again in a single launch, by shape. A shape that is not captured yet
runs step by step, is counted, and is captured later: one at a time, so that nobody waits long. Knows no rows.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from stable_audio_serve.core.metrics import Metrics
from stable_audio_serve.engine.device import DEVICE_LOST, Device
from stable_audio_serve.engine.step import StepShape

log = logging.getLogger(__name__)

MOST_GRAPHS = 128
_MISSES_TO_CAPTURE = 2  # a shape that is seen once may never come again


@dataclass(frozen=True, slots=True)
class _Captured:
    inputs: Tensor  # on the device, at a fixed address
    replay: Callable[[], None]


class StepGraphs:
    """Captured steps of one engine. Used by the engine thread only."""

    def __init__(self, device: Device, *, run: Callable[[StepShape, Tensor], None], metrics: Metrics) -> None:
        """`run(shape, inputs)` asks the device for one step, with its inputs on the device already."""
        self._device = device
        self._run = run
        self._metrics = metrics
        self._captured: dict[StepShape, _Captured] = {}
        self._misses: Counter[StepShape] = Counter()
        self._refused: set[StepShape] = set()
        self._shared: Tensor | None = None

    def __contains__(self, shape: StepShape) -> bool:
        return shape in self._captured

    def replay(self, shape: StepShape, inputs: Tensor) -> None:
        """Run a captured step with a host buffer's inputs. Raises KeyError for a shape that is not captured."""
        captured = self._captured[shape]
        captured.inputs.copy_(inputs, non_blocking=True)
        captured.replay()

    def note_miss(self, shape: StepShape) -> None:
        """Count a step that had to run without a graph."""
        self._metrics.increment("engine_graph_misses")
        if len(self._captured) < MOST_GRAPHS and shape not in self._refused:
            self._misses[shape] += 1

    def capture_next(self) -> bool:
        """Capture the largest shape that was missed often enough. Returns whether there was one."""
        wanted = [shape for shape, count in self._misses.items() if count >= _MISSES_TO_CAPTURE]
        if not wanted:
            return False
        shape = max(wanted, key=lambda shape: (shape.network_rows * shape.frames, shape.network_rows))
        del self._misses[shape]
        inputs = self._inputs(shape.write((), self._device))
        try:
            self._captured[shape] = _Captured(inputs, self._device.capture(lambda: self._run(shape, inputs)))
        except DEVICE_LOST:
            raise
        except Exception:
            log.exception("a step of %d rows and %d frames cannot be captured", shape.network_rows, shape.frames)
            self._refused.add(shape)
            return False
        self._metrics.gauge("engine_graphs", float(len(self._captured)))
        return True

    def _inputs(self, host: Tensor) -> Tensor:
        """Returns the values on the device, where all captured steps have theirs: no two run at once."""
        if self._shared is None or len(self._shared) < len(host):
            self._shared = self._device.upload(host)  # steps captured before keep the smaller memory
        inputs = self._shared[: len(host)]
        inputs.copy_(host, non_blocking=True)
        return inputs

    def forget(self) -> None:
        """Drop all captured steps, because memory that they use has moved."""
        self._captured.clear()
        self._misses.clear()
        self._metrics.gauge("engine_graphs", 0.0)
