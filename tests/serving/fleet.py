"""Replicas that come and go on a virtual clock, each with a device that does one thing at a time, and two policies that
say how many there should be: ours and Ray Serve's own, from its package. Both hear once a second what there is to do.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ray.serve.autoscaling_policy import _apply_delay_logic, _core_replica_queue_length_policy
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from stable_audio_serve.serving import scaling

_TURN_S = 0.05
_DECIDE_S, _REPORT_S = 0.1, 1.0  # of Serve's controller, of replicas and callers


@dataclass
class Replica:
    """`queue` holds [number of the request, work left]."""

    ready_at: float
    queue: deque[list[float]] = field(default_factory=deque)
    accepted_s: float = 0.0
    accepted_at: list[tuple[float, float]] = field(default_factory=list)  # (time, accepted_s), once a second
    is_leaving: bool = False

    @property
    def backlog_s(self) -> float:
        return sum(left_s for _, left_s in self.queue)


@dataclass(frozen=True)
class Report:
    """What the policy knows: of the last second's end, but for the replicas there are."""

    now: float
    num_ready: int
    target: int
    backlog_s: float
    arriving: float
    num_requests: Sequence[tuple[float, int]]


class Policy(Protocol):
    def decide(self, report: Report) -> int: ...


class ByWork:
    """Ours."""

    def __init__(self, goal: scaling.Goal, *, load_s: float) -> None:
        self._goal = goal
        self._load_s = load_s
        self._memory = scaling.Memory()

    def decide(self, report: Report) -> int:
        lately = [number for at, number in report.num_requests if at >= report.now - scaling.WINDOW_S]
        seen = scaling.Observed(report.backlog_s, report.arriving, max(lately, default=0), self._load_s)
        replicas, self._memory = scaling.decide(
            self._memory, seen, goal=self._goal, target=report.target, now=report.now
        )
        return replicas


class ByRequests:
    """Ray Serve's."""

    def __init__(self, config: AutoscalingConfig) -> None:
        self._config = config
        self._state: dict[str, object] = {}

    def decide(self, report: Report) -> int:
        context = AutoscalingContext.__new__(AutoscalingContext)
        context.config, context.current_num_replicas = self._config, report.num_ready
        context.target_num_replicas = report.target
        lately = [n for at, n in report.num_requests if at >= report.now - self._config.look_back_period_s]
        context.total_num_requests = sum(lately) / max(1, len(lately))
        wanted, _ = _core_replica_queue_length_policy(context)
        decided, self._state = _apply_delay_logic(
            math.ceil(wanted), report.target, self._config, self._state, _now=report.now
        )
        return decided


@dataclass(frozen=True)
class Played:
    """`latencies_s` of the requests in order of their arrival; `replica_s` counts replicas that load or leave too."""

    latencies_s: list[float]
    replica_s: float

    @property
    def p95_s(self) -> float:
        return sorted(self.latencies_s)[math.ceil(0.95 * len(self.latencies_s)) - 1]


def play(
    requests: Sequence[tuple[float, float]], policy: Policy, *, max_replicas: int, load_s: float, after_s: float
) -> Played:
    """Play (arrival, work) in seconds, from one replica on and until `after_s` behind the last arrival or its end."""
    replicas, waiting = [Replica(0.0)], deque(enumerate(requests))
    ended_at: dict[int, float] = {}
    samples: list[tuple[float, int]] = []
    report, target, replica_s = Report(0.0, 1, 1, 0.0, 0.0, samples), 1, 0.0
    ends_at = requests[-1][0] + after_s
    turn = 0
    while (now := turn * _TURN_S) < ends_at or len(ended_at) < len(requests):
        turn += 1
        while waiting and waiting[0][1][0] <= now:
            number, (_, work_s) = waiting.popleft()
            least = min((r for r in replicas if r.ready_at <= now and not r.is_leaving), key=lambda r: r.backlog_s)
            least.queue.append([number, work_s])
            least.accepted_s += work_s
        for replica in replicas:
            _work(replica, now=now, ended_at=ended_at)
        replicas = [r for r in replicas if r.queue or not r.is_leaving]
        replica_s += _TURN_S * len(replicas) if now < ends_at else 0.0
        ready = [r for r in replicas if r.ready_at <= now and not r.is_leaving]
        if turn % round(_REPORT_S / _TURN_S) == 0:
            samples.append((now, sum(len(r.queue) for r in replicas)))
            for replica in replicas:
                replica.accepted_at.append((now, replica.accepted_s))
            arriving = sum(scaling.rate(replica.accepted_at) for replica in ready)
            report = Report(now, len(ready), target, sum(r.backlog_s for r in ready), arriving, samples)
        if turn % round(_DECIDE_S / _TURN_S) == 0:
            heard = Report(now, len(ready), target, report.backlog_s, report.arriving, samples)
            target = min(max(1, policy.decide(heard)), max_replicas)
            _resize(replicas, target, ready_at=now + load_s)
    return Played([ended_at[number] - at for number, (at, _) in enumerate(requests)], replica_s)


def _work(replica: Replica, *, now: float, ended_at: dict[int, float]) -> None:
    left_s = _TURN_S
    while replica.queue and left_s > 0:
        done_s = min(left_s, replica.queue[0][1])
        replica.queue[0][1] -= done_s
        left_s -= done_s
        if replica.queue[0][1] <= 1e-9:
            ended_at[int(replica.queue.popleft()[0])] = now


def _resize(replicas: list[Replica], target: int, *, ready_at: float) -> None:
    """Start or dismiss replicas, the youngest first, as Serve does with those that are not ready."""
    staying = [replica for replica in replicas if not replica.is_leaving]
    replicas += [Replica(ready_at) for _ in range(target - len(staying))]
    for replica in staying[target:]:
        replica.is_leaving = True
