"""What the replicas of models said last, as the routers of this process heard it. Knows neither Ray nor torch.

Serve's controller asks replicas every second and tells all routers; so whoever looks here costs the replicas nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stable_audio_serve.core.operations import ReplicaReport
from stable_audio_serve.core.pricing import Prices
from stable_audio_serve.serving.work_ledger import ReplicaWork


@dataclass(frozen=True, slots=True)
class ReplicaWords:
    """What a replica publishes for operators beside its work."""

    device: str
    dtype: str
    in_flight: int
    rows_per_step: float | None
    finished_per_minute: int

    def to_dict(self) -> dict[str, Any]:
        """Returns what crosses Serve's controller."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class _Heard:
    at: float
    words: Mapping[str, Any]


_heard: dict[str, dict[str, _Heard]] = {}
_prices: dict[str, Prices] = {}
_lock = threading.Lock()


def hear(model: str, words: Mapping[str, Mapping[str, Any]]) -> None:
    """Note which replicas a model has and what each said last. Others are forgotten."""
    now = time.monotonic()
    works = map(ReplicaWork.from_dict, words.values())
    work = next(filter(None, works), None)
    with _lock:
        if work is not None:
            _prices[model] = work.prices
        known = _heard.get(model, {})
        _heard[model] = {
            name: known[name] if name in known and known[name].words == word else _Heard(now, word)
            for name, word in words.items()
        }


def last_prices(model: str) -> Prices | None:
    """Returns what a replica of a model asked last, though there may be none any more; None before one has said it."""
    return _prices.get(model)


def reports(model: str) -> tuple[ReplicaReport, ...]:
    """Returns what is known of each replica of a model, in order of their names."""
    now = time.monotonic()
    with _lock:
        heard = sorted(_heard.get(model, {}).items())
    return tuple(_report(name, one.words, age_s=now - one.at) for name, one in heard)


def _report(name: str, words: Mapping[str, Any], *, age_s: float) -> ReplicaReport:
    """What another version says differently is not known."""
    backlog_ms, rows = words.get("backlog_ms"), words.get("rows_per_step")
    return ReplicaReport(
        name,
        age_s,
        device=words.get("device"),
        dtype=words.get("dtype"),
        in_flight=words.get("in_flight"),
        backlog_s=None if backlog_ms is None else float(backlog_ms) / 1000.0,
        rows_per_step=None if rows is None else float(rows),
        finished_per_minute=words.get("finished_per_minute"),
    )
