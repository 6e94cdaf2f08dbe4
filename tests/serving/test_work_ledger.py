"""The `WorkLedger`, with which a router estimates how much work each replica has left. The clocks are fake."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from stable_audio_serve.core.generation import GenerationRequest, Lora
from stable_audio_serve.core.pricing import Prices
from stable_audio_serve.serving.work_ledger import ReplicaWork, WorkLedger, parse_work

PRICES = Prices(row_ms=0.0, evaluation_ms=10.0, evaluated_second_ms=0.0, audio_second_ms=0.0)
REPLICAS = ("a", "b", "c")
_EPOCH = 1.79e9


class Ledger(WorkLedger):
    """A ledger of three replicas. `ahead_s` has the seconds by which a replica's clock is ahead, by replica name."""

    def __init__(self, **ahead_s: float) -> None:
        self.now = 1000.0
        self._ahead_s = ahead_s
        self.reports: dict[str, dict[str, object]] = {name: {} for name in REPLICAS}
        super().__init__(clock=lambda: self.now, wall=lambda: _EPOCH + self.now)
        self.update(self.reports)

    def publish(self, replica: str, *, backlog_ms: float, delay_s: float = 0.0) -> None:
        """Receive the replica's report of its remaining work, which it published `delay_s` ago."""
        said_at = _EPOCH + self.now - delay_s + self._ahead_s.get(replica, 0.0)
        self.reports[replica] = ReplicaWork(said_at, backlog_ms, PRICES).to_dict()
        self.update(self.reports)

    def route(self, request_id: str, *, to: str, ms: float) -> None:
        self.choose(replica=to, ms=ms)
        self.arrive(replica=to, request_id=request_id, ms=ms)

    def left(self) -> tuple[float, float, float]:
        return self.left_ms("a"), self.left_ms("b"), self.left_ms("c")


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


def test_reports_survive_serialisation() -> None:
    work = ReplicaWork(1.0, 2.0, replace(PRICES, default_steps=50, adapted=1.5), ("hash",))
    values = work.to_dict()
    assert parse_work(values | {"device": "cpu", "prices": values["prices"] | {"of_a_later_version": 1.0}}) == work
    assert parse_work(values | {"prices": {}}) is None


def test_reported_work_shrinks_as_time_passes(ledger: Ledger) -> None:
    ledger.publish("a", backlog_ms=500.0)
    ledger.now += 0.2
    ledger.update(ledger.reports)  # when another replica publishes, this replica's old report arrives again
    assert ledger.left_ms("a") == pytest.approx(300.0)
    ledger.now += 1.0
    assert ledger.left_ms("a") == 0.0


@pytest.mark.parametrize(("ahead_s", "left_ms"), [(0.0, 4600.0), (0.2, 4800.0), (3600.0, 5000.0), (-3600.0, 0.0)])
def test_the_age_of_a_report_counts_up_to_five_seconds(ahead_s: float, left_ms: float) -> None:
    """If the clocks of the machines differ, the age of a report is wrong, so it is limited to 0..5 s."""
    ledger = Ledger(a=ahead_s)
    ledger.publish("a", backlog_ms=5000.0, delay_s=0.4)
    assert ledger.left_ms("a") == pytest.approx(left_ms)
    assert not ledger.is_old("a")


def test_sent_call_counts_until_it_ends_or_is_reported(ledger: Ledger) -> None:
    ledger.publish("a", backlog_ms=0.0)
    ledger.now += 0.1
    ledger.route("r1", to="a", ms=80.0)
    ledger.route("r2", to="a", ms=20.0)
    assert ledger.left_ms("a") == 100.0
    ledger.end("r2", replica="a")
    assert ledger.left_ms("a") == 80.0
    ledger.now += 0.5
    ledger.publish("a", backlog_ms=0.0, delay_s=0.55)  # published before r1 arrived there
    assert ledger.left_ms("a") == 80.0
    ledger.publish("a", backlog_ms=30.0, delay_s=0.01)
    assert ledger.left_ms("a") == pytest.approx(20.0)
    ledger.end("r1", replica="a")
    assert ledger.left_ms("a") == pytest.approx(20.0)


def test_call_counts_once_from_its_choice(ledger: Ledger) -> None:
    ledger.choose(replica="a", ms=50.0)
    assert ledger.left() == (50.0, 0.0, 0.0)
    ledger.arrive(replica="a", request_id="r", ms=50.0)
    assert ledger.left() == (50.0, 0.0, 0.0)
    ledger.end("r", replica="b")  # replica b had refused the call, so its end there changes nothing
    assert ledger.left() == (50.0, 0.0, 0.0)
    ledger.end("r", replica="a")
    assert ledger.left() == (0.0, 0.0, 0.0)


