"""The outbox: notices of ended jobs, to be sent as webhooks, with every kind of database."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from stable_audio_serve.core.ids import ClientId
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.job_store import JobStore
from stable_audio_serve.jobs.store.outbox import Outbox
from tests.jobs.stores import (
    ERROR,
    LEASE_S,
    RESULT,
    Wall,
    add,
    claim,
    database,
    dead_letter,
    find,
    lease,
    postgres_with_tables,
    result_of,
    store,
    wall,
)
from tests.jobs.stores import contract_store_url as store_url

__all__ = ["database", "postgres_with_tables", "store", "store_url", "wall"]


class TestOutbox:
    """A notice stays in the outbox until it is removed: after its delivery, or after the last attempt."""

    def test_notice_is_due_until_it_is_settled(self, store: JobStore, database: Database, wall: Wall) -> None:
        outbox = Outbox(database)
        add(store)
        add(store, webhook_url="https://A.example:99/1")
        for _ in range(2):
            job = lease(store)
            store.runners.succeed(job, result_of(job))
        assert store.runners.outlook("me").webhook_in_s == pytest.approx(0)
        notice = claim(outbox)
        assert (notice.url, notice.host, notice.attempt) == ("https://A.example:99/1", "a.example", 1)
        assert notice.job.state == "succeeded"
        outbox.postpone(notice, delay_s=7)
        assert outbox.claim(for_s=60) is None
        assert store.runners.outlook("me").webhook_in_s == pytest.approx(7)
        wall.now += 7
        notice = claim(outbox)
        assert notice.attempt == 2
        outbox.remove(notice)
        wall.now += 1000
        assert outbox.claim(for_s=60) is None
        assert store.runners.outlook("me").webhook_in_s is None

    def test_claimed_notice_is_hidden_from_others(self, store: JobStore, database: Database, wall: Wall) -> None:
        outbox = Outbox(database)
        add(store, webhook_url="https://a.example/")
        store.runners.fail(lease(store), ERROR)
        claim(outbox)
        assert outbox.claim(for_s=60) is None
        assert store.runners.outlook("me").webhook_in_s == pytest.approx(60)
        wall.now += 60
        assert claim(outbox).attempt == 2

    def test_clock_that_was_set_back_keeps_no_notice(self, store: JobStore, database: Database, wall: Wall) -> None:
        outbox = Outbox(database)
        add(store, webhook_url="https://a.example/")
        store.runners.fail(lease(store), ERROR)
        outbox.postpone(claim(outbox), delay_s=18_000)
        assert not store.runners.outlook("me").is_set_back
        wall.now -= 30 * 86_400
        assert store.runners.outlook("me").is_set_back
        assert store.runners.set_back() == 1
        assert not store.runners.outlook("me").is_set_back
        assert claim(outbox).attempt == 2

    def test_concurrent_claims_get_each_notice_once(self, store: JobStore, database: Database) -> None:
        outbox = Outbox(database)
        for _ in range(12):
            add(store, webhook_url="https://a.example/")
            store.runners.fail(lease(store), ERROR)
        with ThreadPoolExecutor(6) as threads:
            claimed = list(threads.map(lambda _: outbox.claim(for_s=60), range(12)))
        ids = [notice.job.spec.id for notice in claimed if notice is not None]
        while notice := outbox.claim(for_s=60):  # claims what is left: a claim may return None while others hold rows
            ids.append(notice.job.spec.id)
        assert len(ids) == len(set(ids)) == 12

    @pytest.mark.parametrize("end", ["fail", "stop", "cancel", "expire", "reclaim"])
    def test_every_final_state_makes_a_notice(self, store: JobStore, database: Database, wall: Wall, end: str) -> None:
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

    def test_unfinished_job_has_no_notice(self, store: JobStore, database: Database) -> None:
        add(store, webhook_url="https://a.example/")
        store.runners.requeue(lease(store), delay_s=0, attempts=1, message="x")
        assert Outbox(database).claim(for_s=60) is None

    def test_retried_dead_letter_gets_a_new_notice(self, store: JobStore, database: Database) -> None:
        outbox = Outbox(database)
        dead = dead_letter(store, webhook_url="https://a.example/")
        notices = [claim(outbox)]
        for end in (
            lambda job: store.runners.fail(job, ERROR, is_dead_letter=True),
            lambda job: store.runners.succeed(job, RESULT),
        ):
            assert store.dead_letters.retry_job(dead.spec.ref) is not None
            end(lease(store))
            notices.append(claim(outbox))
            outbox.remove(notices[-2])  # removing the older notice must not remove the new one
            outbox.postpone(notices[-1], delay_s=0)
            assert claim(outbox).id == notices[-1].id
        assert notices[0].id == dead.spec.id
        assert len({notice.id for notice in notices}) == 3

    def test_late_settlement_of_an_older_try_is_ignored(self, store: JobStore, database: Database) -> None:
        outbox = Outbox(database)
        add(store, webhook_url="https://a.example/")
        store.runners.fail(lease(store), ERROR)
        notice = claim(outbox)
        outbox.postpone(notice, delay_s=0)
        claim(outbox)
        outbox.remove(notice)
        outbox.postpone(notice, delay_s=1)
        assert store.runners.outlook("me").webhook_in_s == pytest.approx(60)

    def test_oldest_notice_first_skipping_busy_hosts(self, store: JobStore, database: Database, wall: Wall) -> None:
        for host in ("a", "b", "a", "c"):
            add(store, webhook_url=f"https://{host}.example/")
            store.runners.fail(lease(store), ERROR)
            wall.now += 1
        outbox = Outbox(database)
        assert claim(outbox, except_hosts=["a.example"]).host == "b.example"
        assert [claim(outbox).host for _ in range(3)] == ["a.example", "a.example", "c.example"]

    def test_busy_hosts_of_a_client_are_skipped(self, store: JobStore, database: Database, wall: Wall) -> None:
        for client, host in (("a", "x"), ("a", "y"), ("b", "x")):
            add(store, client=ClientId(client), webhook_url=f"https://{host}.example/")
            store.runners.fail(lease(store), ERROR)
            wall.now += 1
        outbox = Outbox(database)
        pairs = [(ClientId("a"), "x.example"), (ClientId("b"), "y.example")]
        claimed = [claim(outbox, except_pairs=pairs) for _ in range(2)]
        assert [(notice.job.spec.client, notice.host) for notice in claimed] == [("a", "y.example"), ("b", "x.example")]
        assert outbox.claim(for_s=60, except_pairs=pairs) is None
