"""Draining waits for responses that HAProxy is still sending."""

from __future__ import annotations

import socket

import pytest

from stable_audio_serve.serving import draining, ray_internals


def test_responses_in_a_busy_haproxy_may_be_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draining, "_CALL_TIMEOUT_S", 0.1)
    monkeypatch.setattr(ray_internals, "has_haproxy", lambda: True)
    with socket.create_server(("127.0.0.1", 0)) as never_answers:
        port = never_answers.getsockname()[1]
        monkeypatch.setattr(ray_internals, "haproxy_stats_port", lambda: port)
        assert draining.num_in_haproxy("127.0.0.1") == 1
    assert draining.num_in_haproxy("127.0.0.1") == 0  # HAProxy has ended
