"""A CPU device that simulates a second CUDA stream whose work is done as late as possible.

The work is done when the host or the first stream waits for it, or after a number of polls. Until then its results are
invalid and the tensors that it changes have their old values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from stable_audio_serve.core.clock import SystemClock
from stable_audio_serve.core.generation import Mode
from stable_audio_serve.engine.hardware.device import Device, Moment
from tests.engine.torch_operations import is_composite, waits


class LateDevice(Device):
    """A device whose second stream does its work after `patience` polls, or earlier if something waits for the work.

    If `patience` is None, the work is done only when something waits for it.
    """

    def __init__(self, *, patience: int | None = None, mode: Mode = "strict") -> None:
        super().__init__(torch.device("cpu"), clock=SystemClock())
        self.has_second_queue = True
        self.default_mode = mode
        self.patience = patience
        self.num_late = 0  # number of polls that found the work not done
        self._pieces: list[_Operations] = []
        self._num_done = 0
        self._is_on_second_queue = False

    @contextmanager
    def on_second_queue(self, *reads: Tensor) -> Iterator[None]:
        assert not self._is_on_second_queue
        self._is_on_second_queue = True
        operations = _Operations()
        self._pieces.append(operations)
        try:
            with operations:
                yield
        finally:
            self._is_on_second_queue = False
            operations.undo()

    def mark(self) -> Moment:
        return _Point(self, len(self._pieces) if self._is_on_second_queue else 0)

    def follow(self, moment: Moment) -> None:
        assert isinstance(moment, _Point)
        moment.wait()

    def work_up_to(self, count: int) -> None:
        """Do the work of the first `count` uses of `on_second_queue`. Work that is done already is not repeated."""
        while self._num_done < count:
            self._pieces[self._num_done].redo()
            self._pieces[self._num_done].operations.clear()
            self._num_done += 1

    def is_done(self, count: int) -> bool:
        """Whether the work of the first `count` uses of `on_second_queue` is done."""
        return self._num_done >= count


class _Point:
    def __init__(self, device: LateDevice, count: int) -> None:
        self._device = device
        self._count = count
        self._num_polls = 0

    def is_reached(self) -> bool:
        if self._device.is_done(self._count):
            return True
        self._num_polls += 1
        if self._device.patience is not None and self._num_polls > self._device.patience:
            self._device.work_up_to(self._count)
            return True
        self._device.num_late += 1
        return False

    def wait(self) -> None:
        self._device.work_up_to(self._count)

    def ms_since(self, earlier: Moment) -> float:
        return 1.0


@dataclass(frozen=True, slots=True)
class _Operation:
    run: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    made: Sequence[Tensor]
    before: Sequence[tuple[Tensor, Tensor]]  # (changed tensor, its values before the change)


@dataclass(eq=False)
class _Operations(TorchDispatchMode):
    """Runs torch operations to get the shapes of their results. Records the operations, to undo and redo them later.

    The operations of a capture cannot be undone.
    """

    operations: list[_Operation] = field(default_factory=list)
    is_capture: bool = False

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        changed = _changed(func, args, kwargs)
        before = [] if self.is_capture else [(tensor, tensor.clone()) for tensor in changed]
        assert not (self.is_capture and waits(func, args)), f"{func} waits for the device, which ends a capture"
        args, kwargs = tree_map(_keep_generator, (args, kwargs))
        result = func(*tree_map(_open_generator, args), **tree_map(_open_generator, kwargs))
        memory = {tensor.untyped_storage().data_ptr() for tensor in given}
        made = [
            leaf
            for leaf in tree_leaves(result)
            if isinstance(leaf, Tensor) and leaf.numel() and leaf.untyped_storage().data_ptr() not in memory
        ]
        if made or changed:
            self.operations.append(_Operation(func, args, kwargs, made, before))
        return result

    def undo(self) -> None:
        """Restore every changed tensor, and fill every created tensor with invalid values."""
        for operation in reversed(self.operations):
            for tensor, was in operation.before:
                tensor.copy_(was)
        for operation in self.operations:
            for tensor in operation.made:
                tensor.fill_(float("nan") if tensor.is_floating_point() else 0)

    def redo(self) -> None:
        """Run the operations again and write the results into the tensors of the first run."""
        for operation in self.operations:
            args, kwargs = tree_map(_open_generator, (operation.args, operation.kwargs))
            results = [leaf for leaf in tree_leaves(operation.run(*args, **kwargs)) if isinstance(leaf, Tensor)]
            if operation.made:
                for tensor, value in zip(operation.made, results, strict=True):
                    tensor.copy_(value)


def record(run: Callable[[], None]) -> Callable[[], None]:
    """Call `run`. Returns a function that, like a CUDA graph, repeats the operations in the same memory."""
    operations = _Operations(is_capture=True)
    with operations:
        run()
    return operations.redo


@dataclass(frozen=True, slots=True)
class _GeneratorState:
    state: Tensor
    own: torch.Generator


def _keep_generator(value: Any) -> Any:
    return _GeneratorState(value.get_state(), value) if isinstance(value, torch.Generator) else value


def _open_generator(value: Any) -> Any:
    """Restore the state of a recorded generator and return the generator. Any other value is returned unchanged."""
    if not isinstance(value, _GeneratorState):
        return value
    value.own.set_state(value.state)
    return value.own


def _changed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Returns the argument tensors that an operation changes in place, according to its schema."""
    arguments = func._schema.arguments
    values = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | dict(kwargs)
    written = [argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write]
    return [leaf for name in written for leaf in tree_leaves(values.get(name)) if isinstance(leaf, Tensor)]
