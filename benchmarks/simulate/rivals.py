"""The lock server and the static batches on a virtual clock, over the same device formula as the engine."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import count, groupby

from benchmarks.arrivals import Arrival
from benchmarks.sides.servers import BATCH_WAIT_S, MAX_BATCH
from benchmarks.simulate.devices import DeviceModel
from benchmarks.simulate.requests import Outcome, Shape
from stable_audio_serve.engine.scheduling.call_shapes import round_up

Kind = tuple[int, int, float]

_BUCKET_FRAMES = 64


def run_lock(arrivals: Iterable[Arrival], device: DeviceModel, *, shape: Shape) -> list[Outcome]:
    """One request at a time, first come first served."""
    now = 0.0
    outcomes: list[Outcome] = []
    known: set[str] = set()
    for arrival in arrivals:
        now = max(now, arrival.at_s) + request_ms([arrival], device, shape=shape, known=known) / 1000.0
        outcomes.append(Outcome(arrival, now))
    return outcomes


def run_static(arrivals: Iterable[Arrival], device: DeviceModel, *, shape: Shape) -> list[Outcome]:
    """Batches of like requests: each kind has a queue that waits shortly for company, all kinds share the device."""
    outcomes: list[Outcome] = []
    known: set[str] = set()
    waiting: dict[Kind, deque[Arrival]] = {}
    busy: set[Kind] = set()  # kinds with a batch that forms, waits for the device or runs
    order = count()
    forming: list[tuple[float, int, Kind]] = []  # when the next batch of a kind is complete
    free_at = 0.0
    coming = deque(arrivals)
    while coming or forming:
        if coming and (not forming or coming[0].at_s <= forming[0][0]):
            arrival = coming.popleft()
            kind = _kind(arrival, shape)
            waiting.setdefault(kind, deque()).append(arrival)
            if kind not in busy:
                busy.add(kind)
                heapq.heappush(forming, (arrival.at_s + BATCH_WAIT_S, next(order), kind))
            continue
        now, _, kind = heapq.heappop(forming)
        queue = waiting[kind]
        if not queue:
            busy.discard(kind)
            continue
        batch = [queue.popleft() for _ in range(min(len(queue), MAX_BATCH))]
        free_at = max(free_at, now) + request_ms(batch, device, shape=shape, known=known) / 1000.0
        outcomes += [Outcome(arrival, free_at) for arrival in batch]
        heapq.heappush(forming, (free_at if len(queue) >= MAX_BATCH else free_at + BATCH_WAIT_S, next(order), kind))
    return outcomes


def request_ms(batch: Sequence[Arrival], device: DeviceModel, *, shape: Shape, known: set[str]) -> float:
    """Returns the time of like requests from text to the last window, padded to the longest; `known` prompts grow."""
    works = [shape.work(arrival) for arrival in batch]
    missing = {arrival.prompt for arrival in batch} - known
    known |= missing
    total = device.text_ms(len(missing)) if missing else 0.0
    frames = max(work.frames for work in works)
    total += sum(device.step_ms(len(batch) * branches, frames) for branches in works[0].branches)
    lengths = sorted(length for work in works for length in work.decode_left)
    return total + sum(device.decode_ms(len(list(group)), length) for length, group in groupby(lengths))


def _kind(arrival: Arrival, shape: Shape) -> Kind:
    return round_up(shape.frames(arrival.duration_s), _BUCKET_FRAMES), arrival.steps, arrival.cfg_scale
