"""What operators, the sweeper and the outbox of webhooks do with the job store, on every database."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.jobs.job import Job, JobUpload
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.job_store import JobStore
from stable_audio_serve.jobs.store.outbox import Notice, Outbox
from stable_audio_serve.jobs.store.tables import JOBS
from tests.jobs.stores import (
    ERROR,
    FILE,
    LEASE_S,
    RESULT,
    Wall,
    add,
    database,
    find,
    lease,
    leased_ids,
    postgres_with_tables,
    ref,
    result_of,
    store,
    store_url,
    wall,
)

__all__ = ["database", "postgres_with_tables", "store", "store_url", "wall"]


def upload(key: str) -> JobUpload:
    return JobUpload(StoredFile(key, "audio/wav", "a.wav", 12, "ab" * 32), "init", 47.5)


def dead_letter(store: JobStore, **overrides: object) -> Job:
    add(store, **overrides)
    ended = store.runners.fail(lease(store), ERROR, is_dead_letter=True)
    assert ended is not None
    return ended


class TestOperators:
    """The command line sees everybody's jobs and may try dead letters again."""

    def test_see_all_jobs_newest_first(self, store: JobStore) -> None:
        jobs = [add(store, contract=contract, client=contract) for contract in ("sa3", "fal", "aiml")]
        assert store.operators.list_all() == jobs[::-1]
        assert store.operators.list_all(limit=2) == jobs[:0:-1]
        store.clients.cancel(jobs[1].spec.ref)
        assert [job.spec.id for job in store.operators.list_all(state="cancelled")] == [jobs[1].spec.id]
        assert store.operators.counts() == {"queued": 2, "cancelled": 1}

    def test_see_dead_letters(self, store: JobStore) -> None:
        add(store)
        store.runners.fail(lease(store), ERROR)
        dead = dead_letter(store)
        assert store.operators.list_all(dead_letters=True) == [dead]

    def test_let_a_dead_letter_start_over(self, store: JobStore, wall: Wall) -> None:
        dead = dead_letter(store, start_within_s=5.0, webhook_url="https://a.example/")
        wall.now += 100
        retried = store.operators.retry(dead.spec.ref)
        assert retried == find(store, dead)
        assert (retried.state, retried.attempts, retried.error, retried.completed_at) == ("queued", 0, None, None)
        assert not retried.is_dead_letter
        assert store.runners.expire() == []
        assert Outbox(store.database).claim(for_s=60) is None  # it is not over any more
        again = lease(store)
        assert (again.attempts, again.lease.fence if again.lease else 0) == (1, 2)
        assert store.runners.succeed(again, result_of(again)) is not None
        notice = claim(Outbox(store.database))
        assert (notice.job.state, notice.attempt) == ("succeeded", 1)

    def test_cannot_retry_anything_else(self, store: JobStore) -> None:
        waiting, failed = add(store), add(store)
        store.clients.cancel(waiting.spec.ref)
        store.runners.fail(lease(store), ERROR)
        before = (find(store, waiting), find(store, failed))
        assert [store.operators.retry(one) for one in (waiting.spec.ref, failed.spec.ref, ref("other"))] == [None] * 3
        assert (find(store, waiting), find(store, failed)) == before

    def test_a_retry_forgets_that_it_was_to_be_cancelled(self, store: JobStore) -> None:
        add(store)
        job = lease(store)
        store.clients.cancel(job.spec.ref)
        store.runners.fail(job, ERROR, is_dead_letter=True)
        store.operators.retry(job.spec.ref)
        assert lease(store).cancel_requested is False


def test_a_database_keeps_its_name(store: JobStore, database: Database) -> None:
    names = {store.identity(), store.identity(), JobStore(database).identity()}
    assert [len(name) for name in names] == [32]


