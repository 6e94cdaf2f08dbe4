"""Ray Serve's side of scaling on predicted work: what replicas publish, and the policy that the controller calls.

Serve pickles this module by value into its controller, which decides ten times a second: nothing here blocks or raises,
nothing heavy is imported, and what has a thread or a lock is in other modules.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from stable_audio_serve.core.pricing import Prices
from stable_audio_serve.serving import scaling, waiting_board
from stable_audio_serve.serving.kept_models import kept
from stable_audio_serve.serving.metrics import RayMetrics

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

_BACKLOG, _ACCEPTED, _LOAD = "backlog_ms", "accepted_ms", "load_s"
_SHOW_S = 2.0  # between two samples of the metrics
_MEMORY, _PRICES = "stable_audio_memory", "stable_audio_prices"  # in the policy's state, beside Serve's own keys


def replica_stats(*, backlog_ms: float, accepted_ms: float, load_s: float, prices: Prices) -> dict[str, float]:
    """Returns what a replica's `record_autoscaling_stats` returns: predicted device time not spent yet, that of all it
    ever accepted, how long it took to load, and its prices.
    """
    return {_BACKLOG: backlog_ms, _ACCEPTED: accepted_ms, _LOAD: load_s, **prices.to_dict()}


class _Policy:
    """Decides, and where that fails leaves the replicas as they are."""

    def __init__(self) -> None:
        self._has_failed = False

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Returns the replicas to aim at and the state that Serve keeps until the next call."""
        try:
            return self.decide(context)
        except Exception:  # it would end the controller's turn for every model
            if not self._has_failed:
                logging.getLogger("ray.serve").exception("the autoscaling policy failed; replicas stay as they are")
            self._has_failed = True
            return context.target_num_replicas, dict(context.policy_state)

    def decide(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        raise NotImplementedError


class WorkPolicy(_Policy):
    """Replicas of one model by the predicted work of its engines and of jobs that wait, one instance per deployment."""

    def __init__(self, **goal: float) -> None:
        """Serve makes it from JSON, the fields of a `scaling.Goal`."""
        super().__init__()
        self._goal = scaling.Goal(**goal)
        self._metrics: RayMetrics | None = None  # made where it is used
        self._shown_at = float("-inf")

    def decide(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        state = context.policy_state
        prices = _prices(context.raw_metrics) or state.get(_PRICES)
        waiting = waiting_board.read(context.app_name, context.deployment_name, now=context.current_time)
        waiting_ms = prices.of(waiting.size) if prices and waiting else 0.0
        replicas, memory = scaling.decide(
            state.get(_MEMORY, scaling.Memory()),
            _observe(context, waiting_ms=waiting_ms, num_waiting=waiting.num_jobs if waiting else 0.0),
            goal=self._goal,
            target=context.target_num_replicas,
            now=context.current_time,
        )
        self._show(context, waiting_ms=waiting_ms, wanted=memory.wanted[-1][1])
        is_kept = context.deployment_name in kept(context.app_name)
        return max(replicas, int(is_kept)), {**state, _MEMORY: memory, _PRICES: prices}

    def _show(self, context: AutoscalingContext, *, waiting_ms: float, wanted: int) -> None:
        if 0.0 <= context.current_time - self._shown_at < _SHOW_S:
            return
        self._shown_at = context.current_time
        if self._metrics is None:
            self._metrics = RayMetrics(model=context.deployment_name)
        self._metrics.show("waiting_work_ms", waiting_ms)
        self._metrics.show("replicas_wanted", wanted)


class RunnerPolicy(_Policy):
    """Leaves the job runners as many as they are: Serve tells only a policy what replicas say, and the models' policies
    are to know what runners say of jobs that wait.
    """

    def decide(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        _put_up(context)
        return context.target_num_replicas, dict(context.policy_state)


def _observe(context: AutoscalingContext, *, waiting_ms: float, num_waiting: float) -> scaling.Observed:
    """Adds jobs that wait by their work, and by their number, which keeps one replica before any price is known."""
    published = context.raw_metrics
    loads = _last_values(published, _LOAD)
    accepted = [  # Serve keeps as much of them as the window is long
        [(point.timestamp, point.value) for point in (series[0], series[-1])]
        for series in published.get(_ACCEPTED, {}).values()
        if series
    ]
    return scaling.Observed(
        backlog_s=(sum(_last_values(published, _BACKLOG)) + waiting_ms) / 1000.0,
        arriving=sum(map(scaling.rate, accepted)) / 1000.0,
        num_requests=context.total_num_requests + num_waiting,
        load_s=max(loads, default=None),
    )


def _prices(published: Mapping[str, Mapping[Any, Sequence[Any]]]) -> Prices | None:
    """Returns the mean of what replicas ask; None while none says it."""
    found = {field.name: _last_values(published, field.name) for field in fields(Prices)}
    if not all(found.values()):
        return None
    return Prices.from_dict({name: sum(values) / len(values) for name, values in found.items()})


def _put_up(context: AutoscalingContext) -> None:
    """Write the last word of every runner on the board."""
    said: dict[str, dict[str, Any]] = {}
    for name, series_by_replica in context.raw_metrics.items():
        for replica, series in series_by_replica.items():
            if series:
                said.setdefault(str(replica), {})[name] = series[-1]
    words = {
        runner: waiting_board.Word(
            max(point.timestamp for point in points.values()),
            waiting_board.from_stats({name: point.value for name, point in points.items()}),
        )
        for runner, points in said.items()
    }
    waiting_board.write(context.app_name, words, now=context.current_time)


def _last_values(published: Mapping[str, Mapping[Any, Sequence[Any]]], name: str) -> list[float]:
    return [series[-1].value for series in published.get(name, {}).values() if series]
