"""Find the faults of a chaos run from the client's ledger, the webhooks, the jobs in the database, and the kills.

An accepted job is lost if it has no valid audio at the end. It is late if it ends too long after its acceptance and
after the last kill. Two jobs with the same idempotency key are duplicates. So are two different files, or two different
webhooks, of one job.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.chaos import dialects
from tests.chaos.killer import Kill
from tests.chaos.ledger import Entry
from tests.chaos.orders import Order
from tests.chaos.webhooks import Notice

# Targets whose kill can end an attempt of a running job.
_COSTLY = ("engine", "runner", "database")
_SPARE_ATTEMPTS = 1  # allowed without a kill, for an object store error, or a runner too busy to renew its lease


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job as read from the database. Times are Unix seconds."""

    contract: str
    id: str
    state: str
    attempts: int
    created_at: float
    completed_at: float | None
    key: str | None = None
    artifact: str | None = None  # key of the published file


@dataclass
class Verdict:
    """The result of a chaos run. `faults` has a sentence for each fault, `orders` the numbers of orders with faults."""

    num_orders: int
    num_accepted: int = 0
    num_unanswered: int = 0  # submissions that were repeated
    num_restarted: int = 0  # jobs with more than one attempt
    faults: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    orders: set[int] = field(default_factory=set)

    def add(self, kind: str, sentence: str, *, order: int | None = None) -> None:
        self.faults[kind].append(sentence)
        if order is not None:
            self.orders.add(order)

    @property
    def is_clean(self) -> bool:
        return not any(self.faults.values())

    def __str__(self) -> str:
        counts = ", ".join(f"{len(sentences)} {kind}" for kind, sentences in self.faults.items())
        details = "".join(f"\n  {kind}: {sentence}" for kind, some in self.faults.items() for sentence in some)
        effort = f"{self.num_unanswered} submissions repeated, {self.num_restarted} jobs restarted"
        return f"{self.num_accepted} of {self.num_orders} orders accepted ({effort}): {counts}{details}"


KINDS = ("lost", "duplicated", "late", "failed", "refused", "wrong", "unnotified", "worn", "unaccounted", "orphaned")


def judge(
    orders: Sequence[Order],
    entries: Sequence[Entry],
    *,
    notices: Sequence[Notice],
    rows: Sequence[JobRow],
    visible: Sequence[str],
    kills: Sequence[Kill],
    late_after_s: float,
) -> Verdict:
    """Compare the accepted jobs in the client's ledger with the results of the run, and return the verdict.

    `visible` has the keys of all files in the database.
    """
    verdict = Verdict(num_orders=len(orders))
    book: dict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        book[entry["order"]].append(entry)
    quiet_at = max((kill.at for kill in kills), default=0.0)
    jobs: dict[str, Order] = {}  # id of every accepted job -> its order
    for order in orders:
        promised = _judge_order(verdict, order, book[order.number], quiet_at=quiet_at, late_after_s=late_after_s)
        jobs |= dict.fromkeys(promised, order)
    _judge_notices(verdict, jobs, notices)
    _judge_rows(verdict, jobs, rows, kills)
    _judge_artifacts(verdict, rows, visible)
    verdict.num_unanswered = sum(entry["what"] == "unanswered" for entry in entries)
    verdict.num_restarted = sum(row.attempts > 1 for row in rows)
    if len(rows) - len(jobs) > verdict.num_unanswered:
        counts = f"{len(rows)} jobs in the store, {len(jobs)} accepted, {verdict.num_unanswered} unanswered"
        verdict.add("unaccounted", counts)
    return verdict


