"""How many replicas a model has: the figures that they publish each second, and the policy that Ray Serve's controller
calls.

There are two reasons for replicas. Work that waits: the predicted seconds of everything accepted, and of jobs that no
runner has started, over the wait that the operator aims at. Work that is done: the busy shares of the replicas, of
which none should be above four fifths, or requests that come at random wait long. Without the second a well used
deployment, which has no backlog, would shrink. Serve's own delays say how long more or fewer must be wanted.

Serve pickles this module by value into its controller, which decides ten times a second: nothing here blocks, and what
has a thread or a lock is in other modules.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from stable_audio_serve.serving.metrics import RayMetrics

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

_USED_SHARE = 0.8
_SHOW_S = 2.0  # between two samples of the metric
_EPSILON = 1e-6  # less than this is left by rounding
_WORK, _BUSY, _WAITING, _KEPT = "work_s", "busy_share", "waiting_s", "is_kept"


def replica_stats(*, work_s: float, busy_share: float, waiting_s: float, is_kept: bool = False) -> dict[str, float]:
    """Returns what a replica's `record_autoscaling_stats` returns: predicted seconds of its accepted work, the share
    of the last second in which its device worked, predicted seconds of the jobs that wait for its model, and whether an
    operator keeps the model loaded.
    """
    return {_WORK: work_s, _BUSY: busy_share, _WAITING: waiting_s, _KEPT: float(is_kept)}


class WorkPolicy:
    """Replicas of one model by its work, one instance per deployment."""

    def __init__(self, *, target_wait_s: float) -> None:
        """Serve makes it from JSON."""
        self._target_wait_s = target_wait_s
        self._metrics: RayMetrics | None = None  # made where it is used
        self._shown_at = float("-inf")
        self._has_failed = False

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Returns the replicas to aim at; where that fails, as many as there are: an error would end the controller's
        turn for every model.
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
        """Serve keeps published figures for `look_back_period_s`; a replica's busiest second in it counts."""
        published = context.raw_metrics or {}
        work = {str(replica): series[-1].value for replica, series in published.get(_WORK, {}).items() if series}
        waiting_s = max((series[-1].value for series in _series(published, _WAITING)), default=0.0)
        busy = sum(max(point.value for point in series) for series in _series(published, _BUSY))
        wanted = max(_up((sum(work.values()) + waiting_s) / self._target_wait_s), _up(busy / _USED_SHARE))
        is_kept = any(series[-1].value for series in _series(published, _KEPT))
        if is_kept or context.total_num_requests > 0:  # also a request that is held because there is no replica
            wanted = max(wanted, 1)
        self._show(context, wanted)
        if any(str(replica) not in work for replica in context.running_replicas):  # it has not published yet
            wanted = max(wanted, context.target_num_replicas)
        return wanted

    def _show(self, context: AutoscalingContext, wanted: int) -> None:
        if 0.0 <= context.current_time - self._shown_at < _SHOW_S:
            return
        self._shown_at = context.current_time
        if self._metrics is None:
            self._metrics = RayMetrics(model=context.deployment_name)
        self._metrics.show("replicas_wanted", wanted)


def _series(published: Any, name: str) -> Iterator[Any]:
    return (series for series in published.get(name, {}).values() if series)


def _up(number: float) -> int:
    return math.ceil(number - _EPSILON)
