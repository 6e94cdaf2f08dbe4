"""What the job store does for job runners, with every kind of database. Only the lease's owner may change a job."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stable_audio_serve.core.generation import Section
from stable_audio_serve.jobs.job import FinishedSection, Job, Lease
from stable_audio_serve.jobs.store.job_store import JobStore
from tests.jobs.stores import (
    ERROR,
    FILE,
    LEASE_S,
    RESULT,
    Wall,
    add,
    database,
    end_in_every_way,
    find,
    lease,
    leased_ids,
    postgres_with_tables,
    report,
    result_of,
    store,
    wall,
)
from tests.jobs.stores import contract_store_url as store_url

__all__ = ["database", "postgres_with_tables", "store", "store_url", "wall"]


class TestOrder:
    """The order in which jobs start: clients take turns, and each client's jobs start in order of arrival."""

    def test_first_come_first_served(self, store: JobStore) -> None:
        jobs = [add(store) for _ in range(3)]  # all three have the same creation time
        assert [store.clients.position(job) for job in jobs] == [0, 1, 2]
        assert leased_ids(store, 3) == [job.spec.id for job in jobs]
        assert store.runners.lease("me", lease_s=15) is None

    def test_interactive_before_batch(self, store: JobStore) -> None:
        jobs = [add(store, priority=priority) for priority in ("batch", "interactive", "batch", "interactive")]
        assert [store.clients.position(job) for job in jobs] == [0, 0, 1, 1]
        assert leased_ids(store, 2) == [jobs[1].spec.id, jobs[3].spec.id]
        assert store.runners.lease("me", lease_s=15) is None
        assert [lease(store, priority="batch").spec.id for _ in range(2)] == [jobs[0].spec.id, jobs[2].spec.id]

    def test_clients_take_turns(self, store: JobStore) -> None:
        jobs = {name: add(store, client=name[0]) for name in ("a1", "a2", "a3", "b1", "b2", "c1")}
        order = ["a1", "b1", "c1", "a2", "b2", "a3"]
        assert {name: store.clients.position(job) for name, job in jobs.items()} == {
            name: n for n, name in enumerate(order)
        }
        assert leased_ids(store, 6) == [jobs[name].spec.id for name in order]

    def test_new_client_is_next_but_not_twice(self, store: JobStore) -> None:
        many = [add(store, client="many") for _ in range(3)]
        lease(store)
        few = add(store, client="few")
        assert store.clients.position(few) == 0
        assert lease(store).spec.id == few.spec.id
        again = add(store, client="few")  # "few" has just had its turn, so this job must wait
        assert store.clients.position(again) == 1
        assert leased_ids(store, 3) == [many[1].spec.id, again.spec.id, many[2].spec.id]

    def test_cancelled_or_requeued_job_costs_its_client_no_turn(self, store: JobStore) -> None:
        first, second, third = (add(store, client="a") for _ in range(3))
        others = [add(store, client="b") for _ in range(3)]
        started = lease(store)
        store.runners.requeue(started, delay_s=0, attempts=1, message="x")
        store.clients.cancel(second.spec.ref)
        assert [store.clients.position(job) for job in (first, third, *others)] == [1, 3, 0, 2, 4]
        assert leased_ids(store, 5) == [job.spec.id for job in (others[0], first, others[1], third, others[2])]

    def test_delayed_job_blocks_no_other(self, store: JobStore, wall: Wall) -> None:
        delayed, own = add(store, client="a"), add(store, client="a")
        other = add(store, client="b")
        store.runners.requeue(lease(store), delay_s=10, attempts=1, message="x")
        assert leased_ids(store, 2) == [other.spec.id, own.spec.id]
        assert store.runners.lease("me", lease_s=15) is None
        wall.now += 10.5
        assert lease(store).spec.id == delayed.spec.id

    def test_clock_that_was_set_back_delays_no_job(self, store: JobStore, wall: Wall) -> None:
        job = add(store)
        wall.now -= 3600.0
        in_s = store.runners.outlook("me").lease_in_s
        assert in_s is not None
        assert in_s <= 0
        store.runners.requeue(lease(store), delay_s=60, attempts=1, message="x")
        assert store.runners.outlook("me").lease_in_s == pytest.approx(60)
        assert store.runners.lease("me", lease_s=15) is None
        wall.now += 60.5
        assert lease(store).spec.id == job.spec.id

    def test_long_delay_is_shortened_but_not_skipped(self, store: JobStore, wall: Wall) -> None:
        job = add(store)
        store.runners.requeue(lease(store), delay_s=5000, attempts=1, message="x")
        assert store.runners.lease("me", lease_s=15) is None
        wall.now += 1000
        assert lease(store).spec.id == job.spec.id

    def test_turns_are_separate_for_every_model(self, store: JobStore) -> None:
        for _ in range(3):
            add(store, client="a", model="m")
        leased_ids(store, 2)
        on_other = add(store, client="a", model="n"), add(store, client="b", model="n")
        assert [store.clients.position(job) for job in on_other] == [0, 1]

    def test_only_jobs_of_the_given_models(self, store: JobStore) -> None:
        a, b, c = add(store, model="a"), add(store, model="b"), add(store, model="c")
        assert [store.clients.position(job) for job in (a, b, c)] == [0, 0, 0]
        assert store.runners.lease("me", lease_s=15, models=["other"]) is None
        assert store.runners.lease("me", lease_s=15, models=[]) is None
        assert lease(store, models=["c", "b"]).spec.id == b.spec.id
        assert lease(store, models=["b", "a", "c"]).spec.id == a.spec.id
        assert lease(store).spec.id == c.spec.id


