"""A simulated device for PyTorch that counts host work: copies, kernel launches, and waits for the device.

Its tensors are in host memory but report another device, and the CPU computes their operations. This module does not
depend on the engine or a model.

The reported device is torch's `privateuseone`. Its registration cannot be undone, so a process with a stand-in device
should do nothing else. Outside the context of a `StandInDevice`, every operation on its tensors raises RuntimeError.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine import torch_operations as operations

DEVICE = torch.device("privateuseone:0")
_OWN_FOLDER = str(Path(__file__).parent)
_TORCH_FOLDER = str(Path(torch.__file__).parent)


@dataclass(slots=True)
class HostWork:
    """The host's work in one section of a program. A copy counts as one, whatever its size.

    Each key of `origins` names a kind of work and the source line where it happened.
    """

    copies_to_device: int = 0  # copies that block the host
    copies_to_host: int = 0  # copies that block the host
    asynchronous_copies: int = 0  # copies that do not block, because the host memory is pinned
    waits: int = 0  # times that the host waits for the device
    mix_ups: int = 0  # operations on a host tensor and a device tensor, which would fail on a GPU
    launches: int = 0
    origins: Counter[str] = field(default_factory=Counter)

    @property
    def blocking_copies(self) -> int:
        """The number of copies in either direction that block the host."""
        return self.copies_to_device + self.copies_to_host


class StandInTensor(torch.Tensor):
    """A tensor that reports the stand-in device. Its values are in the CPU tensor `held`."""

    held: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> StandInTensor:
        """Create a stand-in tensor with the shape, strides, dtype and values of the CPU tensor `real`."""
        with torch.inference_mode(False):  # a wrapper that is an inference tensor cannot be indexed
            made = torch.Tensor._make_wrapper_subclass(
                cls,
                real.size(),
                strides=real.stride(),
                storage_offset=real.storage_offset(),
                dtype=real.dtype,
                device=DEVICE,
                requires_grad=False,
            )
        made.held = real
        return made

    def __init__(self, real: Tensor) -> None:
        super().__init__()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"StandInTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{func} on a tensor of the stand-in device, outside its context")


class StandInDevice:
    """A context in which the thread that entered it can use tensors on `DEVICE`. It can be entered only once."""

    def __init__(self) -> None:
        self.sections: list[tuple[str, HostWork]] = []  # in the order in which they began
        self.outside = HostWork()  # work outside all sections
        self._open = [self.outside]
        self._pinned: dict[int, Tensor] = {}  # by address; the tensors are kept so that no other gets the same address
        self._stack = ExitStack()

    def __enter__(self) -> StandInDevice:
        _register()
        self._stack.enter_context(patch.object(torch, "Generator", _Generator))
        self._stack.enter_context(_Construction())
        self._stack.enter_context(_Dispatch(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @contextmanager
    def section(self, name: str) -> Iterator[HostWork]:
        """Count the work within this context in a new section. Outer sections do not count this work."""
        work = HostWork()
        self.sections.append((name, work))
        self._open.append(work)
        try:
            yield work
        finally:
            self._open.remove(work)

    def wait(self, reason: str) -> None:
        """Count a wait of the host that no tensor operation causes, such as a synchronization."""
        work = self._open[-1]
        work.waits += 1
        work.origins[f"wait {reason} {_origin()}"] += 1

    def run(self, operation: Any, *, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run and count an operation on this device. Composite operations, which consist of others, are not allowed."""
        name = operations.name_of(operation)
        tensors = [leaf for leaf in operations.leaves((args, *kwargs.values())) if isinstance(leaf, Tensor)]
        target = kwargs.get("device")
        to_device = target.type == DEVICE.type if target is not None else any(map(_is_here, tensors))
        if name in ("_to_copy", "copy_") and self._count_crossing(name, args, kwargs=kwargs, to_device=to_device):
            pass
        else:
            self._count(operation, args, tensors=tensors)
        if name == "pin_memory":
            return self._pin(args[0])
        result = operation(*_map(_unwrap, args), **_on_host(kwargs))
        known = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, StandInTensor)}
        return _map(partial(_wrap, known=known, to_device=to_device), result)

    def _count_crossing(self, name: str, args: Sequence[Any], *, kwargs: Mapping[str, Any], to_device: bool) -> bool:
        """Count a copy between host and device.

        Returns False, without counting, if both tensors are on the host or both are on the device.
        """
        source = args[1] if name == "copy_" else args[0]
        target_is_here = _is_here(args[0]) if name == "copy_" else to_device
        if _is_here(source) == target_is_here:
            return False
        host = source if target_is_here else args[0] if name == "copy_" else None
        work = self._open[-1]
        if host is not None and self._is_pinned(host) and not operations.is_blocking(args, kwargs):
            work.asynchronous_copies += 1
        elif target_is_here:
            work.copies_to_device += 1
            work.origins[f"copy to device {_origin()}"] += 1
        else:
            work.copies_to_host += 1
            work.origins[f"copy to host {_origin()}"] += 1
        return True

    def _count(self, operation: Any, args: Sequence[Any], *, tensors: Sequence[Tensor]) -> None:
        work = self._open[-1]
        name = operations.name_of(operation)
        indices = operations.indices(operation, args)
        strange = [tensor for tensor in tensors if not _is_here(tensor) and tensor.dim() > 0]
        if any(map(_is_here, tensors)) and strange:
            if _is_here(args[0]) and all(any(tensor is index for index in indices) for tensor in strange):
                work.copies_to_device += len(strange)
                work.origins[f"copy to device for {name} {_origin()}"] += len(strange)
            else:
                work.mix_ups += 1
                work.origins[f"mix-up {name} {_origin()}"] += 1
        if operations.waits(operation, args):
            work.waits += 1
            work.origins[f"wait {name} {_origin()}"] += 1
        work.launches += operations.count_launches(operation, [_unwrap(arg) for arg in args])

    def _pin(self, tensor: Tensor) -> Tensor:
        pinned = tensor.clone()
        self._pinned[pinned.untyped_storage().data_ptr()] = pinned
        return pinned

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned


