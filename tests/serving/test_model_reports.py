"""How a process records the statistics that model replicas publish, and what it reports about them."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from stable_audio_serve.core.catalog import ModelQuality
from stable_audio_serve.core.operations import ReplicaReport
from stable_audio_serve.core.pricing import Prices
from stable_audio_serve.serving import model_states
from stable_audio_serve.serving.model_states import last_prices, record_stats, reports
from stable_audio_serve.serving.work_ledger import ReplicaWork


@pytest.fixture(autouse=True)
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the clock. Return a list whose only item is the time in seconds. Tests change this item."""
    time = [50.0]
    monkeypatch.setattr(model_states.time, "monotonic", lambda: time[0])
    monkeypatch.setattr(model_states, "_received", {})
    monkeypatch.setattr(model_states, "_prices", {})
    return time


def test_reports_have_an_age_and_dead_replicas_are_dropped(now: list[float]) -> None:
    quality = ModelQuality("passed", "b17e", revision="12")
    own = {"requests": 2, "rows_per_step": 3.5, "requests_per_minute": 9, "start_s": {"load": 1.5}, "quality": quality}
    device = {"device": "cuda:0", "dtype": "float16", "profile": "plain", "memory_bytes": {"weights": 7}}
    stats = device | own | {"quality": asdict(quality), "backlog_ms": 1500.0}
    record_stats("m", {"b": stats, "a": {}})
    now[0] += 2
    record_stats("m", {"b": stats, "a": {"said_at": 1.0}})  # b hangs, so its statistics are the same as before
    now[0] += 1
    assert reports("m") == (
        ReplicaReport("a", 1.0),
        ReplicaReport("b", 3.0, backlog_s=1.5, **device, **own),
    )
    record_stats("m", {"a": {"said_at": 1.0}})
    assert [report.id for report in reports("m")] == ["a"]
    assert reports("unknown") == ()


def test_quality_of_a_replica_with_another_version_is_unknown() -> None:
    record_stats("m", {"a": {"quality": {"gate": "a new word"}}, "b": {"quality": {"gate": "off", "a_new_field": 1}}})
    assert [report.quality for report in reports("m")] == [None, ModelQuality("off")]


def test_the_prices_of_a_model_outlive_its_replicas() -> None:
    prices = Prices(1.0, 2.0, 3.0, 4.0)
    assert last_prices("m") is None
    record_stats("m", {"a": {"said_at": "of another version"}, "b": ReplicaWork(1.0, 0.0, prices).to_dict()})
    record_stats("m", {})
    assert last_prices("m") == prices
