"""Autoscaling of models: the statistics that replicas publish, and the policy that Ray Serve's controller runs.

The target number of replicas is the larger of two numbers, rounded up:

- backlog: the predicted device time of accepted requests and of jobs that no runner has started, divided by
  `target_wait_s`
- load: the share of time in which a replica's device was busy, summed over the replicas and divided by 0.8. If devices
  are busy for more than 80 % of the time, requests that arrive at random wait long. Without this number, a busy
  deployment without backlog would lose replicas.

Ray Serve changes the number of replicas when the target has been above this number for `upscale_delay_s`, or below it
for `downscale_delay_s`.

Ray Serve pickles this module by value into its controller, which calls the policy ten times a second. So nothing here
may block, and objects with a thread or a lock must be in other modules.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

_USED_SHARE = 0.8
_EPSILON = 1e-6  # a sum that exceeds a whole number by less than this is not rounded up
_WORK, _BUSY, _WAITING, _KEPT = "work_s", "busy_share", "waiting_s", "is_kept"


def autoscaling_stats(*, work_s: float, busy_share: float, waiting_s: float, is_kept: bool = False) -> dict[str, float]:
    """Return the statistics that a replica publishes for `WorkPolicy`, in the form that Ray Serve requires.

    `work_s` is the predicted device time of the replica's accepted requests. `busy_share` is the share of the last
    second in which the replica's device worked. `waiting_s` is the predicted device time of jobs that wait for the
    replica's model. `is_kept` is true while an operator keeps the model loaded.
    """
    return {_WORK: work_s, _BUSY: busy_share, _WAITING: waiting_s, _KEPT: float(is_kept)}


class WorkPolicy:
    """Computes the target number of replicas of one model from the model's work. Each deployment has one instance."""

    def __init__(self, *, target_wait_s: float) -> None:
        """Called by Ray Serve with the deployment's `policy_kwargs`, which have been converted to JSON and back."""
        self._target_wait_s = target_wait_s
        self._has_failed = False

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return the target number of replicas, and the state that Ray Serve passes to the next call.

        After an error, the target stays as it is. An exception would stop the autoscaling of every model.
        """
        state = dict(context.policy_state or {})
        try:
            return self._decide(context), state
        except Exception:
            if not self._has_failed:
                logging.getLogger("ray.serve").exception("the autoscaling policy failed; replicas stay as they are")
            self._has_failed = True
            return context.target_num_replicas, state

    def _decide(self, context: AutoscalingContext) -> int:
        """Return the target number of replicas.

        `context` has the statistics that the replicas published in the last `look_back_period_s`. For each replica, the
        mean of `busy_share` is used, and the last value of every other statistic. With the highest `busy_share`, each
        replica that had a request in this period would count as busy all the time, and replicas would only be added.
        """
        published = context.raw_metrics or {}
        work = {str(replica): series[-1].value for replica, series in published.get(_WORK, {}).items() if series}
        waiting_s = max((series[-1].value for series in _series(published, _WAITING)), default=0.0)
        busy = sum(sum(point.value for point in series) / len(series) for series in _series(published, _BUSY))
        wanted = max(_ceil((sum(work.values()) + waiting_s) / self._target_wait_s), _ceil(busy / _USED_SHARE))
        is_kept = any(series[-1].value for series in _series(published, _KEPT))
        # `total_num_requests` includes requests that wait until the model's first replica starts.
        if is_kept or context.total_num_requests > 0:
            wanted = max(wanted, 1)
        # The load of a replica that has not published statistics yet is unknown, so the target must not fall.
        if any(str(replica) not in work for replica in context.running_replicas):
            wanted = max(wanted, context.target_num_replicas)
        return wanted


def _series(published: Any, name: str) -> Iterator[Any]:
    return (series for series in published.get(name, {}).values() if series)


def _ceil(number: float) -> int:
    return math.ceil(number - _EPSILON)