class TestLeasing:
    """A lease has an owner, an expiry time, and a fence: a number that grows with each lease of the job."""

    def test_records_start_and_attempts(self, store: JobStore, wall: Wall) -> None:
        add(store)
        wall.now += 5
        job = lease(store)
        assert (job.state, job.attempts, job.lease) == ("running", 1, Lease("me", 1))
        assert job.started_at is not None
        assert job.started_at.timestamp() == wall.now
        assert find(store, job) == job

    def test_fences_grow(self, store: JobStore, wall: Wall) -> None:
        add(store)
        fences = []
        for owner in ("a", "a", "b", "a"):
            job = lease(store, owner)
            assert job.lease is not None
            assert job.lease.owner == owner
            fences.append(job.lease.fence)
            store.runners.requeue(job, delay_s=0, attempts=0, message="x")
        assert fences == [1, 2, 3, 4]

    def test_renewal_returns_the_held_jobs(self, store: JobStore, wall: Wall) -> None:
        for _ in range(4):
            add(store)
        mine, ended, cancelled, other = lease(store), lease(store), lease(store), lease(store, "other")
        store.runners.succeed(ended, result_of(ended))
        store.clients.cancel(cancelled.spec.ref)
        refs = [job.spec.ref for job in (mine, ended, cancelled, other)]
        renewed = store.runners.renew("me", lease_s=LEASE_S, refs=refs)
        held = {one.ref: (one.fence, one.cancel_requested) for one in renewed}
        assert held == {mine.spec.ref: (1, False), cancelled.spec.ref: (1, True)}
        assert [one.ref for one in store.runners.renew("other", lease_s=LEASE_S, refs=refs)] == [other.spec.ref]
        assert store.runners.renew("nobody", lease_s=LEASE_S, refs=refs) == []

    def test_lease_unknown_to_its_owner_is_not_renewed(self, store: JobStore, wall: Wall) -> None:
        for _ in range(2):
            add(store)
        known, unknown = lease(store), lease(store)
        wall.now += LEASE_S
        assert [one.ref for one in store.runners.renew("me", lease_s=LEASE_S, refs=[known.spec.ref])] == [
            known.spec.ref
        ]
        assert [job.spec.id for job in store.runners.reclaim(max_attempts=3)] == [unknown.spec.id]

    def test_renewed_lease_lasts_from_its_renewal(self, store: JobStore, wall: Wall) -> None:
        add(store)
        job = lease(store)
        for _ in range(5):
            wall.now += LEASE_S - 1
            assert store.runners.reclaim(max_attempts=3) == []
            store.runners.renew("me", lease_s=LEASE_S, refs=[job.spec.ref])
        wall.now += LEASE_S + 1
        assert [job.spec.id for job in store.runners.reclaim(max_attempts=3)] == [job.spec.id]
        assert store.runners.renew("me", lease_s=LEASE_S, refs=[job.spec.ref]) == []

    def test_expired_lease_is_held_until_it_is_reclaimed(self, store: JobStore, wall: Wall) -> None:
        add(store)
        job = lease(store)
        wall.now += 10 * LEASE_S
        assert len(store.runners.renew("me", lease_s=LEASE_S, refs=[job.spec.ref])) == 1
        assert store.runners.reclaim(max_attempts=3) == []
        assert store.runners.succeed(job, RESULT) is not None


