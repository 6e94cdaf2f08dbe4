"""How many replicas a model's predicted work asks for. Pure arithmetic over what was observed; knows no Ray.

More replicas are asked for when the work in sight takes longer than the target wait, the sooner the longer it takes,
fewer only after fewer were enough for a while. A model that takes long to load is looked at as far ahead as it takes:
its work is taken to rise as it did lately until a replica asked for now is ready.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

WINDOW_S = (
    10.0  # over which arrivals and rises are observed; a rise is observed for as long as loading takes, if longer
)
_LONGEST_S = 120.0  # loading times beyond this are no better foreseen
_USED_SHARE = 0.8  # of a replica's time; with more of it used, requests that come at random wait long
_SAMPLE_S = 1.0  # between two remembered backlogs
_SILENCE_S = 5.0  # after which nothing is known of the time between
_EPSILON = 1e-6  # what is less is what rounding left

Samples = Sequence[tuple[float, float]]  # (time, value), oldest first


@dataclass(frozen=True, slots=True)
class Goal:
    """What an operator wants, in seconds: predicted work per replica, for how long there must be work for twice as many
    before there are more, and for how long fewer must be enough.
    """

    target_wait_s: float
    grow_after_s: float
    shrink_after_s: float


@dataclass(frozen=True, slots=True)
class Observed:
    """A model's work now, in seconds of one replica's device.

    `backlog_s` is accepted or waits in the job store; `arriving` is accepted each second; `num_requests` is the most
    requests at a time lately, wherever they are; `load_s` is how long its replicas took to load, None if none says.
    """

    backlog_s: float = 0.0
    arriving: float = 0.0
    num_requests: float = 0.0
    load_s: float | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """What is kept from one decision to the next.

    `pressure_s` is the time for which more were wanted, times the share by which they were more. `wanted` falls: a
    later, larger number makes earlier ones void.
    """

    load_s: float = 0.0
    backlogs: tuple[tuple[float, float], ...] = ()
    pressure_s: float = 0.0
    wanted: tuple[tuple[float, int], ...] = ()
    decided_at: float = float("-inf")


def decide(memory: Memory, seen: Observed, *, goal: Goal, target: int, now: float) -> tuple[int, Memory]:
    """Returns the number of replicas to aim at, `target` until now, and what to remember. Bounds are the caller's.

    `now` is a time in seconds on any clock, the same for all decisions.
    """
    if not 0.0 <= now - memory.decided_at <= _SILENCE_S:  # nobody asked meanwhile, or the clock was set
        memory = Memory(load_s=memory.load_s, wanted=((now, target),), decided_at=now)
    load_s = memory.load_s if seen.load_s is None else seen.load_s
    memory = replace(memory, load_s=min(load_s, _LONGEST_S))
    memory = replace(memory, backlogs=_remember(memory, seen.backlog_s, now=now))
    want = wanted(memory, seen, goal=goal, target=target, now=now)
    since = tuple((at, number) for at, number in memory.wanted if at > now - goal.shrink_after_s and number > want)
    pressure_s = _pressure_s(memory, want, target=target, now=now)
    is_due = want > target and pressure_s >= goal.grow_after_s - _EPSILON
    pressure_s = 0.0 if is_due else pressure_s
    memory = replace(memory, wanted=(*since, (now, want)), pressure_s=pressure_s, decided_at=now)
    return want if is_due else min(target, memory.wanted[0][1]), memory


def wanted(memory: Memory, seen: Observed, *, goal: Goal, target: int, now: float) -> int:
    """Returns how many replicas the work of this moment asks for, whatever was asked for before."""
    coming_s = seen.backlog_s + rise_s(memory, seen.backlog_s, now=now)
    more = _up(coming_s / goal.target_wait_s)
    # Work that keeps arriving is not there yet, or already done: it keeps replicas, which are enough for it, but asks
    # for no more. Neither are more of any use than there are requests.
    kept = max(_up(seen.backlog_s / goal.target_wait_s), min(_up(seen.arriving / _USED_SHARE), _up(seen.num_requests)))
    is_used = max(seen.backlog_s, seen.num_requests) > _EPSILON
    return max(more, min(kept, target), int(is_used))


def rise_s(memory: Memory, backlog_s: float, *, now: float) -> float:
    """Returns by how much the backlog will rise until a replica asked for now is ready, if it rises as lately."""
    span_s = max(WINDOW_S, memory.load_s)
    before = next((value for at, value in memory.backlogs if at >= now - span_s), backlog_s)
    return max(0.0, backlog_s - before) * memory.load_s / span_s


def rate(samples: Samples) -> float:
    """Returns by how much a count that only grows has grown per second of the window that ends with its last sample."""
    if not samples:
        return 0.0
    last_at, last = samples[-1]
    first_at, first = next(sample for sample in samples if sample[0] >= last_at - WINDOW_S)
    return max(0.0, last - first) / max(last_at - first_at, WINDOW_S)


def _pressure_s(memory: Memory, want: int, *, target: int, now: float) -> float:
    if want <= target:
        return 0.0
    if target == 0:
        return math.inf
    return memory.pressure_s + (want / target - 1.0) * (now - memory.decided_at)


def _remember(memory: Memory, backlog_s: float, *, now: float) -> tuple[tuple[float, float], ...]:
    span_s = max(WINDOW_S, memory.load_s)
    kept = tuple(sample for sample in memory.backlogs if sample[0] >= now - span_s)
    return kept if kept and now - kept[-1][0] < _SAMPLE_S else (*kept, (now, backlog_s))


def _up(number: float) -> int:
    return math.ceil(number - _EPSILON)
