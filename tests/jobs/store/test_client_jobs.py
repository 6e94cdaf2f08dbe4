"""What the job store does for clients (submit, list, read, cancel), with every kind of database."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.core.errors import ConflictError, InvalidRequestError, OverloadedError, QuotaError
from stable_audio_serve.core.settings import JobSettings
from stable_audio_serve.jobs.job import JobSpec, JobUpload
from stable_audio_serve.jobs.store.database import Database
from stable_audio_serve.jobs.store.job_store import JobStore
from tests.jobs.conftest import make_spec
from tests.jobs.stores import (
    RESULT,
    Wall,
    add,
    add_spec,
    database,
    find,
    lease,
    leased_ids,
    open_database,
    postgres_with_tables,
    ref,
    report,
    store,
    submit,
    wall,
)
from tests.jobs.stores import contract_store_url as store_url

__all__ = ["database", "postgres_with_tables", "store", "store_url", "wall"]

ODD_TEXTS = {
    "quotes": "'; DROP TABLE jobs; --",
    "nul": "a\x00b",
    "surrogate": "lone \ud800 surrogate",
    "unicode": "♪ \U0001f3b5 e\u0301",
    "blank": " \n\t",
    "parameters": "%s ? :x $1 {}",
    "empty": "",
}
odd_texts = pytest.mark.parametrize("text", ODD_TEXTS.values(), ids=ODD_TEXTS)


def test_new_job_is_found_only_under_its_contract_and_client(store: JobStore, wall: Wall) -> None:
    job = add(store, contract="fal", client="one")
    assert find(store, job) == job
    assert (job.state, job.stage, job.fraction, job.attempts, job.cancel_requested) == ("queued", "queued", 0, 0, False)
    assert (job.started_at, job.completed_at, job.result, job.error) == (None, None, None, None)
    assert (job.lease, job.eta_s, job.is_dead_letter) == (None, None, False)
    assert job.created_at.timestamp() == wall.now
    assert store.clients.get(ref(job.spec.id, contract="sa3", client="one")) is None
    assert store.clients.get(ref(job.spec.id, contract="fal", client="two")) is None
    assert store.clients.get(ref(job.spec.id, contract="fal")) is None
    assert store.clients.get(ref("other", contract="fal", client="one")) is None


def test_stored_job_keeps_every_field(store: JobStore) -> None:
    upload = JobUpload(StoredFile("uploads/1", "audio/wav", "a b.wav", 12, "ab" * 32), "init", 47.5)
    spec = make_spec(upload=upload, priority="batch", start_within_s=9.5, wire={"a": [1, None]}, client="k" * 16)
    spec = replace(spec, idempotency_key="key", fingerprint="f" * 64, webhook_url="https://a.example/")
    assert find(store, add_spec(store, spec)).spec == spec


@odd_texts
def test_any_text_but_lone_surrogates_survives(store: JobStore, text: str) -> None:
    def spec_of(text: str) -> JobSpec:
        spec = make_spec(id="1" * 32, wire={"text": text, text: 1})
        return replace(spec, request=replace(spec.request, prompt=text, negative_prompt=text))

    assert find(store, add_spec(store, spec_of(text))).spec == spec_of(text.replace("\ud800", "\ufffd"))


def test_any_text_can_be_an_id_in_a_lookup(store: JobStore) -> None:
    for text in ODD_TEXTS.values():
        assert store.clients.get(ref(text)) is None
        assert store.files.find(text) is None
        assert store.clients.cancel(ref(text)) == ("unknown", None)
        assert store.clients.events(ref(text)) == ()
        assert store.clients.list_own("sa3", text).jobs == ()
        assert store.runners.lease(text, lease_s=15, models=[text]) is None
        assert store.runners.renew(text, lease_s=15, refs=[ref(text)]) == []
        assert store.retention.unreferenced([text]) == [text]


@odd_texts
def test_any_text_can_be_an_id_key_or_url(store: JobStore, text: str) -> None:
    spec = make_spec(id=text, client=text, model=text, idempotency_key=text, fingerprint="f", webhook_url=text)
    job = add_spec(store, spec)
    assert not submit(store, spec).is_new
    assert store.clients.get(job.spec.ref) == job
    assert store.clients.get(ref(text, client=text)) == job
    assert store.operators.find_all(text) == [job]
    leased = lease(store, text)
    assert report(store, leased, stage=text, fraction=0.5)
    assert store.runners.succeed(leased, RESULT) is not None


def test_same_id_under_another_contract_or_client_is_another_job(store: JobStore) -> None:
    own = {"id": "same", "contract": "sa3", "client": "one", "id_is_chosen": True}
    jobs = [add(store, **own | other) for other in ({}, {"contract": "aiml"}, {"client": "two"}, {"client": ""})]
    store.clients.cancel(jobs[1].spec.ref)
    assert store.runners.renew("me", lease_s=15, refs=[job.spec.ref for job in jobs]) == []
    first = lease(store)
    assert [held.ref for held in store.runners.renew("me", lease_s=15, refs=[job.spec.ref for job in jobs])] == [
        first.spec.ref
    ]
    store.runners.succeed(first, RESULT)
    assert [find(store, job).state for job in jobs] == ["succeeded", "cancelled", "queued", "queued"]
    assert [job.spec.ref for job in store.operators.find_all("same")] == [job.spec.ref for job in jobs]


def test_only_generated_ids_find_jobs_without_a_client(store: JobStore) -> None:
    add(store, id="1" * 32, client="one", id_is_chosen=True)
    made = add(store, client="one")
    assert store.clients.find_unguessable("sa3", "1" * 32) is None
    assert store.clients.find_unguessable("aiml", made.spec.id) is None
    add(store, id=made.spec.id, client="two", id_is_chosen=True)
    assert store.clients.find_unguessable("sa3", made.spec.id) == made


class TestRepeatedRequests:
    """However often a request with an idempotency key or a chosen id is repeated, it creates only one job."""

    @pytest.mark.parametrize("by", ["id", "key"])
    def test_return_their_first_job_in_any_state(self, store: JobStore, by: str) -> None:
        first = add(store, id="1" * 32, idempotency_key="k", fingerprint="same")
        again = make_spec(fingerprint="same", **{"id": {"id": first.spec.id}, "key": {"idempotency_key": "k"}}[by])
        repeated = submit(store, again)
        assert (repeated.job, repeated.is_new) == (first, False)
        store.clients.cancel(first.spec.ref)
        repeated = submit(store, again)
        assert (repeated.job.state, repeated.is_new) == ("cancelled", False)
        assert store.operators.counts() == {"cancelled": 1}

    @pytest.mark.parametrize(("by", "code"), [("id", "id"), ("key", "Idempotency-Key")])
    def test_with_another_request_are_conflicts(self, store: JobStore, by: str, code: str) -> None:
        add(store, id="1" * 32, idempotency_key="k", fingerprint="one")
        other = make_spec(fingerprint="other", **{"id": {"id": "1" * 32}, "key": {"idempotency_key": "k"}}[by])
        with pytest.raises(ConflictError, match=code) as caught:
            submit(store, other)
        assert caught.value.field == code
        assert store.operators.counts() == {"queued": 1}

    def test_without_a_fingerprint_are_conflicts(self, store: JobStore) -> None:
        spec = make_spec()
        submit(store, spec)
        with pytest.raises(ConflictError):
            submit(store, spec)

    def test_of_another_client_or_contract_are_other_jobs(self, store: JobStore) -> None:
        for contract, client in (("sa3", "one"), ("sa3", "two"), ("fal", "one"), ("sa3", "")):
            add(store, contract=contract, client=client, idempotency_key="k", fingerprint="same")
        assert store.operators.counts() == {"queued": 4}

    def test_are_answered_while_the_queue_is_full(self, database: Database) -> None:
        store = JobStore(database, JobSettings(max_queued=1))
        spec = make_spec(idempotency_key="k", fingerprint="same")
        submit(store, spec)
        assert not submit(store, spec).is_new

    def test_with_the_key_and_id_of_two_jobs_are_conflicts(self, store: JobStore) -> None:
        add(store, id="1" * 32, idempotency_key="a", fingerprint="same")
        add(store, id="2" * 32, idempotency_key="b", fingerprint="same")
        with pytest.raises(ConflictError):
            submit(store, make_spec(id="2" * 32, idempotency_key="a", fingerprint="same"))


class TestRoom:
    """The number of waiting jobs is limited, in total and for each client."""

    def test_jobs_above_the_limit_are_refused(self, database: Database) -> None:
        store = JobStore(database, JobSettings(max_queued=2))
        add(store)
        add(store)
        with pytest.raises(OverloadedError) as caught:
            add(store)
        assert not isinstance(caught.value, QuotaError)
        assert caught.value.retry_after_s
        lease(store)
        add(store)

    def test_jobs_above_the_limit_per_client_are_refused(self, database: Database) -> None:
        store = JobStore(database, JobSettings(max_queued=10, max_queued_per_key=2))
        add(store, client="one")
        add(store, client="one")
        with pytest.raises(QuotaError) as caught:
            add(store, client="one")
        assert caught.value.retry_after_s
        add(store, client="two")

    def test_full_queue_accepts_clients_below_their_share(self, database: Database) -> None:
        store = JobStore(database, JobSettings(max_queued=12))
        for _ in range(12):
            add(store, client="one")
        for _ in range(6):
            add(store, client="two")
        for _ in range(4):
            add(store, client="three")
        for client in ("one", "two", "three"):
            with pytest.raises(OverloadedError) as caught:
                add(store, client=client)
            assert not isinstance(caught.value, QuotaError)
        for _ in range(2):
            add(store, client="four")
        # The queue is twice as long as `max_queued`, so even a new client is refused.
        with pytest.raises(OverloadedError):
            add(store, client="five")
        for _ in range(13):
            lease(store)
        add(store, client="five")
        with pytest.raises(OverloadedError):
            add(store, client="one")

    def test_jobs_without_a_client_have_only_the_common_limit(self, database: Database) -> None:
        store = JobStore(database, JobSettings(max_queued=3, max_queued_per_key=1))
        for _ in range(3):
            add(store, client="")
        with pytest.raises(OverloadedError) as caught:
            add(store, client="")
        assert not isinstance(caught.value, QuotaError)

    def test_refused_job_leaves_no_rows(self, database: Database) -> None:
        store = JobStore(database, JobSettings(max_queued=1))
        add(store)
        spec = make_spec(idempotency_key="k", fingerprint="f")
        with pytest.raises(OverloadedError):
            submit(store, spec)
        assert store.clients.get(spec.ref) is None
        lease(store)
        assert submit(store, spec).is_new


class TestListing:
    """A client lists only its own jobs, newest first, in pages."""

    def test_pages_show_every_own_job_once(self, store: JobStore, wall: Wall) -> None:
        jobs = []
        for _ in range(5):
            jobs.append(add(store, client="one"))
            add(store, client="two")
            add(store, client="one", contract="fal")
            wall.now += 1
        first = store.clients.list_own("sa3", "one", limit=2)
        second = store.clients.list_own("sa3", "one", cursor=first.next_cursor, limit=2)
        add(store, client="one")  # a job added while the pages are read must not appear on them
        third = store.clients.list_own("sa3", "one", cursor=second.next_cursor, limit=2)
        assert [*first.jobs, *second.jobs, *third.jobs] == jobs[::-1]
        assert third.next_cursor is None

    def test_exactly_full_page_is_the_last(self, store: JobStore) -> None:
        for _ in range(2):
            add(store)
        page = store.clients.list_own("sa3", "", limit=2)
        assert (len(page.jobs), page.next_cursor) == (2, None)

    def test_filters_by_state(self, store: JobStore) -> None:
        ended, waiting = add(store), add(store)
        store.clients.cancel(ended.spec.ref)
        assert [job.spec.id for job in store.clients.list_own("sa3", "", state="queued").jobs] == [waiting.spec.id]
        assert [job.spec.id for job in store.clients.list_own("sa3", "", state="cancelled").jobs] == [ended.spec.id]
        assert store.clients.list_own("sa3", "", state="failed").jobs == ()

    def test_unknown_cursor_is_refused(self, store: JobStore) -> None:
        add(store)
        for cursor in ("", "x", "-1", "1", "9" * 30, "1'", "\x00", "０"):
            with pytest.raises(InvalidRequestError, match="cursor") as caught:
                store.clients.list_own("sa3", "", cursor=cursor)
            assert caught.value.field == "cursor"

    def test_cursor_of_another_client_is_refused_like_an_unknown_one(self, store: JobStore) -> None:
        jobs = [add(store, client=client, contract=contract) for client, contract in (("one", "sa3"), ("two", "fal"))]
        messages = []
        for cursor in (*(job.spec.id for job in jobs), "nothing"):
            with pytest.raises(InvalidRequestError) as caught:
                store.clients.list_own("sa3", "two", cursor=cursor)
            messages.append(caught.value.message)
        assert len(set(messages)) == 1

    def test_cursor_reveals_nothing_of_other_clients(self, store: JobStore) -> None:
        for _ in range(30):
            add(store, client="two")
        own = [add(store, client="one", id=f"{number:032x}") for number in (7, 8)]
        assert store.clients.list_own("sa3", "one", limit=1).next_cursor == own[1].spec.id


class TestEvents:
    """A client can read a job's events repeatedly, starting after any event."""

    def test_cover_a_job_from_start_to_end(self, store: JobStore, wall: Wall) -> None:
        add(store)
        job = add(store)
        wall.now += 5
        store.clients.cancel(ref(leased_ids(store, 1)[0]))
        leased = lease(store)
        wall.now += 1
        report(store, leased, stage="generating", fraction=0.5, eta_s=2.5)
        wall.now += 1
        store.runners.succeed(leased, RESULT)
        events = store.clients.events(job.spec.ref)
        assert [(event.stage, event.fraction, event.eta_s) for event in events] == [
            ("queued", 0, None),
            ("started", 0, None),
            ("generating", 0.5, 2.5),
            ("done", 1, None),
        ]
        assert [event.at.timestamp() - job.created_at.timestamp() for event in events] == [0, 5, 6, 7]
        assert [event.message for event in events] == [
            "queued",
            "started",
            None,
            "finished: the generation took 1.50 s",
        ]

    def test_continue_after_any_event(self, store: JobStore) -> None:
        job = add(store)
        leased = lease(store)
        for step in range(4):
            report(store, leased, stage="generating", fraction=step / 4)
            add(store)  # the events of this other job must not appear
        events = store.clients.events(job.spec.ref)
        assert [event.id for event in events] == [1, 2, 3, 4, 5, 6]
        for index, event in enumerate(events):
            assert store.clients.events(job.spec.ref, after=event.id) == events[index + 1 :]

    def test_accept_any_number_to_continue_after(self, store: JobStore) -> None:
        job = add(store)
        for after in (-1, -(2**70), 2**31, 2**63 - 1, 2**63, 10**40):
            assert len(store.clients.events(job.spec.ref, after=after)) == (1 if after < 0 else 0)

    def test_belong_to_one_job(self, store: JobStore) -> None:
        one, other = add(store, contract="fal"), add(store)
        store.clients.cancel(one.spec.ref)
        assert [event.message for event in store.clients.events(other.spec.ref)] == ["queued"]
        assert [event.message for event in store.clients.events(one.spec.ref)] == ["queued", "cancelled"]
        assert store.clients.events(ref(one.spec.id)) == ()
        assert store.clients.events(ref(one.spec.id, contract="fal", client="x")) == ()


