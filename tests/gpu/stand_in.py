"""Simulated GPUs on the CPU: one that works, and others that each have one fault.

`python -m benchmarks.gpu first --device cpu --open-device tests.gpu.stand_in:open_honest` uses the one without a fault.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stable_audio_serve.engine.hardware.device import Moment
from tests.engine.capturing import LateRecordingDevice

_PRODUCTS = (torch.ops.aten.linear.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def open_honest(device: torch.device) -> LateRecordingDevice:
    """Returns a device without faults. It simulates graph captures, and runs its second queue as late as possible."""
    return LateRecordingDevice()


def open_wrong_captures(device: torch.device) -> LateRecordingDevice:
    """Returns a device whose captured calls compute one element wrongly."""
    return _WrongCaptures()


def open_failing_captures(device: torch.device) -> LateRecordingDevice:
    """Returns a device whose captured calls raise when they run."""
    return _FailingCaptures()


def open_torn_copies(device: torch.device) -> LateRecordingDevice:
    """Returns a device whose copies to the host arrive without their last value."""
    return _TornCopies()


def open_early_queue(device: torch.device) -> LateRecordingDevice:
    """Returns a device whose first queue does not wait for the second."""
    return _EarlyQueue()


class _WrongCaptures(LateRecordingDevice):
    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        run()

        def replay() -> None:
            with _OneWrongElement():
                run()

        return replay


class _FailingCaptures(LateRecordingDevice):
    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        run()

        def replay() -> None:
            raise RuntimeError("this captured call fails")

        return replay


class _TornCopies(LateRecordingDevice):
    def download(self, source: Tensor, target: Tensor) -> None:
        target.view(-1)[:-1].copy_(source.reshape(-1)[:-1])
        target.view(-1)[-1] = 0.5


class _EarlyQueue(LateRecordingDevice):
    def follow(self, moment: Moment) -> None:
        """Does not wait."""


class _OneWrongElement(TorchDispatchMode):
    """Changes one element of the first product of matrices."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._is_done = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._is_done and func in _PRODUCTS:
            self._is_done = True
            result.view(-1)[0] += 0.1
        return result