class TestReclaiming:
    """Jobs of a runner that no longer renews its leases are queued again, a limited number of times."""

    def test_lost_job_is_requeued_with_its_place_and_attempts(self, store: JobStore, wall: Wall) -> None:
        first, second = add(store), add(store)
        lease(store, "dead")
        wall.now += LEASE_S + 1
        (back,) = store.runners.reclaim(max_attempts=3)
        assert (back.spec.id, back.state, back.attempts, back.lease) == (first.spec.id, "queued", 1, None)
        assert (back.started_at, back.stage, back.fraction) == (None, "queued", 0)
        again = lease(store)
        assert (again.spec.id, again.attempts, again.lease) == (first.spec.id, 2, Lease("me", 2))
        assert lease(store).spec.id == second.spec.id

    def test_former_holder_can_change_nothing(self, store: JobStore, wall: Wall) -> None:
        add(store)
        stale = lease(store, "frozen")
        wall.now += LEASE_S + 1
        (waiting,) = store.runners.reclaim(max_attempts=3)
        assert end_in_every_way(store, stale) == [None] * 4
        assert not report(store, stale, stage="x", fraction=0.9)
        assert find(store, stale) == waiting
        for owner in ("new", "frozen"):  # even if its owner leases the job again, the old lease stays invalid
            current = lease(store, owner)
            assert end_in_every_way(store, stale) == [None] * 4
            assert not report(store, stale, stage="x", fraction=0.9)
            assert find(store, stale) == current
            store.runners.requeue(current, delay_s=0, attempts=1, message="x")
        assert store.files.find(RESULT.file_id) is None

    def test_job_lost_at_its_last_attempt_is_a_dead_letter(self, store: JobStore, wall: Wall) -> None:
        add(store)
        for attempt in (1, 2):
            assert lease(store).attempts == attempt
            wall.now += LEASE_S + 1
            (job,) = store.runners.reclaim(max_attempts=2)
        assert (job.state, job.is_dead_letter, job.attempts) == ("failed", True, 2)
        assert job.error is not None
        assert job.error.code == "unavailable"
        assert job.completed_at is not None
        assert store.runners.lease("me", lease_s=15) is None

    def test_lost_job_with_a_cancel_request_is_cancelled(self, store: JobStore, wall: Wall) -> None:
        add(store)
        job = lease(store)
        store.clients.cancel(job.spec.ref)
        wall.now += LEASE_S + 1
        (ended,) = store.runners.reclaim(max_attempts=1)
        assert (ended.state, ended.is_dead_letter) == ("cancelled", False)

    def test_lost_runners_before_a_finished_section_do_not_count(self, store: JobStore, wall: Wall) -> None:
        add(store, sections=(Section(1.0),) * 3)
        for number in (1, 2):
            wall.now += LEASE_S
            store.runners.reclaim(max_attempts=2)
            store.sections.add(lease(store), FinishedSection(number, FILE, 44100, 44100, 0.1), fraction=0.1 * number)
        states = []
        for _ in range(2):
            wall.now += LEASE_S
            (job,) = store.runners.reclaim(max_attempts=2)
            states.append((job.state, job.is_dead_letter))
            if not job.is_over:
                lease(store)
        assert states == [("queued", False), ("failed", True)]

    @pytest.mark.parametrize("back_s", [20.0, 3600.0, 1e9])
    def test_clock_that_was_set_back_keeps_no_lease(self, store: JobStore, wall: Wall, back_s: float) -> None:
        """A dead runner's lease ends as long after the step as it would have lasted since its job's start."""
        add(store)
        job = lease(store, "dead")
        wall.now += 4
        assert store.runners.renew("dead", lease_s=LEASE_S, refs=[job.spec.ref])
        assert not store.runners.outlook("me").is_set_back
        wall.now -= back_s
        assert store.runners.outlook("me").is_set_back
        assert store.runners.set_back() == 1
        outlook = store.runners.outlook("me")
        assert not outlook.is_set_back
        assert outlook.reclaim_in_s == pytest.approx(4 + LEASE_S)
        assert store.runners.set_back() == 0
        wall.now += 4 + LEASE_S - 1
        assert not store.runners.reclaim(max_attempts=3)
        wall.now += 2
        assert [other.spec.id for other in store.runners.reclaim(max_attempts=3)] == [job.spec.id]

    @pytest.mark.parametrize("renews_first", [False, True])
    def test_live_runner_keeps_its_lease_when_the_clock_is_set_back(
        self, store: JobStore, wall: Wall, *, renews_first: bool
    ) -> None:
        add(store)
        job = lease(store, "alive")
        wall.now -= 3600
        if renews_first:  # the runner's next renewal came before the correction of the times
            assert store.runners.renew("alive", lease_s=LEASE_S, refs=[job.spec.ref])
        store.runners.set_back()
        wall.now += LEASE_S - 1
        assert not store.runners.reclaim(max_attempts=3)
        assert store.runners.renew("alive", lease_s=LEASE_S, refs=[job.spec.ref])
        assert store.runners.outlook("me").reclaim_in_s == pytest.approx(LEASE_S)
        assert store.runners.succeed(job, result_of(job)) is not None

    def test_many_jobs_are_reclaimed_in_batches(self, store: JobStore, wall: Wall) -> None:
        for _ in range(9):
            add(store)
        jobs = [lease(store) for _ in range(9)]
        for job in jobs[:3]:
            store.clients.cancel(job.spec.ref)
        for job in jobs[3:6]:
            store.runners.requeue(job, delay_s=0, attempts=2, message="x")
            lease(store)
        wall.now += LEASE_S + 1
        states = {job.spec.id: job.state for job in store.runners.reclaim(max_attempts=3)}
        assert [states[job.spec.id] for job in jobs] == ["cancelled"] * 3 + ["failed"] * 3 + ["queued"] * 3


