"""Torch's process-wide switches that let matrix products round float32 inputs to TF32, and a lock for changing them.

TF32 exists only on CUDA, where one thread of the process calls models at a time. An engine has only one such thread,
and a replica only one engine.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_LOCK = threading.RLock()


class _OnDevice(Protocol):
    @property
    def device(self) -> torch.device: ...


Model = TypeVar("Model", bound=_OnDevice)


def float32_products(device: torch.device) -> AbstractContextManager[Any]:
    """Returns a context for computing on `device`, in which no other thread switches TF32 on."""
    return _LOCK if device.type == "cuda" else nullcontext()


def exact(method: Callable[Concatenate[Model, Parameters], Result]) -> Callable[Concatenate[Model, Parameters], Result]:
    """Decorate a model's method so that its float32 matrix products keep full precision (no TF32)."""

    @functools.wraps(method)
    def run(model: Model, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with float32_products(model.device):
            return method(model, *args, **kwargs)

    return run


@contextmanager
def tf32_products() -> Iterator[None]:
    """Returns a context in which convolutions, cuBLAS's matrix products and fused attention use TF32.

    The switches are attributes named `allow_tf32`. Setting one also sets its successor `fp32_precision` (torch 2.9). If
    code sets only the successor, torch raises an error when `allow_tf32` is read.
    """
    switches: tuple[Any, Any] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    with _LOCK:
        before = [switch.allow_tf32 for switch in switches]
        try:
            for switch in switches:
                switch.allow_tf32 = True
            yield
        finally:
            for switch, value in zip(switches, before, strict=True):
                switch.allow_tf32 = value