def test_a_database_keeps_its_secret_which_is_not_its_name(store: JobStore, database: Database) -> None:
    secrets = {store.secret(), store.secret(), JobStore(database).secret()}
    assert [len(secret) for secret in secrets] == [64]
    assert store.identity() not in secrets.pop()


class TestRetention:
    """What ended long ago is forgotten, in batches, and its files are named for deletion."""

    def test_old_ends_go_and_name_their_files(self, store: JobStore, wall: Wall) -> None:
        old, waiting = add(store, upload=upload("uploads/old")), add(store, upload=upload("uploads/waiting"))
        ended = lease(store)
        store.runners.succeed(ended, result_of(ended))
        wall.now += 100
        young = lease(store)
        store.runners.succeed(young, result_of(young))
        later = add(store)
        wall.now += 50
        assert sorted(store.retention.purge(age_s=120)) == sorted(["uploads/old", result_of(ended).file.key])
        assert store.clients.get(old.spec.ref) is None
        assert store.clients.events(old.spec.ref) == ()
        assert store.files.find(result_of(ended).file_id) is None
        assert find(store, waiting).state == "succeeded"
        assert store.files.find(result_of(young).file_id) is not None
        assert find(store, later).state == "queued"
        assert store.retention.purge(age_s=120) == []

    def test_a_purged_id_may_be_used_again(self, store: JobStore, wall: Wall) -> None:
        job = add(store, id="1" * 32, idempotency_key="k", fingerprint="f")
        store.clients.cancel(job.spec.ref)
        wall.now += 10
        store.retention.purge(age_s=5)
        add(store, id="1" * 32, idempotency_key="k", fingerprint="other")

    def test_batches_are_bounded_and_oldest_first(self, store: JobStore, wall: Wall) -> None:
        jobs = []
        for number in range(5):
            jobs.append(add(store, upload=upload(f"uploads/{number}")))
            store.clients.cancel(jobs[-1].spec.ref)
            wall.now += 1
        wall.now += 100
        batches = [store.retention.purge(age_s=60, limit=2) for _ in range(4)]
        assert [sorted(batch) for batch in batches] == [
            *(["uploads/0", "uploads/1"], ["uploads/2", "uploads/3"], ["uploads/4"], [])
        ]

    def test_jobs_without_files_do_not_hide_that_there_is_more(self, store: JobStore, wall: Wall) -> None:
        for _ in range(3):
            store.clients.cancel(add(store).spec.ref)
        store.clients.cancel(add(store, upload=upload("uploads/last")).spec.ref)
        wall.now += 100
        assert store.retention.purge(age_s=60, limit=1) == ["uploads/last"]
        assert (store.operators.counts(), store.retention.purge(age_s=60, limit=1)) == ({}, [])

    def test_published_files_go_too(self, store: JobStore, wall: Wall) -> None:
        file_id = store.files.publish(FILE)
        wall.now += 100
        young = store.files.publish(replace(FILE, key="young"))
        assert store.retention.purge(age_s=60) == [FILE.key]
        assert store.files.find(file_id) is None
        assert store.files.find(young) is not None

    def test_a_file_somebody_else_still_needs_stays(self, store: JobStore, wall: Wall) -> None:
        store.files.publish(FILE)
        wall.now += 100
        young = store.files.publish(FILE)
        assert store.retention.purge(age_s=60) == []
        assert store.files.find(young) == FILE

    def test_a_retried_dead_letter_stays(self, store: JobStore, wall: Wall) -> None:
        dead = dead_letter(store)
        wall.now += 100
        store.operators.retry(dead.spec.ref)
        assert store.retention.purge(age_s=60) == []
        assert find(store, dead).state == "queued"

    def test_orphans_are_what_nothing_needs(self, store: JobStore) -> None:
        add(store, upload=upload("uploads/ended"))
        job = lease(store)
        store.runners.succeed(job, result_of(job))
        dead_letter(store, upload=upload("uploads/dead"))
        add(store, upload=upload("uploads/running"))
        lease(store)
        add(store, upload=upload("uploads/waiting"))
        store.files.publish(FILE)
        needed = ["uploads/dead", "uploads/running", "uploads/waiting", result_of(job).file.key, FILE.key]
        assert store.retention.unreferenced(["x", *needed, "uploads/ended"]) == ["x", "uploads/ended"]
        assert store.retention.unreferenced([]) == []
        assert len(store.retention.unreferenced([f"many/{number}" for number in range(5_000)])) == 5_000