class TestProgress:
    """Only the runner that has a job's lease may report the job's progress."""

    def test_of_the_holder_is_stored(self, store: JobStore) -> None:
        add(store)
        job = lease(store)
        assert report(store, job, stage="generating", fraction=0.5, eta_s=3.5)
        now = find(store, job)
        assert (now.stage, now.fraction, now.eta_s) == ("generating", 0.5, 3.5)
        assert store.clients.events(job.spec.ref)[-1].fraction == 0.5

    def test_of_others_is_refused(self, store: JobStore) -> None:
        add(store)
        job = lease(store)
        for stranger in (replace(job, lease=Lease("other", 1)), replace(job, lease=Lease("me", 2)), with_no_lease(job)):
            assert not report(store, stranger, stage="x", fraction=0.9)
            assert end_in_every_way(store, stranger) == [None] * 4
        assert find(store, job) == job


class TestEnding:
    """The end of a job is final. All changes that it makes in the database are in one transaction."""

    def test_success_keeps_the_result_and_publishes_its_file(self, store: JobStore, wall: Wall) -> None:
        add(store)
        job = lease(store)
        wall.now += 3
        ended = store.runners.succeed(job, RESULT)
        assert ended is not None
        assert ended == find(store, job)
        assert (ended.state, ended.result, ended.error) == ("succeeded", RESULT, None)
        assert (ended.fraction, ended.stage, ended.lease, ended.eta_s) == (1, "done", None, None)
        assert ended.completed_at is not None
        assert ended.completed_at.timestamp() == wall.now
        assert store.files.find(RESULT.file_id) == FILE

    def test_failure_keeps_the_error(self, store: JobStore) -> None:
        add(store)
        ended = store.runners.fail(lease(store), ERROR)
        assert ended is not None
        assert (ended.state, ended.error, ended.result, ended.is_dead_letter) == ("failed", ERROR, None, False)
        assert store.clients.events(ended.spec.ref)[-1].message == ERROR.message

    def test_failure_of_the_server_is_a_dead_letter(self, store: JobStore) -> None:
        add(store)
        ended = store.runners.fail(lease(store), ERROR, is_dead_letter=True)
        assert ended is not None
        assert ended.is_dead_letter

    @pytest.mark.parametrize("end", ["succeed", "fail", "stop"])
    def test_is_final(self, store: JobStore, wall: Wall, end: str) -> None:
        add(store, start_within_s=5.0)
        job = lease(store)
        ended = {
            "succeed": lambda: store.runners.succeed(job, RESULT),
            "fail": lambda: store.runners.fail(job, ERROR),
            "stop": lambda: store.runners.stop(job),
        }[end]()
        wall.now += 10 * LEASE_S
        assert end_in_every_way(store, job) == [None] * 4
        assert store.clients.cancel(job.spec.ref) == ("already_over", ended)
        assert store.runners.lease("me", lease_s=15) is None
        assert (store.runners.reclaim(max_attempts=1), store.runners.expire()) == ([], [])
        assert store.runners.renew("me", lease_s=15, refs=[job.spec.ref]) == []
        assert not report(store, job, stage="x", fraction=0.1)
        assert find(store, job) == ended

    def test_waiting_job_cannot_be_ended(self, store: JobStore) -> None:
        waiting = add(store)
        assert end_in_every_way(store, waiting) == [None] * 4
        assert find(store, waiting) == waiting


