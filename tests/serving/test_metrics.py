"""Ray's metrics take what the code measures; whether they are exported is Ray's business."""

from __future__ import annotations

import pytest

from stable_audio_serve.serving.metrics import RayMetrics


def test_every_kind_of_sample_is_taken_again_and_again() -> None:
    metrics = RayMetrics(model="demo")
    for value in (0.0, 1.0, 2.5):
        metrics.increment("requests", value, outcome="done")
        metrics.gauge("backlog_ms", value)
        metrics.observe("queue_ms", value, route="/generate")
        metrics.observe("rows_per_step", value)


def test_tags_must_stay_the_same() -> None:
    metrics = RayMetrics()
    metrics.increment("refusals", reason="busy")
    with pytest.raises(ValueError, match="reason"):
        metrics.increment("refusals", route="/generate")
