"""Ray Serve's side of scaling on predicted work: what replicas publish, and the policy that the controller calls.

Serve pickles this module by value into its controller, which decides ten times a second: nothing here blocks or raises,
nothing heavy is imported, and what has a thread or a lock is in other modules.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stable_audio_serve.serving import scaling
from stable_audio_serve.serving.kept_models import kept

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

_BACKLOG, _ACCEPTED, _LOAD = "backlog_ms", "accepted_ms", "load_s"
_MEMORY = "stable_audio_memory"  # beside Serve's own keys


def replica_stats(*, backlog_ms: float, accepted_ms: float, load_s: float) -> dict[str, float]:
    """Returns what a replica's `record_autoscaling_stats` returns: predicted device time not spent yet, that of all it
    ever accepted, and how long it took to load.
    """
    return {_BACKLOG: backlog_ms, _ACCEPTED: accepted_ms, _LOAD: load_s}


class WorkPolicy:
    """Replicas of one model by the predicted work of its engines, one instance per deployment."""

    def __init__(self, *, target_wait_s: float, shrink_after_s: float) -> None:
        """Serve makes it from JSON."""
        self._goal = scaling.Goal(target_wait_s=target_wait_s, shrink_after_s=shrink_after_s)
        self._has_failed = False

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Returns the replicas to aim at and the state that Serve keeps until the next call."""
        try:
            return self._decide(context)
        except Exception:  # an error would end the controller's turn for every model
            if not self._has_failed:
                logging.getLogger("ray.serve").exception("the autoscaling policy failed; replicas stay as they are")
            self._has_failed = True
            return context.target_num_replicas, dict(context.policy_state)

    def _decide(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        memory = context.policy_state.get(_MEMORY, scaling.Memory())
        replicas, memory = scaling.decide(
            memory,
            _observe(context),
            goal=self._goal,
            target=context.target_num_replicas,
            now=context.current_time,
        )
        is_kept = context.deployment_name in kept(context.app_name)
        return max(replicas, int(is_kept)), {**context.policy_state, _MEMORY: memory}


def _observe(context: AutoscalingContext) -> scaling.Observed:
    published = context.raw_metrics
    loads = _last_values(published.get(_LOAD, {}))
    accepted = [
        [(point.timestamp, point.value) for point in series] for series in published.get(_ACCEPTED, {}).values()
    ]
    return scaling.Observed(
        backlog_s=sum(_last_values(published.get(_BACKLOG, {}))) / 1000.0,
        arriving=sum(map(scaling.rate, accepted)) / 1000.0,
        num_requests=context.total_num_requests,
        load_s=max(loads, default=None),
    )


def _last_values(series_by_replica: Mapping[Any, Sequence[Any]]) -> list[float]:
    return [series[-1].value for series in series_by_replica.values() if series]