class TestRequeueing:
    def test_requeued_job_waits_its_delay_and_keeps_its_place(self, store: JobStore, wall: Wall) -> None:
        first, second = add(store), add(store)
        job = lease(store)
        put_back = store.runners.requeue(job, delay_s=10, attempts=1, message="put back: busy")
        assert put_back is not None
        assert (put_back.state, put_back.attempts, put_back.started_at, put_back.lease) == ("queued", 1, None, None)
        assert store.clients.events(first.spec.ref)[-1].message == "put back: busy"
        assert leased_ids(store, 1) == [second.spec.id]
        assert store.runners.lease("me", lease_s=15) is None
        assert store.runners.outlook("me").lease_in_s == pytest.approx(10)
        wall.now += 10.5
        again = lease(store)
        assert (again.spec.id, again.attempts) == (first.spec.id, 2)

    def test_job_with_a_cancel_request_is_cancelled_instead(self, store: JobStore) -> None:
        add(store)
        job = lease(store)
        store.clients.cancel(job.spec.ref)
        ended = store.runners.requeue(job, delay_s=10, attempts=1, message="x")
        assert ended is not None
        assert (ended.state, ended.error.code if ended.error else None) == ("cancelled", "cancelled")
        assert find(store, job) == ended


class TestStartDeadlines:
    """A job may have a deadline by which it must start."""

    def test_late_job_fails_instead_of_starting(self, store: JobStore, wall: Wall) -> None:
        late, patient = add(store, start_within_s=5.0), add(store, start_within_s=60.0)
        assert store.runners.outlook("me").late_in_s == pytest.approx(5)
        assert store.runners.expire() == []
        wall.now += 5.5
        (ended,) = store.runners.expire()
        assert (ended.spec.id, ended.state, ended.is_dead_letter) == (late.spec.id, "failed", False)
        assert ended.error is not None
        assert ended.error.code == "start_timeout"
        assert leased_ids(store, 1) == [patient.spec.id]

    def test_late_job_is_not_leased_before_it_expires(self, store: JobStore, wall: Wall) -> None:
        add(store, start_within_s=5.0)
        wall.now += 5.5
        assert store.runners.lease("me", lease_s=15) is None

    def test_job_that_started_in_time_is_never_late(self, store: JobStore, wall: Wall) -> None:
        add(store, start_within_s=5.0)
        job = lease(store)
        wall.now += 60
        assert store.runners.expire() == []
        store.runners.requeue(job, delay_s=0, attempts=1, message="x")
        assert store.runners.expire() == []
        lease(store)
        wall.now += 60
        store.runners.reclaim(max_attempts=9)
        assert store.runners.expire() == []
        assert lease(store).attempts == 3

    def test_job_whose_start_did_not_count_can_be_late(self, store: JobStore, wall: Wall) -> None:
        add(store, start_within_s=5.0)
        store.runners.requeue(lease(store), delay_s=0, attempts=0, message="busy")
        wall.now += 6
        assert len(store.runners.expire()) == 1


class TestOutlook:
    """`outlook`, with which a runner polls, finds out with one query whether there is work."""

    def test_idle(self, store: JobStore) -> None:
        outlook = store.runners.outlook("me")
        assert (outlook.num_queued, outlook.num_stops) == (0, 0)
        assert (outlook.lease_in_s, outlook.reclaim_in_s, outlook.late_in_s, outlook.webhook_in_s) == (None,) * 4

    def test_busy(self, store: JobStore, wall: Wall) -> None:
        for _ in range(4):
            add(store, webhook_url="https://a.example/")
        add(store, start_within_s=60)
        job, ended = lease(store), lease(store)
        lease(store, "other")
        store.clients.cancel(job.spec.ref)
        store.runners.succeed(ended, RESULT)
        wall.now += 5
        mine, others = store.runners.outlook("me"), store.runners.outlook("other")
        assert (mine.num_queued, mine.num_stops, others.num_stops) == (2, 1, 0)
        assert mine.lease_in_s == pytest.approx(-5)
        assert mine.reclaim_in_s == pytest.approx(LEASE_S - 5)
        assert mine.late_in_s == pytest.approx(55)
        assert mine.webhook_in_s == pytest.approx(-5)


def with_no_lease(job: Job) -> Job:
    return replace(job, lease=None)