def test_call_that_takes_another_choice_leaves_its_own(ledger: Ledger) -> None:
    # The two calls have the same predicted time, so it does not matter which choice belongs to which call.
    ledger.choose(replica="a", ms=10.0)
    ledger.choose(replica="b", ms=10.0)
    for replica in "ab":
        ledger.arrive(replica=replica, request_id=replica, ms=10.0)
        assert ledger.left() == (10.0, 10.0, 0.0)


def test_rejected_choice_moves_with_its_call(ledger: Ledger) -> None:
    ledger.choose(replica="a", ms=10.0)
    ledger.arrive(replica="b", request_id="r", ms=10.0)  # replica a was full, so the call went to b
    assert ledger.left() == (0.0, 10.0, 0.0)


def test_unused_choice_expires(ledger: Ledger) -> None:
    ledger.choose(replica="a", ms=50.0)
    ledger.now += 1.1
    assert ledger.left_ms("a") == 0.0


def test_calls_with_one_id_count_separately(ledger: Ledger) -> None:
    for replica in "aab":
        ledger.route("same", to=replica, ms=10.0)
    assert ledger.left() == (20.0, 10.0, 0.0)
    ledger.end("same", replica="a")
    assert ledger.left() == (10.0, 10.0, 0.0)
    ledger.end("same", replica="c")
    ledger.end("unknown", replica="a")
    assert ledger.left() == (10.0, 10.0, 0.0)


def test_call_without_audio_counts_as_nothing(ledger: Ledger) -> None:
    ledger.choose(replica="a", ms=10.0)
    ledger.route("status", to="a", ms=0.0)
    ledger.end("status", replica="a")
    assert ledger.left() == (10.0, 0.0, 0.0)


def test_removed_replica_drops_its_calls(ledger: Ledger) -> None:
    ledger.publish("a", backlog_ms=0.0)
    ledger.route("r", to="a", ms=50.0)
    ledger.update({"b": {}})
    for late in (lambda: ledger.arrive(replica="a", request_id="s", ms=1.0), lambda: ledger.end("r", replica="a")):
        late()
    ledger.update({"a": {}, "b": {}})
    assert ledger.left_ms("a") == 0.0


def test_report_expires_after_five_seconds(ledger: Ledger) -> None:
    ledger.publish("a", backlog_ms=0.0)
    ledger.now += 4.9
    assert not ledger.is_old("a")
    assert not ledger.is_old("b")
    ledger.publish("a", backlog_ms=0.0)
    ledger.now += 0.2
    assert not ledger.is_old("a")
    assert ledger.is_old("b")


@pytest.mark.parametrize("stats", [{"said_at": 1.0}, {"said_at": None, "backlog_ms": 1.0, "prices": {}}, {"prices": 3}])
def test_report_of_another_version_is_ignored(ledger: Ledger, stats: dict[str, object]) -> None:
    ledger.now += 5.1
    ledger.reports["a"] = stats
    ledger.update(ledger.reports)
    assert ledger.is_old("a")
    assert ledger.left_ms("a") == 0.0


def test_calls_are_priced_by_their_request(ledger: Ledger) -> None:
    audio = GenerationRequest(prompt="x", duration_s=1.0, seed=1, steps=50)
    assert ledger.price_ms("a", [audio]) == 1.0  # before a price is known, every request counts as 1 ms
    ledger.publish("b", backlog_ms=0.0)
    assert ledger.price_ms("a", [audio]) == ledger.price_ms("b", [audio]) == 500.0
    ledger.reports["b"]["prices"] |= {"adapted": 1.5}  # type: ignore[operator]
    ledger.reports["b"]["said_at"] = _EPOCH + ledger.now + 1
    ledger.update(ledger.reports)
    adapted = replace(audio, loras=(Lora("vinyl"),))
    assert (ledger.price_ms("b", [audio]), ledger.price_ms("b", [adapted])) == (500.0, 750.0)
    assert ledger.price_ms("b", []) == ledger.price_ms("b", ["status"]) == 0.0


def test_burst_of_10_000_calls_is_balanced_by_work(ledger: Ledger) -> None:
    """The work of two replicas never differs by more than one request. When all calls have ended, no work is left."""
    rng = random.Random(3)
    sizes = [rng.choice([10.0, 60.0, 500.0]) for _ in range(10_000)]
    places = []
    for number, ms in enumerate(sizes):
        places.append(min(REPLICAS, key=ledger.left_ms))
        ledger.route(str(number), to=places[-1], ms=ms)
    left = ledger.left()
    assert sum(left) == sum(sizes)
    assert max(left) - min(left) <= max(sizes)
    for number in rng.sample(range(len(sizes)), len(sizes)):
        ledger.end(str(number), replica=places[number])
    assert ledger.left() == (0.0, 0.0, 0.0)
