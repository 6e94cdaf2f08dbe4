"""Dead letters (jobs that failed for good): operators list, retry and delete them, with every kind of database."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.jobs.job import Job, JobUpload
from stable_audio_serve.jobs.store.dead_letters import DeadLetter
from stable_audio_serve.jobs.store.job_store import JobStore
from stable_audio_serve.jobs.store.outbox import Outbox
from stable_audio_serve.jobs.store.tables import EVENTS, JOBS
from tests.jobs.stores import (
    ERROR,
    Wall,
    add,
    claim,
    database,
    dead_letter,
    find,
    lease,
    postgres_with_tables,
    ref,
    result_of,
    store,
    wall,
)
from tests.jobs.stores import contract_store_url as store_url
from tests.parameters import some

__all__ = ["database", "postgres_with_tables", "store", "store_url", "wall"]


def upload(key: str) -> JobUpload:
    return JobUpload(StoredFile(key, "audio/wav", "a.wav", 3, "0" * 64), "init", max_s=1.0)


def make_dead(store: JobStore, number: int) -> None:
    """Add `number` dead letters quickly: one through the store, and copies of it in one SQL statement."""
    dead = dead_letter(store, model="copied")
    columns = [column for column in JOBS.c if column.name not in ("seq", "id")]
    numbers = sa.select(sa.literal(1).label("n")).cte("numbers", recursive=True)
    numbers = numbers.union_all(sa.select(numbers.c.n + 1).where(numbers.c.n < number - 1))
    copies = sa.select(*columns, (sa.literal("copy-") + sa.cast(numbers.c.n, sa.Text)).label("id"))
    copies = copies.select_from(JOBS.join(numbers, sa.true())).where(JOBS.c.id == dead.spec.id)
    with store.database.writing() as connection:
        connection.execute(sa.insert(JOBS).from_select([*(column.name for column in columns), "id"], copies))


class TestPages:
    def test_are_newest_first_and_have_only_dead_letters(self, store: JobStore) -> None:
        add(store)
        store.runners.fail(lease(store), ERROR)
        dead = [dead_letter(store, client=client, id="chosen") for client in ("one", "two", "three")]
        add(store)
        page = store.dead_letters.page()
        assert [letter.job for letter in page] == dead[::-1]
        first, *_ = store.dead_letters.page(limit=1)
        assert [letter.job for letter in store.dead_letters.page(before=first.number)] == dead[1::-1]

    def test_filter_by_model(self, store: JobStore) -> None:
        dead_letter(store, model="other")
        dead = dead_letter(store, model="demo")
        assert [letter.job for letter in store.dead_letters.page(model="demo")] == [dead]
        assert store.dead_letters.page(model="none") == []

    @pytest.mark.parametrize("number", some([200, 10_000], [200]))
    def test_cover_thousands_during_changes(self, store: JobStore, number: int) -> None:
        make_dead(store, number)
        seen: list[int] = []
        page = store.dead_letters.page(limit=number // 20)
        while page:
            seen += [letter.number for letter in page]
            dead_letter(store)  # newer than all others, so it must not appear on the pages that follow
            store.dead_letters.delete([page[0].number, page[-1].number])
            page = store.dead_letters.page(limit=number // 20, before=seen[-1])
        assert seen == sorted(set(seen), reverse=True)
        assert len(seen) == number
        assert len(store.dead_letters.page(limit=2 * number)) == number - 2 * 20 + 20

    def test_dead_letter_is_found_with_its_events(self, store: JobStore) -> None:
        dead = dead_letter(store)
        (letter,) = store.dead_letters.page()
        found = store.dead_letters.find(letter.number)
        assert found is not None
        assert found[0] == DeadLetter(letter.number, dead)
        assert list(found[1]) == list(store.clients.events(dead.spec.ref))
        add(store)
        assert store.dead_letters.find(letter.number + 1) is None


class TestRetries:
    def test_reset_the_attempts(self, store: JobStore, wall: Wall) -> None:
        dead = dead_letter(store, start_within_s=5.0, webhook_url="https://a.example/")
        (letter,) = store.dead_letters.page()
        wall.now += 100
        assert store.dead_letters.retry([letter.number]) == [letter.number]
        retried = find(store, dead)
        assert (retried.state, retried.attempts, retried.error, retried.completed_at) == ("queued", 0, None, None)
        assert not retried.is_dead_letter
        assert store.clients.events(dead.spec.ref)[-1].message == "tried again by an operator"
        assert store.runners.expire() == []
        assert Outbox(store.database).claim(for_s=60) is None  # no webhook is sent, because the job waits again
        again = lease(store)
        assert (again.attempts, again.lease.fence if again.lease else 0) == (1, 2)
        assert store.runners.succeed(again, result_of(again)) is not None
        notice = claim(Outbox(store.database))
        assert (notice.job.state, notice.attempt) == ("succeeded", 1)

    def test_happen_once(self, store: JobStore) -> None:
        dead_letter(store)
        (letter,) = store.dead_letters.page()
        numbers = [letter.number, letter.number, -1, 2**62]
        assert store.dead_letters.retry(numbers) == [letter.number]
        assert store.dead_letters.retry(numbers) == []
        assert store.dead_letters.delete(numbers) == ([], [])
        assert store.operators.counts() == {"queued": 1}

    def test_affect_no_other_job(self, store: JobStore) -> None:
        waiting, failed = add(store), add(store)
        store.clients.cancel(waiting.spec.ref)
        store.runners.fail(lease(store), ERROR)
        before = (find(store, waiting), find(store, failed))
        letters = store.dead_letters
        assert [letters.retry_job(one) for one in (waiting.spec.ref, failed.spec.ref, ref("other"))] == [None] * 3
        assert letters.retry(range(10)) == []
        assert letters.delete(range(10)) == ([], [])
        assert (find(store, waiting), find(store, failed)) == before

    @pytest.mark.parametrize("by_number", [True, False])
    def test_clear_a_requested_cancellation(self, store: JobStore, *, by_number: bool) -> None:
        add(store)
        job = lease(store)
        store.clients.cancel(job.spec.ref)
        store.runners.fail(job, ERROR, is_dead_letter=True)
        (letter,) = store.dead_letters.page()
        if by_number:
            store.dead_letters.retry([letter.number])
        else:
            store.dead_letters.retry_job(job.spec.ref)
        assert lease(store).cancel_requested is False

    def test_of_five_hundred_are_one_transaction(self, store: JobStore) -> None:
        make_dead(store, 500)
        numbers = [letter.number for letter in store.dead_letters.page(limit=500)]
        assert store.dead_letters.retry(numbers) == sorted(numbers)
        assert store.operators.counts() == {"queued": 500}


class TestDeletions:
    def test_leave_only_files_that_others_need(self, store: JobStore) -> None:
        kept = dead_letter(store, upload=upload("uploads/shared"))
        dead: list[Job] = [dead_letter(store, upload=upload(f"uploads/{key}")) for key in ("own", "shared")]
        own, shared = sorted(letter.number for letter in store.dead_letters.page()[:2])
        assert store.dead_letters.delete([shared, own]) == ([own, shared], ["uploads/own"])
        assert [store.clients.get(job.spec.ref) for job in dead] == [None, None]
        assert find(store, kept).is_dead_letter
        with store.database.reading() as connection:
            assert set(connection.execute(sa.select(EVENTS.c.job).distinct()).scalars()) == {own - 1}
