"""Torch's process-wide switches for rounded float32 products, changed by one thread at a time."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Switch = tuple[Any, str, object]  # torch's object, the attribute, the value that rounds


class SwitchLock:
    """A readers-writer lock for the switches of a process. Changing a switch needs exclusive access, computing shared
    access.

    While a thread waits for exclusive access, no other thread gets access. It therefore waits only for the calls that
    are already in progress.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._left = threading.Condition()
        self._num_inside = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Returns a context in which no other thread changes a switch."""
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
        """Returns a context in which no other thread computes."""
        with self._turn:
            with self._left:
                while self._num_inside:
                    self._left.wait()
            yield


SWITCH_LOCK = SwitchLock()


def exact(method: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorate a model's method so that its float32 products keep full precision (no TF32).

    This holds even if another model in the process switches TF32 on.
    """

    @functools.wraps(method)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with SWITCH_LOCK.shared():
            return method(*args, **kwargs)

    return run


@contextmanager
def switched(switches: Sequence[Switch]) -> Iterator[None]:
    """Returns a context in which the switches are set. The caller must have exclusive access."""
    before = [getattr(owner, name) for owner, name, _ in switches]
    try:
        for owner, name, value in switches:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(switches, before, strict=True):
            setattr(owner, name, value)


def tf32_convolutions() -> list[Switch]:
    """Returns the switch of cuDNN's convolutions."""
    return [(torch.backends.cudnn, "allow_tf32", True)]


def tf32_products() -> list[Switch]:
    """Returns the switches of convolutions and of cuBLAS's products, which fused attention also reads.

    These old names also set `fp32_precision`, the new name in torch 2.9. If only the new name is set, torch raises an
    error when the old names are read.
    """
    return [(torch.backends.cuda.matmul, "allow_tf32", True), *tf32_convolutions()]


def bfloat16_processor_products() -> list[Switch]:
    """Returns the switches that make oneDNN round factors to bfloat16 and add in float32 (torch 2.9 and later)."""
    mkldnn: Any = torch.backends.mkldnn
    return [(part, "fp32_precision", "bf16") for part in (mkldnn.matmul, mkldnn.conv)]
