"""Runs a device call on several CPU threads with exactly the result of one thread.

The number of threads decides where vectorised loops end and in which order values are added, so it can change the last
bits of a result. For some operations, depending on kind and size, it changes nothing. These run on several threads, and
all others run on one. Nearly all of the time is spent in operations that run on several threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from stable_audio_serve.models.onednn import linear, supports_onednn

_STEADY = (torch.float32, torch.bfloat16)
# A matrix multiplication is computed differently for each number of threads if the input has fewer than `_LEAST_ROWS`
# rows, or if the number of outputs is not a multiple of `_WIDTH`.
_LEAST_ROWS = 64
_WIDTH = 32
# The number of threads also changes the result of attention with fewer queries than this (the size of one block). In
# this case, each thread gets a part of one buffer, and how the parts are aligned depends on the number of threads.
_LEAST_QUERIES = 32


@contextmanager
def plain_threads(num_threads: int) -> Iterator[None]:
    """Run operations on `num_threads` threads within this context."""
    _set_num_threads(num_threads)
    yield


@contextmanager
def steady_threads(num_threads: int) -> Iterator[None]:
    """Within this context, run operations on `num_threads` threads if that changes no bit of the result, else on one
    thread.
    """
    _set_num_threads(1)
    if num_threads == 1:
        yield
    else:
        with _SteadyThreads(num_threads):
            yield


def _set_num_threads(num_threads: int) -> None:
    # A thread's first operation takes over the number that any thread has set last. So make that happen before.
    torch.get_num_threads()
    torch.set_num_threads(num_threads)


class _SteadyThreads(TorchFunctionMode):
    def __init__(self, num_threads: int) -> None:
        super().__init__()
        self._num_threads = num_threads

    def __torch_function__(  # noqa: PLR0917 - torch passes them by position
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func` on several threads if that changes no bit of its result. Torch calls this instead of `func`."""
        if not _is_steady(func, args):
            return func(*args, **(kwargs or {}))
        torch.set_num_threads(self._num_threads)  # fast enough to do for each operation: 0.1 microseconds
        try:
            return func(*args, **(kwargs or {}))
        finally:
            torch.set_num_threads(1)


def _is_steady(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Return whether this call's result is bit-identical for any number of threads."""
    if func is F.scaled_dot_product_attention:
        return args[0].dtype in _STEADY and args[0].shape[-2] >= _LEAST_QUERIES
    if func is linear and supports_onednn(args[0], args[1]):
        return True
    if func not in (F.linear, linear):
        return False
    x, weight = args[0], args[1]
    return weight.dtype in _STEADY and len(weight) % _WIDTH == 0 and x.shape[:-1].numel() >= _LEAST_ROWS
