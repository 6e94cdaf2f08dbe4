"""Copies from the device to the host go through a ring buffer of pinned memory and arrive complete."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from stable_audio_serve.engine.hardware.device import DownloadRing


class SlowCopies:
    """A queue of postponed copies. They are done, in order, when something waits for them."""

    def __init__(self) -> None:
        self.pending: deque[Callable[[], object]] = deque()
        self.num_done = 0
        self.num_waits = 0

    def point(self) -> SlowPoint:
        return SlowPoint(self, self.num_done + len(self.pending))

    def work_up_to(self, count: int) -> None:
        while self.num_done < count:
            self.pending.popleft()()
            self.num_done += 1


class SlowPoint:
    def __init__(self, copies: SlowCopies, count: int) -> None:
        self._copies = copies
        self._count = count

    def is_reached(self) -> bool:
        return self._copies.num_done >= self._count

    def wait(self) -> None:
        self._copies.num_waits += 1
        self._copies.work_up_to(self._count)


class Postponed(TorchDispatchMode):
    """Within this context, every asynchronous copy is added to `copies` instead of being made."""

    def __init__(self, copies: SlowCopies) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._copies = copies

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket is torch.ops.aten.copy_ and (len(args) > 2 and args[2]):
            self._copies.pending.append(lambda: args[0].copy_(args[1]))
            return args[0]
        return func(*args, **(kwargs or {}))


def make_ring(copies: SlowCopies, *, num_bytes: int) -> DownloadRing:
    return DownloadRing(lambda count: torch.zeros(count, dtype=torch.uint8), mark=copies.point, num_bytes=num_bytes)


@given(
    sizes=st.lists(st.integers(0, 300), max_size=30),
    num_bytes=st.sampled_from([256, 1024, 4096]),
    every=st.integers(1, 9),
)
def test_copies_of_any_size_and_delay_arrive(sizes: list[int], num_bytes: int, every: int) -> None:
    copies = SlowCopies()
    ring = make_ring(copies, num_bytes=num_bytes)
    sources = [torch.rand(size) for size in sizes]
    targets = [torch.zeros(size) for size in sizes]
    for index, (source, target) in enumerate(zip(sources, targets, strict=True)):
        with Postponed(copies):
            ring.add(source, target)
        if index % every == 0:
            copies.work_up_to(copies.num_done + min(1, len(copies.pending)))
            ring.collect()
    copies.work_up_to(copies.num_done + len(copies.pending))
    ring.collect()
    for source, target in zip(sources, targets, strict=True):
        torch.testing.assert_close(target, source, rtol=0, atol=0)


@pytest.mark.parametrize(("count", "num_waits"), [(4, 0), (5, 1), (9, 5)])
def test_a_full_ring_waits_for_its_oldest_copy(count: int, num_waits: int) -> None:
    copies = SlowCopies()
    ring = make_ring(copies, num_bytes=1024)
    with Postponed(copies):
        for _ in range(count):
            ring.add(torch.rand(64), torch.zeros(64))  # each copy takes a quarter of the ring
    assert copies.num_waits == num_waits


def test_collect_moves_only_finished_copies() -> None:
    copies = SlowCopies()
    ring = make_ring(copies, num_bytes=1024)
    target = torch.zeros(4)
    with Postponed(copies):
        ring.add(torch.ones(4), target)
    ring.collect()
    assert target.tolist() == [0.0] * 4
    copies.work_up_to(1)
    ring.collect()
    assert target.tolist() == [1.0] * 4
