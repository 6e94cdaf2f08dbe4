"""How torch's operations behave on a CUDA device: whether they start kernels, wait for the device or only create views.

`stand_in_device` counts the host's work with these functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_MASKS = (torch.bool, torch.uint8)
# Operations that are one kernel on CUDA, although torch decomposes them on other devices.
_FUSED = ("scaled_dot_product_attention", "rms_norm")
# Operations that start no kernel, although their schema does not mark them as views.
_NO_KERNEL = (
    "_local_scalar_dense",
    "_unsafe_view",
    "detach_",
    "resize_",
    "set_",
    "squeeze_",
    "t_",
    "transpose_",
    "unsqueeze_",
)
_MASK_STEP = 16  # values
_UNFUSED_NORM = 8  # number of kernels of an RMS norm whose gain and input have different dtypes
_MOST_JOINED = 4  # `cat` of tensors that are not contiguous is one kernel if they have at most so many dimensions
_ALLOCATING = ("empty", "new_empty")
# The host waits for the device in these operations, because it needs a value or the size of the result.
_WAITING = (
    "_local_scalar_dense",
    "bincount",
    "equal",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
    "_unique",
    "_unique2",
)
_INDEXING = ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_")


def leaves(values: Iterable[Any]) -> Iterator[Any]:
    """Yield every value in nested lists and tuples."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from leaves(value)
        else:
            yield value


@cache
def name_of(operation: OpOverload) -> str:
    """Returns the operation's name without namespace and overload: `aten::add.Tensor` -> `add`."""
    return str(operation._schema.name).split("::")[1]


@cache
def is_composite(operation: OpOverload) -> bool:
    """Whether torch decomposes the operation on CUDA into other operations. If so, only these others are counted."""
    return name_of(operation) not in _FUSED and operation.has_kernel_for_dispatch_key(_COMPOSITE)


def count_launches(operation: OpOverload, args: Sequence[Any]) -> int:
    """Returns the number of kernels that an operation, which must not be composite, starts on CUDA.

    Views, allocations and copies of data onto itself start none, and other operations start one. In addition, attention
    converts a boolean mask, norms copy an input that is not contiguous, and `cat` copies each tensor separately if
    tensors have too many dimensions.
    """
    name = name_of(operation)
    if name == "copy_" and _are_same_data(args[0], args[1]):
        return 0
    if operation.is_view or name in _NO_KERNEL or name.startswith(_ALLOCATING):
        return 0
    return 1 + _count_hidden(name, args)


def _count_hidden(name: str, args: Sequence[Any]) -> int:
    """Returns how many kernels an operation starts in addition to one kernel."""
    match name:
        case "scaled_dot_product_attention":
            mask = args[3] if len(args) > 3 else None
            if not isinstance(mask, Tensor):
                return 0
            # Attention kernels need masks whose rows begin at multiples of 16 values. For another mask, padded memory
            # is filled and the mask is copied into it: two kernels.
            is_aligned = all(stride % _MASK_STEP == 0 for stride in mask.stride()[:-1])
            return (not mask.is_floating_point()) + 2 * (not is_aligned)
        case "rms_norm" | "native_layer_norm":
            gain = args[2] if len(args) > 2 else None
            if name == "rms_norm" and isinstance(gain, Tensor) and gain.dtype != args[0].dtype:
                return _UNFUSED_NORM - 1
            return int(not args[0].is_contiguous())
        case "cat":
            given = [tensor for tensor in args[0] if tensor.numel()]
            is_joined = given[0].dim() <= _MOST_JOINED or all(tensor.is_contiguous() for tensor in given)
            return 0 if is_joined else len(given) - 1
    return 0


def waits(operation: OpOverload, args: Sequence[Any]) -> bool:
    """Whether this operation makes the host wait until the device has finished all earlier work."""
    name = name_of(operation)
    if name in _WAITING:
        return True
    if name not in _INDEXING:
        return False
    by_mask = any(isinstance(index, Tensor) and index.dtype in _MASKS for index in args[1])
    # Writing a host scalar to the elements that a mask selects needs no wait: the host need not count them.
    fills = "put" in name and args[2].numel() == 1 and args[2].device.type == "cpu"
    return by_mask and not fills


def indices(operation: OpOverload, args: Sequence[Any]) -> tuple[Tensor, ...]:
    """Returns an operation's index tensors. These may be on the host, even if its other tensors are on the device."""
    if name_of(operation) not in _INDEXING:
        return ()
    return tuple(index for index in args[1] if isinstance(index, Tensor))


def is_blocking(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a copy (`_to_copy` or `copy_`) is called without `non_blocking`."""
    return not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))


def _are_same_data(first: Tensor, second: Tensor) -> bool:
    """Whether the two tensors are the same view of the same memory.

    For example, `x[i] += y` ends with a copy of `x[i]` onto itself.
    """
    return (
        first.untyped_storage()._cdata == second.untyped_storage()._cdata
        and first.storage_offset() == second.storage_offset()
        and first.shape == second.shape
        and first.stride() == second.stride()
    )
