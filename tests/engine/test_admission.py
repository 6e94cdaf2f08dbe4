"""The bound on accepted work, and when refused callers may return."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stable_audio_serve.core.errors import OverloadedError
from stable_audio_serve.engine.admission import Admission


def test_admission_refuses_above_the_bound_and_says_when_to_return() -> None:
    admission = Admission(max_queue_s=10.0)
    admission.admit(1, 4_000.0)
    admission.admit(2, 9_000.0)
    with pytest.raises(OverloadedError) as refusal:
        admission.admit(3, 1.0)
    assert refusal.value.retry_after_s == pytest.approx(3.0)
    admission.update(2, 5_000.0)
    admission.admit(3, 1.0)
    assert admission.backlog_ms == pytest.approx(9_001.0)


def test_idle_engine_admits_work_of_any_size() -> None:
    admission = Admission(max_queue_s=0.0)
    admission.admit(1, 1e9)
    with pytest.raises(OverloadedError):
        admission.check()
    admission.release(1)
    admission.check()


@given(
    st.lists(
        st.tuples(st.sampled_from(["admit", "update", "release"]), st.integers(0, 5), st.floats(0, 5_000)), max_size=60
    )
)
def test_backlog_never_exceeds_the_bound_by_more_than_one_request(events: list[tuple[str, int, float]]) -> None:
    admission, admitted = Admission(max_queue_s=3.0), dict[int, float]()
    for event, request_id, work_ms in events:
        if event == "release":
            admission.release(request_id)
            admitted.pop(request_id, None)
        elif event == "update" and request_id in admitted:
            admitted[request_id] = min(work_ms, admitted[request_id])
            admission.update(request_id, admitted[request_id])
        elif event == "admit" and request_id not in admitted:
            if sum(admitted.values()) > 3_000.0:
                with pytest.raises(OverloadedError):
                    admission.admit(request_id, work_ms)
            else:
                admission.admit(request_id, work_ms)
                admitted[request_id] = work_ms
        assert admission.backlog_ms == pytest.approx(sum(admitted.values()))
        assert admission.backlog_ms <= 3_000.0 + 5_000.0
