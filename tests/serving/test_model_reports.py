"""What replicas said, as a process remembers it."""

from __future__ import annotations

import pytest

from stable_audio_serve.core.operations import ReplicaReport
from stable_audio_serve.core.pricing import Prices
from stable_audio_serve.serving import model_states
from stable_audio_serve.serving.model_states import ReplicaWords, hear, last_prices, reports
from stable_audio_serve.serving.work_ledger import ReplicaWork


@pytest.fixture(autouse=True)
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, which a test sets."""
    time = [50.0]
    monkeypatch.setattr(model_states.time, "monotonic", lambda: time[0])
    monkeypatch.setattr(model_states, "_heard", {})
    monkeypatch.setattr(model_states, "_prices", {})
    return time


def test_tells_how_old_the_words_are_and_forgets_who_is_gone(now: list[float]) -> None:
    words = ReplicaWords("cuda:0", "float16", in_flight=2, rows_per_step=3.5, finished_per_minute=9).to_dict()
    words["backlog_ms"] = 1500.0
    hear("m", {"b": words, "a": {}})
    now[0] += 2
    hear("m", {"b": words, "a": {"said_at": 1.0}})  # the first says nothing new: it hangs
    now[0] += 1
    assert reports("m") == (
        ReplicaReport("a", 1.0),
        ReplicaReport(
            "b", 3.0, "cuda:0", "float16", in_flight=2, backlog_s=1.5, rows_per_step=3.5, finished_per_minute=9
        ),
    )
    hear("m", {"a": {"said_at": 1.0}})
    assert [report.id for report in reports("m")] == ["a"]
    assert reports("never heard of") == ()


def test_the_prices_of_a_model_outlive_its_replicas() -> None:
    prices = Prices(1.0, 2.0, 3.0, 4.0)
    assert last_prices("m") is None
    hear("m", {"a": {"said_at": "of another version"}, "b": ReplicaWork(1.0, 0.0, prices).to_dict()})
    hear("m", {})
    assert last_prices("m") == prices