def _judge_order(
    verdict: Verdict, order: Order, entries: Sequence[Entry], *, quiet_at: float, late_after_s: float
) -> set[str]:
    """Check the ledger entries of one planned job. Adds faults to the verdict. Returns the ids of accepted jobs."""
    what = {kind: [entry for entry in entries if entry["what"] == kind] for kind in _WHATS}
    name = f"order {order.number} ({order.kind})"
    for entry in what["wrong"]:
        verdict.add("wrong", f"{name}: {entry['why']}", order=order.number)
    for entry in what["failed"]:
        verdict.add("failed", f"{name}, job {entry['job']}: {entry['error']}", order=order.number)
    if not what["accepted"]:
        verdict.add("refused", f"{name} was never accepted", order=order.number)
        return set()
    verdict.num_accepted += 1
    promised = {_promised_id(order, entry) for entry in what["accepted"]}
    fetched = {entry["job"] for entry in what["fetched"]}
    for job in promised - fetched:
        verdict.add("lost", f"{name}, job {job}: accepted, no audio", order=order.number)
    if order.key is not None and len(promised) > 1:
        verdict.add("duplicated", f"{name}: jobs {sorted(promised)} for one key", order=order.number)
    for job in fetched:
        downloads = [entry for entry in what["fetched"] if entry["job"] == job]
        digests = {(entry["path"], digest) for entry in downloads for digest in entry["sha256"]}
        if len(digests) > 1:
            verdict.add("duplicated", f"{name}, job {job}: different artifacts {sorted(digests)}", order=order.number)
    if what["fetched"]:
        took_s = what["fetched"][0]["at"] - max(what["accepted"][0]["at"], quiet_at)
        if took_s > late_after_s:
            verdict.add("late", f"{name}: {took_s:.1f} s", order=order.number)
    return promised


_WHATS = ("accepted", "unanswered", "fetched", "failed", "wrong")


def _promised_id(order: Order, entry: Entry) -> str:
    try:
        return dialects.job_id(order, json.loads(entry["body"]))
    except (ValueError, KeyError, TypeError):
        return f"<none in {entry['body'][:100]!r}>"


def _judge_notices(verdict: Verdict, jobs: dict[str, Order], notices: Sequence[Notice]) -> None:
    by_job: dict[str, set[tuple[str | None, str]]] = defaultdict(set)
    arrived = set()
    for notice in notices:
        by_job[notice.job].add((notice.webhook_id, notice.outcome))
        if not notice.is_genuine:
            verdict.add("wrong", f"job {notice.job}: a notice without a valid signature", order=notice.order)
        if not notice.was_refused:
            arrived.add(notice.job)
    for job, contents in by_job.items():
        if len(contents) > 1:
            verdict.add("duplicated", f"job {job}: different notices {sorted(map(str, contents))}")
    for job, order in jobs.items():
        if order.has_webhook and job not in arrived:
            verdict.add("unnotified", f"order {order.number} ({order.kind}), job {job}: no webhook", order=order.number)


def _judge_rows(verdict: Verdict, jobs: dict[str, Order], rows: Sequence[JobRow], kills: Sequence[Kill]) -> None:
    stored = {row.id: row for row in rows}
    for job, order in jobs.items():
        if job not in stored:
            verdict.add("unaccounted", f"job {job}: accepted, not in the store", order=order.number)
        elif stored[job].contract != order.contract:
            verdict.add("unaccounted", f"job {job}: of contract {stored[job].contract}", order=order.number)
    for row in rows:
        if row.completed_at is None:
            verdict.add("unaccounted", f"job {row.id}: {row.state} when all was over")
            continue
        allowed = 1 + _SPARE_ATTEMPTS + _count_kills(kills, row)
        if row.attempts > allowed:
            verdict.add("worn", f"job {row.id}: {row.attempts} attempts, {allowed} explained by kills")
    for key, same in Counter(row.key for row in rows if row.key).items():
        if same > 1:
            verdict.add("duplicated", f"key {key}: {same} jobs in the store")


def _judge_artifacts(verdict: Verdict, rows: Sequence[JobRow], visible: Sequence[str]) -> None:
    """Check that the database lists the file of each succeeded job once, and no other files."""
    due = Counter(row.artifact for row in rows if row.state == "succeeded")
    for artifact in sorted(map(str, due.keys() | set(visible))):
        num_due, num_visible = due[artifact], visible.count(artifact)
        if num_due != 1 or num_visible != 1:
            verdict.add("duplicated", f"artifact {artifact}: {num_visible} times visible, {num_due} succeeded jobs")


def _count_kills(kills: Sequence[Kill], row: JobRow) -> int:
    assert row.completed_at is not None
    return sum(kill.target in _COSTLY and row.created_at <= kill.at <= row.completed_at for kill in kills)
