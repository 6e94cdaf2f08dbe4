"""Stores conditioning (prompt embeddings and similar inputs of the network) on the device for all steps of a clip.
Clips of one request with the same prompt share one copy if possible. Device calls find a value by the number of its
memory slot or pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch

from stable_audio_serve.engine.hardware.arena import FrameArena, Pages, SlotArena, write_pages
from stable_audio_serve.engine.hardware.device import Device
from stable_audio_serve.engine.scheduling.memory import FixedMemory
from stable_audio_serve.models.protocol import BranchConditioning, RowConditioning


@dataclass(frozen=True, slots=True)
class HeldBranch:
    """Where the conditioning of one branch (conditional or unconditional) is stored.

    `slots` has the slot number of each constant by name. `pages` has the memory pages of each value that has frames. A
    value whose name is missing is all zeros.
    """

    slots: Mapping[str, int]
    pages: Mapping[str, Pages]


@dataclass(slots=True)
class HeldConditioning:
    """Conditioning that is stored in a `ConditioningArena`. `share` increments its reference count, `free` decrements
    it.
    """

    conditional: HeldBranch
    unconditional: HeldBranch | None
    _arena: ConditioningArena
    _num_users: int = 1

    @property
    def is_freed(self) -> bool:
        """Whether the memory was freed. If so, the value must not be used any more."""
        return self._num_users == 0

    def share(self) -> HeldConditioning:
        """Increment the reference count and return `self`."""
        self._num_users += 1
        return self

    def free(self) -> None:
        """Decrement the reference count. At 0, the memory is freed."""
        self._num_users -= 1
        if self._num_users == 0:
            self._arena.free(self)


@dataclass(slots=True)
class ConditioningArena:
    """The memory of all conditioning of one engine. Each name of a value has its own memory. Used by one thread.

    The memory of a name is allocated on first use and grows when it is full. If `fixed` is given, the memory of all
    names is allocated at once, has a fixed size and never moves.
    """

    device: Device
    fixed: FixedMemory | None = None
    slots: dict[str, SlotArena] = field(default_factory=dict)
    frames: dict[str, FrameArena] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for example in self.fixed.examples if self.fixed else ():
            first = {name: value[:, :1] for name, value in example.by_frame.items()}
            self.hold(RowConditioning(replace(example, by_frame=first), None)).free()

    def hold(self, conditioning: RowConditioning) -> HeldConditioning:
        """Copy the conditional and the unconditional values to the device. A tensor that is in both is copied once."""
        slots: dict[int, int] = {}
        pages: dict[int, Pages] = {}

        def keep(branch: BranchConditioning) -> HeldBranch:
            for name, value in branch.constants.items():
                if id(value) not in slots:
                    if name not in self.slots:
                        self.slots[name] = SlotArena(value, num_slots=self.fixed.slots if self.fixed else None)
                    slots[id(value)] = slot = self.slots[name].put(value)
                    undo.callback(self.slots[name].free, [slot])
            for name, value in branch.by_frame.items():
                if id(value) not in pages:
                    if name not in self.frames:
                        num_pages = self.fixed.frame_pages[name] if self.fixed else None
                        self.frames[name] = FrameArena(
                            len(value), device=value.device, dtype=value.dtype, num_pages=num_pages
                        )
                    pages[id(value)] = own = self.frames[name].take(value.shape[-1])
                    undo.callback(self.frames[name].free, own)
                    table = self.device.upload(torch.tensor(own, dtype=torch.int64))
                    write_pages(self.frames[name].memory, table, values=value)
            return HeldBranch(
                {name: slots[id(value)] for name, value in branch.constants.items()},
                {name: pages[id(value)] for name, value in branch.by_frame.items()},
            )

        other = conditioning.unconditional
        with ExitStack() as undo:  # after an error, nothing stays reserved
            held = HeldConditioning(keep(conditioning.conditional), None if other is None else keep(other), self)
            undo.pop_all()
        return held

    def free(self, held: HeldConditioning) -> None:
        """Free the memory of a value whose reference count is 0."""
        branches = [branch for branch in (held.conditional, held.unconditional) if branch is not None]
        for name, slot in {(name, slot) for branch in branches for name, slot in branch.slots.items()}:
            self.slots[name].free([slot])
        for name, pages in {(name, pages) for branch in branches for name, pages in branch.pages.items()}:
            self.frames[name].free(pages)
