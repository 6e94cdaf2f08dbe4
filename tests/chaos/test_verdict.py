"""The judge finds what it is there to find: a chaos run that passes must mean something."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.killer import Blow, plan_strikes
from tests.chaos.ledger import Entry, Ledger
from tests.chaos.orders import Order, arrival_times, make_orders
from tests.chaos.verdict import JobRow, Verdict, judge
from tests.chaos.webhooks import Notice

ORDER = Order(number=1, kind="keyed", duration_s=1, steps=4, seed=7, key="k" * 32, has_webhook=True, is_repeated=False)
ROW = JobRow("sa3", "job-1", "succeeded", attempts=1, created_at=0.0, completed_at=5.0, key=ORDER.key, artifact="a.wav")
NOTICE = Notice(1, "job-1", "job-1", "job.succeeded", was_refused=False)


def accepted(job: str = "job-1", *, at: float = 0.0) -> Entry:
    return {"at": at, "what": "accepted", "order": 1, "status": 202, "body": json.dumps({"id": job})}


def fetched(job: str = "job-1", *, at: float = 5.0, path: str = "/a", sha256: str = "s") -> Entry:
    return {"at": at, "what": "fetched", "order": 1, "job": job, "path": path, "sha256": [sha256, sha256]}


def judged(*entries: Entry, order: Order = ORDER, **overrides: Any) -> Verdict:
    facts: dict[str, Any] = {
        "notices": [NOTICE],
        "rows": [ROW],
        "visible": ["a.wav"],
        "blows": [],
        "late_after_s": 10.0,
    }
    return judge([order], entries or (accepted(), fetched()), **facts | overrides)


def faults(verdict: Verdict) -> set[str]:
    return {kind for kind, sentences in verdict.faults.items() if sentences}


def test_nothing_is_wrong_with_a_good_run() -> None:
    assert judged().is_clean
    assert judged(accepted(), accepted(), fetched(), fetched(at=99.0)).is_clean


def test_an_accepted_job_without_audio_is_lost() -> None:
    assert faults(judged(accepted())) == {"lost"}
    failed = {"at": 1.0, "what": "failed", "order": 1, "job": "job-1", "error": "no"}
    assert faults(judged(accepted(), failed)) == {"lost", "failed"}


def test_an_acceptance_without_an_id_is_lost() -> None:
    assert "lost" in faults(judged({**accepted(), "body": "<html>"}, accepted(), fetched()))


def test_two_jobs_for_one_key_are_duplicates() -> None:
    second = replace(ROW, id="job-2", key=None, artifact="b.wav")
    entries = (accepted(), accepted("job-2"), fetched(), fetched("job-2"))
    both = {"rows": [ROW, second], "visible": ["a.wav", "b.wav"]}
    assert faults(judged(*entries, notices=[NOTICE, replace(NOTICE, job="job-2")], **both)) == {"duplicated"}
    answer_lost = {"at": 0.0, "what": "unanswered", "order": 1, "why": "ReadError"}
    in_store_only = judged(answer_lost, accepted(), fetched(), **both | {"rows": [ROW, replace(second, key=ORDER.key)]})
    assert faults(in_store_only) == {"duplicated"}


@pytest.mark.parametrize("change", [{"path": "/b"}, {"sha256": "t"}])
def test_a_job_that_shows_two_artifacts_is_a_duplicate(change: dict[str, str]) -> None:
    assert faults(judged(accepted(), fetched(), fetched(**change))) == {"duplicated"}


@pytest.mark.parametrize("visible", [[], ["a.wav", "a.wav"], ["a.wav", "b.wav"]])
def test_what_is_visible_is_exactly_what_succeeded(visible: list[str]) -> None:
    assert faults(judged(visible=visible)) == {"duplicated"}


@pytest.mark.parametrize("other", [replace(NOTICE, webhook_id="x"), replace(NOTICE, outcome="job.failed")])
def test_two_different_notices_are_duplicates(other: Notice) -> None:
    assert judged(notices=[NOTICE, NOTICE]).is_clean
    assert faults(judged(notices=[NOTICE, other])) == {"duplicated"}


def test_an_unsigned_notice_is_wrong() -> None:
    assert faults(judged(notices=[replace(NOTICE, is_genuine=False)])) == {"wrong"}


def test_a_missing_notice_is_a_fault() -> None:
    assert faults(judged(notices=[])) == {"unnotified"}
    assert faults(judged(notices=[replace(NOTICE, was_refused=True)])) == {"unnotified"}
    assert judged(notices=[], order=replace(ORDER, has_webhook=False)).is_clean


def test_what_comes_late_after_the_last_kill_is_late() -> None:
    assert faults(judged(accepted(), fetched(at=11.0))) == {"late"}
    assert judged(accepted(), fetched(at=11.0), blows=[Blow(2.0, "engine")]).is_clean


def test_every_order_must_be_accepted_in_the_end() -> None:
    assert faults(judged({"at": 0.0, "what": "unanswered", "order": 1, "why": "503"})) >= {"refused"}


def test_only_kills_during_a_job_explain_its_attempts() -> None:
    worn = [replace(ROW, attempts=4)]
    during, before = Blow(3.0, "runner"), Blow(-1.0, "runner")
    assert judged(rows=worn, blows=[during, replace(during, target="engine")]).is_clean
    assert faults(judged(rows=worn, blows=[during, before, replace(during, target="ingress")])) == {"worn"}


def test_the_store_must_agree_with_the_ledger() -> None:
    assert "unaccounted" in faults(judged(rows=[]))
    assert "unaccounted" in faults(judged(rows=[replace(ROW, state="running", completed_at=None)]))
    surplus = {"rows": [ROW, replace(ROW, id="job-2", key=None, artifact="b.wav")], "visible": ["a.wav", "b.wav"]}
    assert faults(judged(**surplus)) == {"unaccounted"}
    answer_lost = {"at": 0.0, "what": "unanswered", "order": 1, "why": "ReadError"}
    assert judged(answer_lost, accepted(), fetched(), **surplus).is_clean


def test_the_ledger_is_what_lies_on_the_disk(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    ledger.write("accepted", 3, body="é\n")
    (entry,) = Ledger(tmp_path / "ledger").entries()
    assert (entry["what"], entry["order"], entry["body"]) == ("accepted", 3, "é\n")


def test_a_seed_repeats_orders_and_strikes() -> None:
    assert make_orders(20, seed=1) == make_orders(20, seed=1) != make_orders(20, seed=2)
    assert arrival_times(20, span_s=10.0, seed=1) == arrival_times(20, span_s=10.0, seed=1)
    strikes = plan_strikes(rounds=3, every_s=2.0, seed=1)
    assert strikes == plan_strikes(rounds=3, every_s=2.0, seed=1) != plan_strikes(rounds=3, every_s=2.0, seed=2)
    targets = [strike.target for strike in strikes]
    assert {target: targets.count(target) for target in targets} == {
        **dict.fromkeys(("engine", "runner", "ingress", "controller", "proxy"), 3),
        "database": 1,
    }
    assert [strike.at_s for strike in strikes] == sorted(strike.at_s for strike in strikes)
