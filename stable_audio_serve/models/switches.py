"""Torch's process-wide switches that allow matrix products to round float32 inputs, and a lock for changing them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


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
def tf32_products() -> Iterator[None]:
    """Returns a context in which convolutions, cuBLAS's matrix products and fused attention use TF32.

    The caller must have exclusive access (`SwitchLock.alone`). The switches are attributes named `allow_tf32`. Setting
    one also sets its successor `fp32_precision` (torch 2.9). If code sets only the successor, torch raises an error
    when `allow_tf32` is read.
    """
    switches: tuple[Any, Any] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = True
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value
