"""How much work the engine accepts before it refuses requests, and the retry times of refused clients."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stable_audio_serve.core.errors import OverloadedError
from stable_audio_serve.engine.admission import Admission
from tests.factories import FakeClock


def test_admission_refuses_above_the_bound_with_a_retry_time() -> None:
    admission = Admission(max_queue_s=10.0)
    admission.admit(1, 4_000.0)
    admission.admit(2, 9_000.0)
    with pytest.raises(OverloadedError) as refusal:
        admission.admit(3, 1.0)
    assert refusal.value.retry_after_s == pytest.approx(3.0)
    admission.update(2, 5_000.0)
    admission.admit(3, 1.0)
    assert admission.backlog_ms == pytest.approx(9_001.0)


def test_one_client_leaves_room_for_clients_with_less_work() -> None:
    admission = Admission(max_queue_s=20.0)
    for number in range(3):
        admission.admit(number, 5_000.0, client="greedy")
    with pytest.raises(OverloadedError) as refusal:
        admission.admit(3, 5_000.0, client="greedy")  # one client may use 15 of the 20 s
    assert refusal.value.retry_after_s == pytest.approx(5.0)
    for number in range(10, 20):
        admission.admit(number, 1_000.0, client=f"other {number}")
        admission.release(number, is_done=True)
    admission.release(0, is_done=True)
    admission.admit(3, 5_000.0, client="greedy")


def test_a_refusal_says_when_such_a_request_is_accepted() -> None:
    admission = Admission(max_queue_s=120.0)
    admission.admit(1, 60_000.0, client="a")
    with pytest.raises(OverloadedError) as refusal:
        admission.admit(2, 40_000.0, client="a")  # one client may use 90 of the 120 s
    assert refusal.value.full_for_s == pytest.approx(10.0)
    admission.admit(3, 30_000.0, client="a")
    admission.update(1, 20_000.0)
    admission.admit(4, 40_000.0, client="a")


def test_a_request_longer_than_the_queue_does_not_block_others() -> None:
    admission = Admission(max_queue_s=20.0)
    admission.admit(1, 500_000.0, client="greedy")
    with pytest.raises(OverloadedError):
        admission.check(client="greedy")
    admission.check(client="other")
    admission.admit(2, 1_000.0, client="other")
    admission.admit(3, 1_000.0, client="other")


def test_many_equal_clients_cannot_exceed_the_queue() -> None:
    admission = Admission(max_queue_s=20.0)
    for number in range(21):  # the last request is accepted, because the 20 s ahead of it do not exceed the bound
        admission.admit(number, 1_000.0, client=f"client {number}")
    with pytest.raises(OverloadedError) as refusal:
        admission.admit(21, 1_000.0, client="client 21")
    assert refusal.value.message.startswith("the model's queue is full")


def test_a_new_client_finds_room_while_two_greedy_ones_fill_the_queue() -> None:
    admission = Admission(max_queue_s=20.0)
    for number in range(20):
        with suppress(OverloadedError):
            admission.admit(number, 5_000.0, client=f"greedy {number % 2}")
    assert admission.backlog_ms >= 20_000.0
    for number in range(20, 24):
        admission.admit(number, 1_000.0, client="other")
        admission.release(number, is_done=True)


def test_jobs_and_requests_of_one_client_count_together_for_its_jobs() -> None:
    admission = Admission(max_queue_s=20.0)
    admission.admit(1, 14_000.0, client="greedy")
    with pytest.raises(OverloadedError) as refusal:
        admission.admit(2, 5_000.0, priority="batch", client="greedy")
    assert refusal.value.message.startswith("this client's share")
    admission.admit(3, 5_000.0, priority="batch", client="other")
    admission.admit(4, 1_000.0, client="greedy")  # the client's batch work does not count


def test_idle_engine_admits_work_of_any_size() -> None:
    admission = Admission(max_queue_s=0.0)
    admission.admit(1, 1e9)
    with pytest.raises(OverloadedError):
        admission.check()
    admission.release(1)
    admission.check()


@pytest.mark.parametrize("pace", [0.7, 1.0, 1.4])
def test_bound_and_retry_after_follow_the_measured_pace(pace: float) -> None:
    """Requests take `pace` times the predicted 100 ms. After a minute, the queue must hold 2 s of such requests."""
    clock = FakeClock()
    admission = Admission(max_queue_s=2.0, clock=clock)
    waiting: list[int] = []
    number, advice_s = 0, 0.0
    for _ in range(600):
        try:
            while True:
                admission.admit(number, 100.0)
                waiting.append(number)
                number += 1
        except OverloadedError as refusal:
            advice_s = refusal.retry_after_s or 0.0
        for left_ms in (75.0, 50.0, 25.0):
            clock.now += 0.025 * pace
            admission.update(waiting[0], left_ms)
        clock.now += 0.025 * pace
        admission.release(waiting.pop(0), is_done=True)
    assert len(waiting) * 0.1 * pace == pytest.approx(2.0, abs=0.15 * pace)
    assert advice_s <= max(0.1, 0.1 * pace) * 1.05


def test_retry_times_of_one_client_are_spaced_by_its_requests() -> None:
    clock = FakeClock()
    admission = Admission(max_queue_s=10.0, clock=clock)
    admission.admit(0, 12_000.0, client="full")

    def wait_s(client: str) -> float:
        with pytest.raises(OverloadedError) as refusal:
            admission.admit(1, 3_000.0, client=client)
        return refusal.value.retry_after_s or 0.0

    first_s = wait_s("full")
    assert [wait_s("full") for _ in range(3)] == pytest.approx([first_s + 3.0, first_s + 6.0, first_s + 9.0])
    clock.now += 11.0
    assert wait_s("full") == pytest.approx(first_s + 1.0)


def test_a_client_that_ignores_retry_after_delays_only_itself() -> None:
    admission = Admission(max_queue_s=10.0, clock=FakeClock())
    for number in range(20):
        with suppress(OverloadedError):
            admission.admit(number, 1_000.0, client=f"client {number}")
    waits = {}
    for client, tries in (("first", 1), ("hammering", 500), ("last", 1)):
        for _ in range(tries):
            with pytest.raises(OverloadedError) as refusal:
                admission.admit(99, 1_000.0, client=client)
        waits[client] = refusal.value.retry_after_s or 0.0
    # Each of the two clients that were refused earlier has one request of 1 s ahead of "last".
    assert waits["last"] == pytest.approx(waits["first"] + 2.0)
    assert waits["hammering"] > 400.0


def test_retry_times_of_different_clients_are_spaced() -> None:
    admission = Admission(max_queue_s=10.0, clock=FakeClock())
    for number in range(20):
        with suppress(OverloadedError):
            admission.admit(number, 1_000.0, client=f"client {number}")
    waits = []
    for number in range(20, 24):
        with pytest.raises(OverloadedError) as refusal:
            admission.admit(number, 3_000.0, client=f"client {number}")
        waits.append(refusal.value.retry_after_s or 0.0)
    assert waits == pytest.approx([waits[0] + 3.0 * number for number in range(4)])


def test_a_few_requests_do_not_change_the_pace() -> None:
    clock = FakeClock()
    admission = Admission(max_queue_s=2.0, clock=clock)
    for number in range(60):  # each request takes three times as long as predicted
        admission.admit(number, 1_900.0)
        clock.now += 6.0
        admission.release(number, is_done=True)
    admission.admit(0, 1_999.0)
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