class TestOutbox:
    """Ends are told until that is settled."""

    def test_an_end_is_due_until_it_is_settled(self, store: JobStore, database: Database, wall: Wall) -> None:
        outbox = Outbox(database)
        add(store)
        add(store, webhook_url="https://A.example:99/1")
        for _ in range(2):
            job = lease(store)
            store.runners.succeed(job, result_of(job))
        assert store.runners.look("me").webhook_in_s == pytest.approx(0)
        notice = claim(outbox)
        assert (notice.url, notice.host, notice.attempt) == ("https://A.example:99/1", "a.example", 1)
        assert notice.job.state == "succeeded"
        outbox.postpone(notice, delay_s=7)
        assert outbox.claim(for_s=60) is None
        assert store.runners.look("me").webhook_in_s == pytest.approx(7)
        wall.now += 7
        notice = claim(outbox)
        assert notice.attempt == 2
        outbox.settle(notice)
        wall.now += 1000
        assert outbox.claim(for_s=60) is None
        assert store.runners.look("me").webhook_in_s is None

    def test_a_claimed_end_is_nobody_else_s_for_a_while(self, store: JobStore, database: Database, wall: Wall) -> None:
        outbox = Outbox(database)
        add(store, webhook_url="https://a.example/")
        store.runners.fail(lease(store), ERROR)
        claim(outbox)
        assert outbox.claim(for_s=60) is None
        assert store.runners.look("me").webhook_in_s == pytest.approx(60)
        wall.now += 60
        assert claim(outbox).attempt == 2

    def test_of_many_who_claim_at_once_each_end_has_one(self, store: JobStore, database: Database) -> None:
        outbox = Outbox(database)
        for _ in range(12):
            add(store, webhook_url="https://a.example/")
            store.runners.fail(lease(store), ERROR)
        with ThreadPoolExecutor(6) as threads:
            claimed = list(threads.map(lambda _: outbox.claim(for_s=60), range(12)))
        ids = [notice.job.spec.id for notice in claimed if notice is not None]
        while notice := outbox.claim(for_s=60):  # PostgreSQL answers None for rows that others look at
            ids.append(notice.job.spec.id)
        assert len(ids) == len(set(ids)) == 12

    @pytest.mark.parametrize("end", ["fail", "stop", "cancel", "expire", "reclaim"])
    def test_every_kind_of_end_is_told(self, store: JobStore, database: Database, wall: Wall, end: str) -> None:
        job = add(store, webhook_url="https://a.example/", start_within_s=1.0)
        match end:
            case "fail":
                store.runners.fail(lease(store), ERROR)
            case "stop":
                store.runners.stop(lease(store))
            case "cancel":
                store.clients.cancel(job.spec.ref)
            case "expire":
                wall.now += 2
                store.runners.expire()
            case "reclaim":
                lease(store)
                wall.now += LEASE_S + 1
                store.runners.reclaim(max_attempts=1)
        assert claim(Outbox(database)).job == find(store, job)

    def test_nothing_is_told_before_the_end(self, store: JobStore, database: Database) -> None:
        add(store, webhook_url="https://a.example/")
        store.runners.requeue(lease(store), delay_s=0, attempts=1, message="x")
        assert Outbox(database).claim(for_s=60) is None

    def test_each_end_of_a_dead_letter_that_was_retried_is_a_notice_of_its_own(
        self, store: JobStore, database: Database
    ) -> None:
        outbox = Outbox(database)
        dead = dead_letter(store, webhook_url="https://a.example/")
        notices = [claim(outbox)]
        for end in (
            lambda job: store.runners.fail(job, ERROR, is_dead_letter=True),
            lambda job: store.runners.succeed(job, RESULT),
        ):
            assert store.operators.retry(dead.spec.ref) is not None
            end(lease(store))
            notices.append(claim(outbox))
            outbox.settle(notices[-2])  # the older one arrived only now
            outbox.postpone(notices[-1], delay_s=0)
            assert claim(outbox).id == notices[-1].id
        assert notices[0].id == dead.spec.id
        assert len({notice.id for notice in notices}) == 3

    def test_a_late_settlement_of_an_older_try_changes_nothing(self, store: JobStore, database: Database) -> None:
        outbox = Outbox(database)
        add(store, webhook_url="https://a.example/")
        store.runners.fail(lease(store), ERROR)
        notice = claim(outbox)
        outbox.postpone(notice, delay_s=0)
        claim(outbox)
        outbox.settle(notice)
        outbox.postpone(notice, delay_s=1)
        assert store.runners.look("me").webhook_in_s == pytest.approx(60)

    def test_oldest_first_and_not_of_hosts_that_have_enough(
        self, store: JobStore, database: Database, wall: Wall
    ) -> None:
        for host in ("a", "b", "a", "c"):
            add(store, webhook_url=f"https://{host}.example/")
            store.runners.fail(lease(store), ERROR)
            wall.now += 1
        outbox = Outbox(database)
        assert claim(outbox, except_hosts=["a.example"]).host == "b.example"
        assert [claim(outbox).host for _ in range(3)] == ["a.example", "a.example", "c.example"]


