"""A device on the CPU whose second queue works as late as it may: when the host or the first queue waits for it, or
after a number of looks. Until then everything that it was to make or to change is not there. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from stable_audio_serve.core.clock import SystemClock
from stable_audio_serve.core.generation import Mode
from stable_audio_serve.engine.hardware.device import Moment, WaitingDevice
from tests.engine.torch_operations import is_composite


class LateDevice(WaitingDevice):
    """`patience`: how often it is asked in vain whether a point of its second queue is reached; None: always."""

    def __init__(self, *, patience: int | None = None, mode: Mode = "strict") -> None:
        super().__init__(torch.device("cpu"), clock=SystemClock())
        self.has_second_queue = True
        self.default_mode = mode
        self.patience = patience
        self.num_late = 0  # pieces of work that something else happened before
        self._asked: list[_Operations] = []
        self._num_done = 0
        self._is_beside = False

    @contextmanager
    def beside(self, *reads: Tensor) -> Iterator[None]:
        assert not self._is_beside
        self._is_beside = True
        operations = _Operations()
        self._asked.append(operations)
        try:
            with operations:
                yield
        finally:
            self._is_beside = False
            operations.undo()

    def mark(self) -> Moment:
        return _Point(self, len(self._asked) if self._is_beside else 0)

    def follow(self, moment: Moment) -> None:
        assert isinstance(moment, _Point)
        moment.wait()

    def work_up_to(self, count: int) -> None:
        """Do the work of the second queue up to its piece number `count`."""
        while self._num_done < count:
            self._asked[self._num_done].redo()
            self._num_done += 1

    def is_done(self, count: int) -> bool:
        """Whether so many pieces are done."""
        return self._num_done >= count


class _Point:
    def __init__(self, device: LateDevice, count: int) -> None:
        self._device = device
        self._count = count
        self._num_looks = 0

    def is_reached(self) -> bool:
        if self._device.is_done(self._count):
            return True
        self._num_looks += 1
        if self._device.patience is not None and self._num_looks > self._device.patience:
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
    before: Sequence[tuple[Tensor, Tensor]]  # what it changed, and how that was


@dataclass(eq=False)
class _Operations(TorchDispatchMode):
    """Carries operations out, so that their shapes are known, and remembers them: undone, they can be done again."""

    operations: list[_Operation] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(  # as torch calls it
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        changed = _changed(func, args, kwargs)
        before = [(tensor, tensor.clone()) for tensor in changed]
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
        """Put everything back that was changed, and garbage where something was made."""
        for operation in reversed(self.operations):
            for tensor, was in operation.before:
                tensor.copy_(was)
        for operation in self.operations:
            for tensor in operation.made:
                tensor.fill_(float("nan") if tensor.is_floating_point() else 0)

    def redo(self) -> None:
        """Do it for good."""
        for operation in self.operations:
            args, kwargs = tree_map(_open_generator, (operation.args, operation.kwargs))
            results = [leaf for leaf in tree_leaves(operation.run(*args, **kwargs)) if isinstance(leaf, Tensor)]
            if operation.made:
                for tensor, value in zip(operation.made, results, strict=True):
                    tensor.copy_(value)
        self.operations.clear()


@dataclass(frozen=True, slots=True)
class _GeneratorState:
    state: Tensor
    own: torch.Generator


def _keep_generator(value: Any) -> Any:
    return _GeneratorState(value.get_state(), value) if isinstance(value, torch.Generator) else value


def _open_generator(value: Any) -> Any:
    """Returns a generator as it was, or `value`."""
    if not isinstance(value, _GeneratorState):
        return value
    value.own.set_state(value.state)
    return value.own


def _changed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Returns the tensors that an operation writes to."""
    arguments = func._schema.arguments
    values = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | dict(kwargs)
    written = [argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write]
    return [leaf for name in written for leaf in tree_leaves(values.get(name)) if isinstance(leaf, Tensor)]