class TestCancelling:
    """A cancelled job that is queued ends at once. If it is running, it is only marked, and its runner stops it."""

    def test_waiting_job_ends_at_once(self, store: JobStore) -> None:
        job = add(store)
        outcome, ended = store.clients.cancel(job.spec.ref)
        assert outcome == "removed"
        assert ended is not None
        assert (ended.state, ended.started_at) == ("cancelled", None)
        assert ended.error is not None
        assert ended.error.code == "cancelled"
        assert store.runners.lease("me", lease_s=15) is None
        assert store.clients.cancel(job.spec.ref) == ("already_over", ended)

    def test_running_job_gets_a_cancel_request(self, store: JobStore) -> None:
        job = add(store)
        leased = lease(store)
        assert [held.cancel_requested for held in store.runners.renew("me", lease_s=15, refs=[job.spec.ref])] == [False]
        outcome, cancelling = store.clients.cancel(job.spec.ref)
        assert outcome == "requested"
        assert cancelling is not None
        assert (cancelling.state, cancelling.cancel_requested) == ("running", True)
        assert [held.cancel_requested for held in store.runners.renew("me", lease_s=15, refs=[job.spec.ref])] == [True]
        assert store.clients.cancel(job.spec.ref) == ("requested", cancelling)
        ended = store.runners.stop(leased)
        assert ended is not None
        assert (ended.state, ended.error.code if ended.error else None) == ("cancelled", "cancelled")

    def test_second_cancel_request_adds_no_event(self, store: JobStore) -> None:
        job = add(store)
        lease(store)
        for _ in range(3):
            store.clients.cancel(job.spec.ref)
        messages = [event.message for event in store.clients.events(job.spec.ref)]
        assert messages == ["queued", "started", "cancellation requested"]

    def test_unknown_job_cannot_be_cancelled(self, store: JobStore) -> None:
        add(store, id="one", contract="fal")
        assert store.clients.cancel(ref("one")) == ("unknown", None)


def test_jobs_survive_the_process(store: JobStore, database: Database, store_url: str, wall: Wall) -> None:
    waiting, running = add(store), add(store)
    lease(store)
    database.close()
    again = JobStore(open_database(store_url, wall))
    expected: Any = (find(store, waiting), find(store, running))
    assert (find(again, waiting), find(again, running)) == expected
    again.database.close()
