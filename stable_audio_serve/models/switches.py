"""Torch's process-wide switches that allow matrix products to round float32 inputs, and a lock for changing them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Switch = tuple[Any, str, object]  # (an object of torch, its attribute, the attribute's value that allows rounding)


class SwitchLock:
    """A readers-writer lock for the switches. Computing takes shared access; changing a switch takes exclusive access.

    While a thread waits for exclusive access, no other thread gets access. The waiting thread therefore waits only for
    computations that are already in progress.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._left = threading.Condition()
        self._num_inside = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Returns a context with shared access, in which no other thread changes a switch."""
        with self._turn, self._left:
            self._num_inside += 1
        try:
            yield
        finally:
            with self._left:
                self._num_inside -= 1
                self._left.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Returns a context with exclusive access, in which no other thread computes or changes a switch."""
        with self._turn:
            with self._left:
                while self._num_inside:
                    self._left.wait()
            yield


SWITCH_LOCK = SwitchLock()


def exact(method: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorate a model's method so that its float32 matrix products keep full precision (no TF32).

    While the method runs, no other thread of the process can switch TF32 on.
    """

    @functools.wraps(method)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with SWITCH_LOCK.shared():
            return method(*args, **kwargs)

    return run


@contextmanager
def switched(switches: Sequence[Switch]) -> Iterator[None]:
    """Returns a context in which the switches are set. The caller must have exclusive access (`SwitchLock.alone`)."""
    before = [getattr(owner, name) for owner, name, _ in switches]
    try:
        for owner, name, value in switches:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(switches, before, strict=True):
            setattr(owner, name, value)


def tf32_products() -> list[Switch]:
    """Returns the switches that let convolutions, cuBLAS's matrix products and fused attention use TF32.

    They are attributes named `allow_tf32`. Setting one also sets its successor `fp32_precision` (torch 2.9). If code
    sets only the successor, torch raises an error when `allow_tf32` is read.
    """
    return [(torch.backends.cuda.matmul, "allow_tf32", True), (torch.backends.cudnn, "allow_tf32", True)]


def bfloat16_processor_products() -> list[Switch]:
    """Returns the switches that make oneDNN's matrix products and convolutions round their inputs to bfloat16.

    Sums stay in float32. Needs torch 2.9 or later.
    """
    mkldnn: Any = torch.backends.mkldnn
    return [(part, "fp32_precision", "bf16") for part in (mkldnn.matmul, mkldnn.conv)]
