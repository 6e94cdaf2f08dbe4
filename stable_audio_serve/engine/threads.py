"""Several threads for one device call on a CPU, without a bit of difference to one thread.

How an operation is shared out decides where its vectors end and in which order sums are taken, so its last bits may
depend on the number of threads. Only operations whose result does not are shared out, and only in the sizes where that
holds; they are nearly all of the work. All others run on one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Matrix products of few rows, or of a width that vectors do not fill, are cut by how many threads there are.
_LEAST_ROWS = 64
_WIDTH = 32
# Attention gives each thread a piece of one buffer; with fewer queries than a block has, pieces are aligned unlike.
_LEAST_QUERIES = 32


@contextmanager
def plain_threads(num_threads: int | None) -> Iterator[None]:
    """Within it every operation of this thread may run on `num_threads` threads; None = torch's default."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    yield


@contextmanager
def steady_threads(num_threads: int | None) -> Iterator[None]:
    """Within it operations of this thread run on `num_threads` threads where that changes no bit, else on one."""
    num_threads = num_threads or torch.get_num_threads()
    torch.set_num_threads(1)
    if num_threads == 1:
        yield
    else:
        with _SharedOut(num_threads):
            yield


class _SharedOut(TorchFunctionMode):
    def __init__(self, num_threads: int) -> None:
        super().__init__()
        self._num_threads = num_threads

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch instead of each of its functions."""
        if not _is_steady(func, args):
            return func(*args, **(kwargs or {}))
        torch.set_num_threads(self._num_threads)  # costs a tenth of a microsecond
        try:
            return func(*args, **(kwargs or {}))
        finally:
            torch.set_num_threads(1)


def _is_steady(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether the bits of this call's result do not depend on the number of threads."""
    if func is F.scaled_dot_product_attention:
        return args[0].dtype == torch.float32 and args[0].shape[-2] >= _LEAST_QUERIES
    if func is not F.linear:
        return False
    x, weight = args[0], args[1]
    return weight.dtype == torch.float32 and len(weight) % _WIDTH == 0 and x.shape[:-1].numel() >= _LEAST_ROWS
