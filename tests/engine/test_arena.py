"""Rows keep their per-frame values in memory pages. A read returns the written values, and zeros after a row's end."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stable_audio_serve.core.clock import SystemClock
from stable_audio_serve.engine.calls import conditioning
from stable_audio_serve.engine.calls.conditioning import ConditioningArena
from stable_audio_serve.engine.hardware.arena import (
    PAGE_FRAMES,
    SCRATCH_PAGE,
    FrameArena,
    HeldFrames,
    SlotArena,
    page_table,
    pages_of,
    read,
    write,
)
from stable_audio_serve.engine.hardware.device import Device
from stable_audio_serve.models.protocol import BranchConditioning, RowConditioning

CHANNELS = 3


def table_of(held: HeldFrames, *, frames: int, num_parts: int) -> Tensor:
    table = page_table([held.parts], frames=frames, num_parts=num_parts)
    return torch.tensor(table, dtype=torch.int32).view(1, num_parts, -1)


@given(
    rows=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 4)), min_size=1, max_size=12),
    dropped=st.sets(st.integers(0, 11)),
    seed=st.integers(0, 100),
)
def test_pages_of_a_row_survive_neighbours_and_growth(
    rows: list[tuple[int, int]], dropped: set[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    arena = FrameArena(CHANNELS, device=torch.device("cpu"))
    held: dict[int, tuple[HeldFrames, Tensor]] = {}

    def keep(index: int, frames: int, num_parts: int) -> None:
        own = HeldFrames.take(arena, frames=frames, num_parts=num_parts)
        values = torch.randn(1, num_parts, CHANNELS, frames, generator=generator)
        write(arena.memory, table_of(own, frames=frames, num_parts=num_parts), values=values)
        held[index] = own, values

    for index, (frames, num_parts) in enumerate(rows):
        keep(index, frames, num_parts)
    for index in dropped & held.keys():
        held.pop(index)[0].free()
        keep(100 + index, *rows[index])
    for own, values in held.values():
        longer, more = own.frames + 70, len(own.parts) + 1
        found = read(arena.memory, table_of(own, frames=longer, num_parts=more), frames=longer)[0]
        assert torch.equal(found[:-1, :, : own.frames], values[0])
        assert not found[:-1, :, own.frames :].any()  # zeros after the row's last frame
        assert not found[-1].any()  # the table has one part more than the row
    in_use = sum(pages_of(own.frames) * len(own.parts) for own, _ in held.values())
    assert len(arena._free) == len(arena.memory) - in_use - (SCRATCH_PAGE + 1)


def test_writes_without_a_page_are_dropped() -> None:
    arena = FrameArena(CHANNELS, device=torch.device("cpu"), num_pages=4)
    nowhere = torch.zeros(1, 2, dtype=torch.int32)
    write(arena.memory, nowhere, values=torch.full((1, CHANNELS, 2 * PAGE_FRAMES), float("nan")))
    assert not read(arena.memory, nowhere, frames=2 * PAGE_FRAMES).any()


def test_memory_of_a_fixed_size_never_moves() -> None:
    arena = FrameArena(CHANNELS, device=torch.device("cpu"), num_pages=2)
    place = arena.memory.data_ptr()
    HeldFrames.take(arena, frames=2 * PAGE_FRAMES, num_parts=1).free()
    held = HeldFrames.take(arena, frames=PAGE_FRAMES, num_parts=2)
    assert set(held.parts[0]).isdisjoint(held.parts[1])
    with pytest.raises(RuntimeError, match="taken"):
        arena.take(1)
    held.free()
    assert len(arena.take(2 * PAGE_FRAMES)) == 2
    assert arena.memory.data_ptr() == place


def test_nothing_stays_reserved_if_not_all_parts_fit() -> None:
    arena = FrameArena(CHANNELS, device=torch.device("cpu"), num_pages=2)
    with pytest.raises(RuntimeError, match="taken"):
        HeldFrames.take(arena, frames=PAGE_FRAMES, num_parts=3)
    assert len(arena.take(2 * PAGE_FRAMES)) == 2


def test_conditioning_that_cannot_be_stored_reserves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = ConditioningArena(Device(torch.device("cpu"), clock=SystemClock()))
    branch = BranchConditioning({"global": torch.ones(3)}, {"mask": torch.ones(2, 65)})
    arena.hold(RowConditioning(branch, branch)).free()
    before = [list(each._free) for each in (*arena.slots.values(), *arena.frames.values())]
    monkeypatch.setattr(conditioning, "write_pages", raise_out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        arena.hold(RowConditioning(branch, None))
    assert [list(each._free) for each in (*arena.slots.values(), *arena.frames.values())] == before


def raise_out_of_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("no room")


def test_slots_of_a_fixed_size_never_move() -> None:
    arena = SlotArena(torch.zeros(3), num_slots=2)
    place = arena.memory.data_ptr()
    first, second = (arena.put(torch.full((3,), value)) for value in (1.0, 2.0))
    with pytest.raises(RuntimeError, match="taken"):
        arena.put(torch.zeros(3))
    arena.free([first])
    assert arena.put(torch.full((3,), 4.0)) == first
    assert arena.memory[[0, first, second], 0].tolist() == [0.0, 4.0, 2.0]
    assert arena.memory.data_ptr() == place


@pytest.mark.parametrize(("frames", "pages"), [(1, 1), (64, 1), (65, 2), (128, 2)])
def test_pages_hold_64_frames(frames: int, pages: int) -> None:
    assert pages_of(frames) == pages
