"""`RayMetrics` with Ray's own metric classes. `tests/served/test_jobs.py` checks what a real server exports."""

from __future__ import annotations

import pytest

from stable_audio_serve.serving.metrics import RayMetrics
from tests.patience import wait_until


def test_every_kind_of_sample_is_accepted_repeatedly() -> None:
    metrics = RayMetrics(model="demo")
    for value in (0.0, 1.0, 2.5):
        metrics.increment("engine_requests", value, outcome="done")
        metrics.gauge("engine_backlog_ms", value)
        metrics.observe("http_request_ms", value, route="/generate")
        metrics.observe("engine_rows_per_step", value)


def test_labels_are_the_declared_ones() -> None:
    metrics = RayMetrics()
    with pytest.raises(ValueError, match="route"):
        metrics.increment("refusals", route="/generate")
    with pytest.raises(ValueError, match="model"):
        metrics.gauge("engine_backlog_ms", 1.0)


def test_a_value_that_ray_refuses_does_not_end_the_export(caplog: pytest.LogCaptureFixture) -> None:
    metrics = RayMetrics()
    metrics.observe("file_encode_ms", "long")  # type: ignore[arg-type]
    wait_until(lambda: "file_encode_ms" in caplog.text)
    metrics.observe("upload_decode_ms", "long")  # type: ignore[arg-type]
    wait_until(lambda: "upload_decode_ms" in caplog.text)
