"""What a router knows of its replicas, on clocks that the tests set."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.core.pricing import Prices
from stable_audio_serve.serving.work_ledger import ReplicaWork, WorkLedger

PRICES = Prices(row_ms=0.0, evaluation_ms=10.0, evaluated_second_ms=0.0, audio_second_ms=0.0)
REPLICAS = ("a", "b", "c")
_EPOCH = 1.79e9


class Ledger(WorkLedger):
    """A ledger of three replicas. Their clocks differ from this one by what `ahead_s` says."""

    def __init__(self, **ahead_s: float) -> None:
        self.now = 1000.0
        self._ahead_s = ahead_s
        self.words: dict[str, dict[str, object]] = {name: {} for name in REPLICAS}
        super().__init__(clock=lambda: self.now, wall=lambda: _EPOCH + self.now)
        self.update(self.words)

    def say(self, replica: str, *, backlog_ms: float, way_s: float = 0.0) -> None:
        """What a replica said `way_s` ago arrives."""
        said_at = _EPOCH + self.now - way_s + self._ahead_s.get(replica, 0.0)
        self.words[replica] = ReplicaWork(said_at, backlog_ms, PRICES).to_dict()
        self.update(self.words)

    def route(self, request_id: str, *, to: str, ms: float) -> None:
        self.choose(replica=to, ms=ms)
        self.arrive(replica=to, request_id=request_id, ms=ms)

    def left(self) -> tuple[float, float, float]:
        return self.left_ms("a"), self.left_ms("b"), self.left_ms("c")


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


def test_what_a_replica_said_is_worked_off_as_time_passes(ledger: Ledger) -> None:
    ledger.say("a", backlog_ms=500.0)
    ledger.now += 0.2
    ledger.update(ledger.words)  # the same word again, because another replica said something
    assert ledger.left_ms("a") == pytest.approx(300.0)
    ledger.now += 1.0
    assert ledger.left_ms("a") == 0.0


@pytest.mark.parametrize(("ahead_s", "left_ms"), [(0.0, 4600.0), (0.2, 4800.0), (3600.0, 5000.0), (-3600.0, 0.0)])
def test_the_age_of_a_report_counts_up_to_five_seconds(ahead_s: float, left_ms: float) -> None:
    """However much the clocks of two machines differ, a report does not make a replica old."""
    ledger = Ledger(a=ahead_s)
    ledger.say("a", backlog_ms=5000.0, way_s=0.4)
    assert ledger.left_ms("a") == pytest.approx(left_ms)
    assert not ledger.is_old("a")


def test_what_was_sent_counts_until_it_ends_or_the_replica_has_counted_it(ledger: Ledger) -> None:
    ledger.say("a", backlog_ms=0.0)
    ledger.now += 0.1
    ledger.route("r1", to="a", ms=80.0)
    ledger.route("r2", to="a", ms=20.0)
    assert ledger.left_ms("a") == 100.0
    ledger.end("r2", replica="a")
    assert ledger.left_ms("a") == 80.0
    ledger.now += 0.5
    ledger.say("a", backlog_ms=0.0, way_s=0.55)  # said before the request came
    assert ledger.left_ms("a") == 80.0
    ledger.say("a", backlog_ms=30.0, way_s=0.01)
    assert ledger.left_ms("a") == pytest.approx(20.0)
    ledger.end("r1", replica="a")
    assert ledger.left_ms("a") == pytest.approx(20.0)


def test_a_call_is_charged_from_its_choice_on_and_only_once(ledger: Ledger) -> None:
    ledger.choose(replica="a", ms=50.0)
    assert ledger.left() == (50.0, 0.0, 0.0)
    ledger.arrive(replica="a", request_id="r", ms=50.0)
    assert ledger.left() == (50.0, 0.0, 0.0)
    ledger.end("r", replica="b")  # where it was refused before
    assert ledger.left() == (50.0, 0.0, 0.0)
    ledger.end("r", replica="a")
    assert ledger.left() == (0.0, 0.0, 0.0)


def test_a_call_that_takes_the_place_of_another_leaves_its_own_to_that_one(ledger: Ledger) -> None:
    ledger.choose(replica="a", ms=10.0)  # for the second call, whose choice was ready first
    ledger.choose(replica="b", ms=10.0)
    for replica in "ab":
        ledger.arrive(replica=replica, request_id=replica, ms=10.0)
        assert ledger.left() == (10.0, 10.0, 0.0)


def test_a_choice_that_is_not_possible_moves_with_its_call(ledger: Ledger) -> None:
    ledger.choose(replica="a", ms=10.0)
    ledger.arrive(replica="b", request_id="r", ms=10.0)  # the first was full
    assert ledger.left() == (0.0, 10.0, 0.0)


def test_a_choice_that_is_not_used_is_forgotten(ledger: Ledger) -> None:
    ledger.choose(replica="a", ms=50.0)
    ledger.now += 1.1
    assert ledger.left_ms("a") == 0.0


def test_calls_of_one_id_are_several_calls(ledger: Ledger) -> None:
    for replica in "aab":
        ledger.route("same", to=replica, ms=10.0)
    assert ledger.left() == (20.0, 10.0, 0.0)
    ledger.end("same", replica="a")
    assert ledger.left() == (10.0, 10.0, 0.0)
    ledger.end("same", replica="c")
    ledger.end("unknown", replica="a")
    assert ledger.left() == (10.0, 10.0, 0.0)


def test_a_call_without_audio_counts_nothing_and_disturbs_nobody(ledger: Ledger) -> None:
    ledger.choose(replica="a", ms=10.0)
    ledger.route("status", to="a", ms=0.0)
    ledger.end("status", replica="a")
    assert ledger.left() == (10.0, 0.0, 0.0)


def test_a_replica_that_is_gone_takes_its_calls_with_it(ledger: Ledger) -> None:
    ledger.say("a", backlog_ms=0.0)
    ledger.route("r", to="a", ms=50.0)
    ledger.update({"b": {}})
    for late in (lambda: ledger.arrive(replica="a", request_id="s", ms=1.0), lambda: ledger.end("r", replica="a")):
        late()
    ledger.update({"a": {}, "b": {}})
    assert ledger.left_ms("a") == 0.0


def test_a_replica_that_is_silent_for_five_seconds_is_old_and_a_new_one_is_not(ledger: Ledger) -> None:
    ledger.say("a", backlog_ms=0.0)
    ledger.now += 4.9
    assert not ledger.is_old("a")
    assert not ledger.is_old("b")
    ledger.say("a", backlog_ms=0.0)
    ledger.now += 0.2
    assert not ledger.is_old("a")
    assert ledger.is_old("b")


@pytest.mark.parametrize("words", [{"said_at": 1.0}, {"said_at": None, "backlog_ms": 1.0, "prices": {}}, {"prices": 3}])
def test_words_of_another_version_are_no_words(ledger: Ledger, words: dict[str, object]) -> None:
    ledger.now += 5.1
    ledger.words["a"] = words
    ledger.update(ledger.words)
    assert ledger.is_old("a")
    assert ledger.left_ms("a") == 0.0


def test_calls_are_priced_by_what_they_ask_for(ledger: Ledger) -> None:
    audio = GenerationRequest(prompt="x", duration_s=1.0, seed=1, steps=50)
    assert ledger.price_ms("a", [audio]) == 1.0  # all alike while nobody has said a price
    ledger.say("b", backlog_ms=0.0)
    assert ledger.price_ms("a", [audio]) == ledger.price_ms("b", [audio]) == 500.0
    assert ledger.price_ms("b", []) == ledger.price_ms("b", ["status"]) == 0.0


def test_a_burst_of_10_000_is_shared_out_by_its_work(ledger: Ledger) -> None:
    """However the sizes come, no replica has more than the others and one request; ended, they leave nothing."""
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


@pytest.mark.server
def test_routers_and_what_they_import_are_light() -> None:
    """The controller and the ingress import them; in a process of its own."""
    check = "import sys, stable_audio_serve.serving.routing; print({'torch', 'numpy', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert "torch" not in done.stdout