def move(module: nn.Module) -> None:
    """Move a module's parameters and buffers to the stand-in device, in place. Cannot be undone."""
    _register()
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            part._parameters[name] = StandInTensor(parameter.data)  # type: ignore[assignment]
        for name, buffer in list(part.named_buffers(recurse=False)):
            part._buffers[name] = StandInTensor(buffer)


class _Dispatch(TorchDispatchMode):
    """Receives every torch operation of this thread, below autograd. Operations on stand-in tensors run on `device`."""

    def __init__(self, device: StandInDevice) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = operations.name_of(func)
        if name not in ("pin_memory", "is_pinned") and not any(
            map(_is_here, operations.leaves((args, *kwargs.values())))
        ):
            return func(*args, **kwargs)
        if name == "is_pinned":
            return self._device._is_pinned(args[0])
        if operations.is_composite(func) and name != "pin_memory":
            with self:
                return func.decompose(*args, **kwargs)
        return self._device.run(func, args=args, kwargs=kwargs)


class _Construction(TorchFunctionMode):
    """Makes hidden copies visible: a device tensor from Python values is created on the host and then copied."""

    def __torch_function__(self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type == DEVICE.type:
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = (args[0], _without_lists(args[1]), *args[2:])
        if func is torch.Tensor.__setitem__ and isinstance(args[2], bool | int | float):
            # A CPU scalar can be written without a copy, as on CUDA.
            args = (*args[:2], torch.tensor(args[2], dtype=args[0].dtype))
        return func(*args, **kwargs)


def _without_lists(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(_without_lists(part) for part in index)
    return torch.tensor(index) if isinstance(index, list) else index


class _Generator(torch.Generator):
    """A random generator. If the stand-in device is requested, it is on the CPU instead."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        on_host = "cpu" if torch.device(device).type == DEVICE.type else device
        return super().__new__(cls, device=on_host)  # type: ignore[call-arg]


@cache
def _register() -> None:
    """Register torch's `privateuseone` device. This cannot be undone."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend()


def _is_here(value: object) -> bool:
    if isinstance(value, torch.device):
        return value.type == DEVICE.type
    return isinstance(value, StandInTensor)


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply the function to each value in nested lists and tuples. Returns the results, nested in the same way."""
    if isinstance(value, list | tuple):
        return type(value)([_map(function, part) for part in value])
    return function(value)


def _unwrap(value: Any) -> Any:
    return value.held if isinstance(value, StandInTensor) else value


def _wrap(value: Any, *, known: Mapping[int, StandInTensor], to_device: bool) -> Any:
    """Wrap an operation's result as a stand-in tensor.

    If an operation in place returned its argument, return the stand-in tensor of this argument.
    """
    if id(value) in known:
        return known[id(value)]
    return StandInTensor(value) if to_device and isinstance(value, Tensor) else value


def _on_host(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: torch.device("cpu") if name == "device" and value is not None else _map(_unwrap, value)
        for name, value in kwargs.items()
        if name != "pin_memory"
    }


def _origin() -> str:
    """Returns the innermost source line outside torch and this folder, as `folder/file.py:line`."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_OWN_FOLDER, _TORCH_FOLDER, "<")):
        frame = frame.f_back
    folder, name = os.path.split(frame.f_code.co_filename)
    return f"{os.path.basename(folder)}/{name}:{frame.f_lineno}"