class TestUnreadableJobs:
    """Another version wrote what this one cannot read: such a job holds up no other one."""

    def spoil(self, store: JobStore, job: Job, **columns: str) -> None:
        with store.database.writing() as connection:
            connection.execute(sa.update(JOBS).where(JOBS.c.id == job.spec.id).values(columns))

    def test_it_is_still_known_by_what_every_version_can_read(self, store: JobStore) -> None:
        job = add(store, client="me", webhook_url="https://a.example/")
        self.spoil(store, job, spec='{"prompt": "rain"}')
        now = find(store, job)
        assert (now.is_readable, now.state, now.created_at) == (False, "queued", job.created_at)
        assert (now.spec.id, now.spec.model, now.spec.client) == (job.spec.id, job.spec.model, "me")
        assert now.spec.webhook_url == "https://a.example/"

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"id": 7}'])
    def test_everybody_else_goes_on(self, store: JobStore, wall: Wall, text: str) -> None:
        bad, good = (add(store, client="me", webhook_url="https://a.example/") for _ in range(2))
        self.spoil(store, bad, spec=text, error=text)
        assert [job.spec.id for job in store.clients.list_own("sa3", "me").jobs] == [good.spec.id, bad.spec.id]
        assert len(store.operators.list_all()) == 2
        assert leased_ids(store, 2) == [bad.spec.id, good.spec.id]
        wall.now += LEASE_S
        assert [job.state for job in store.runners.reclaim(max_attempts=1)] == ["failed", "failed"]
        assert [claim(Outbox(store.database)).job.is_readable for _ in range(2)] == [False, True]
        assert store.operators.retry(bad.spec.ref) is not None
        assert store.clients.cancel(bad.spec.ref)[0] == "removed"

    def test_a_result_that_cannot_be_read_is_none(self, store: JobStore) -> None:
        add(store)
        job = lease(store)
        assert store.runners.succeed(job, RESULT) is not None
        self.spoil(store, job, result='{"file": 7}')
        assert (find(store, job).state, find(store, job).result) == ("succeeded", None)


def claim(outbox: Outbox, **options: Any) -> Notice:
    notice = outbox.claim(for_s=60, **options)
    assert notice is not None
    return notice
