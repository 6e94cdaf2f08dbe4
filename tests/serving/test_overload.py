"""What an ingress says of a full model, in a world whose device does one request after another by a clock of ours."""

from __future__ import annotations

import heapq
import itertools
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean, median

import pytest

from stable_audio_serve.core.errors import OverloadedError, QueueFullError
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.serving.overload import OverloadGuard
from stable_audio_serve.serving.promises import Promises, wish_of
from tests.factories import FakeClock
from tests.parameters import slow

_ABOVE_S = 2.0  # that engines leave for those told to come now
_EXCHANGE_S, _WAY_S = 0.25, 0.02  # between two words of one process to the others, and how long each is on its way


def request(prompt: str = "rain", *, seed: int = 0) -> GenerationRequest:
    return GenerationRequest(prompt=prompt, duration_s=1.0, seed=seed)


def full(retry_after_s: float) -> QueueFullError:
    """With ten requests a second waiting."""
    return QueueFullError("full", retry_after_s=retry_after_s, num_ahead=50, ahead_s=5.0)


def wait_s(guard: OverloadGuard, prompt: str) -> float:
    """Returns what a client is told who asks now and is refused without asking a replica."""
    with pytest.raises(OverloadedError) as refusal:
        guard.enter(request(prompt))
    return refusal.value.retry_after_s or 0.0


def refused_s(guard: OverloadGuard, prompt: str, *, room_in_s: float, seed: int = 0) -> float:
    """Returns what a client is told who asks now and whose request a replica refuses."""
    return guard.refuse(guard.enter(request(prompt, seed=seed)), full(room_in_s)).retry_after_s or 0.0


def test_a_refusal_is_remembered_for_its_own_client_alone() -> None:
    guard = OverloadGuard(FakeClock())
    greedy, other = (replace(request(name), client=name) for name in ("greedy", "other"))
    guard.refuse(guard.enter(greedy), full(60.0))
    with pytest.raises(OverloadedError):
        guard.enter(greedy)
    assert guard.enter(other) == other


def test_replicas_are_not_asked_until_the_time_that_a_full_one_named_but_after_a_second_they_are() -> None:
    clock = FakeClock()
    guard = OverloadGuard(clock)
    refused_s(guard, "first", room_in_s=0.4)
    clock.now += 0.3
    wait_s(guard, "second")
    clock.now += 0.2
    refused_s(guard, "third", room_in_s=30.0)
    clock.now += 0.9
    wait_s(guard, "fourth")
    clock.now += 0.2
    assert not guard.enter(request("fifth")).is_promised


def test_each_is_told_a_later_time_than_the_one_before() -> None:
    guard = OverloadGuard(FakeClock())
    first = refused_s(guard, "0", room_in_s=0.5)
    told = [first, *(wait_s(guard, str(number)) for number in range(1, 20))]
    assert told[0] == pytest.approx(0.5)
    assert told[19] - told[0] == pytest.approx(19 / 10 / 0.9)


def test_who_comes_as_told_is_passed_on_as_promised_once_with_any_seed_even_while_others_are_refused() -> None:
    clock = FakeClock()
    guard = OverloadGuard(clock)
    refused_s(guard, "mine", seed=1, room_in_s=2.0)
    clock.now += 1.9
    refused_s(guard, "mine", seed=2, room_in_s=5.0)  # too early
    clock.now += 0.2
    wait_s(guard, "another")
    assert guard.enter(request("mine", seed=3)).is_promised
    wait_s(guard, "mine")


def test_a_promised_one_that_finds_no_room_does_not_wait_behind_those_who_came_later() -> None:
    clock = FakeClock()
    guard = OverloadGuard(clock)
    refused_s(guard, "mine", room_in_s=0.5)
    for number in range(100):
        wait_s(guard, str(number))
    clock.now += 0.6
    again = refused_s(guard, "mine", room_in_s=0.3)
    assert again < 1.0


def test_those_who_do_not_come_are_no_longer_waited_for() -> None:
    clock = FakeClock()
    guard = OverloadGuard(clock)
    for _ in range(300):
        guard.refuse(guard.enter(request(str(clock.monotonic()))), full(0.05))
        clock.now += 0.1
    told = refused_s(guard, "last", room_in_s=0.05)
    assert told < 1.0


def test_an_overload_after_a_calm_is_judged_by_its_own_clients() -> None:
    clock = FakeClock()
    guard = OverloadGuard(clock)
    for number in range(300):  # none of whom comes again
        refused_s(guard, f"one {number}", room_in_s=0.05)
        clock.now += 0.1
    clock.now += 4.0
    told = [refused_s(guard, "two 0", room_in_s=0.5), *(wait_s(guard, f"two {number}") for number in range(1, 20))]
    assert told[0] == pytest.approx(0.5)
    assert told[19] - told[0] == pytest.approx(19 / 10 / 0.9)


def test_what_is_remembered_of_a_hostile_quantity_is_bounded_and_forgotten() -> None:
    promises = Promises()
    for number in range(20_000):
        promises.add(number % 7, due_at=float(number) / 100.0)
    assert promises.num_open == 10_000
    promises.forget_late(1000.0)
    assert promises.num_open == 0
    assert not promises.claim(3, now=1000.0)


@pytest.mark.server
def test_a_wish_is_the_same_in_every_process_and_whatever_the_prompt_is() -> None:
    command = [sys.executable, "-c", "import tests.serving.test_overload as t; print(t.wish_of(t.request('rain')))"]
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": "5"})
    assert int(said.stdout) == wish_of(request("rain", seed=9))
    assert wish_of(request("\ud800" * 100_000)) != wish_of(request("rain"))


def test_who_is_answered_otherwise_is_not_waited_for_and_the_next_are_told_an_earlier_time() -> None:
    clock = FakeClock()
    guard = OverloadGuard(clock)
    first = refused_s(guard, "0", room_in_s=0.5)
    for number in range(50):  # each is answered on a CPU
        wait_s(guard, str(number))
        guard.withdraw(request(str(number)))
    assert wait_s(guard, "next") == pytest.approx(first + 1 / 10 / 0.9)
    clock.now += 1.0
    assert not guard.enter(request("3")).is_promised


def test_who_is_refused_elsewhere_too_is_expected_as_told() -> None:
    clock = FakeClock()
    guard = OverloadGuard(clock)
    told_s = refused_s(guard, "mine", room_in_s=2.0)
    guard.withdraw(request("mine"))
    guard.promise(request("mine"), in_s=told_s)
    clock.now += 2.0
    assert guard.enter(request("mine")).is_promised


def test_of_a_flood_that_is_answered_otherwise_little_is_remembered() -> None:
    promises = Promises()
    for number in range(30_000):
        promises.add(number, due_at=600.0)
        assert promises.withdraw(number)
    assert not promises.withdraw(3)
    assert (promises.num_open, promises.return_share) == (0, 1.0)
    assert len(promises._order) <= 1001


def test_another_process_knows_who_was_told_to_come_and_who_came() -> None:
    clock = FakeClock()
    one, other = (OverloadGuard(clock, num_processes=2) for _ in range(2))
    refused_s(one, "mine", room_in_s=2.0)
    wait_s(one, "away")
    one.withdraw(request("away"))
    word = one.tell()
    assert word is not None
    other.hear(word)
    clock.now += 2.0
    assert not other.enter(request("away")).is_promised
    assert other.enter(request("mine")).is_promised
    word = other.tell()
    assert word is not None
    one.hear(word)
    assert not one.enter(request("mine")).is_promised
    assert (one.tell(), other.tell()) == (None, None)


def test_a_process_of_several_has_nothing_to_tell_while_the_model_is_not_full() -> None:
    guard = OverloadGuard(FakeClock(), num_processes=2)
    for _ in range(100):
        guard.enter(request())
        guard.done()
    assert guard.tell() is None


@dataclass
class World:
    """Replicas with `max_queue_s` of work each, one request after another; requests go where least is left. A replica's
    refusal takes `way_s` to the process that asked.
    """

    guards: Sequence[OverloadGuard]  # of the processes that clients ask, any of them each time
    clock: FakeClock
    work_s: Sequence[float]
    max_queue_s: float
    free_at: list[float]
    way_s: float = 0.0
    events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    order: itertools.count[int] = field(default_factory=itertools.count)
    told_s: dict[int, float] = field(default_factory=dict)
    admitted_at: dict[int, float] = field(default_factory=dict)
    returns: list[bool] = field(default_factory=list)  # of those who came again for the first time: admitted
    latencies_s: list[float] = field(default_factory=list)
    num_refused_by_replicas: int = 0
    num_refused: int = 0
    rng: random.Random = field(default_factory=lambda: random.Random(7))

    def run(self, arrivals: Sequence[float], *, are_patient: Sequence[bool]) -> None:
        for number, (at, is_patient) in enumerate(zip(arrivals, are_patient, strict=True)):
            self.at(at, partial(self.ask, number, tries=0, is_patient=is_patient))
        if len(self.guards) > 1:
            self.at(_EXCHANGE_S, self.exchange)
        while self.events:
            at, _, event = heapq.heappop(self.events)
            self.clock.now = at
            event()

    def at(self, at: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.events, (at, next(self.order), event))

    def exchange(self) -> None:
        for guard in self.guards:
            if (word := guard.tell()) is not None:
                others = [other for other in self.guards if other is not guard]
                self.at(self.clock.now + _WAY_S, lambda others=others, word=word: [o.hear(word) for o in others])  # type: ignore[misc]
        if self.events:
            self.at(self.clock.now + _EXCHANGE_S, self.exchange)

    def ask(self, number: int, *, tries: int, is_patient: bool) -> None:
        guard = self.rng.choice(self.guards)

        def tell(refusal: OverloadedError) -> None:
            self.num_refused += 1
            if tries == 1:
                self.returns.append(False)
            told_s = max(1, math.ceil(refusal.retry_after_s or 0.0))
            self.told_s.setdefault(number, told_s)
            if is_patient:
                self.at(self.clock.now + told_s, lambda: self.ask(number, tries=tries + 1, is_patient=True))

        try:
            entered = guard.enter(request(str(number)))
        except OverloadedError as refusal:
            tell(refusal)
            return
        try:
            self.serve(number, guard, entered)
        except QueueFullError as error:
            self.num_refused_by_replicas += 1
            self.at(self.clock.now + self.way_s, lambda error=error: tell(guard.refuse(entered, error)))  # type: ignore[misc]
        else:
            if tries == 1:
                self.returns.append(True)

    def serve(self, number: int, guard: OverloadGuard, entered: GenerationRequest) -> None:
        now = self.clock.monotonic()
        replica = min(range(len(self.free_at)), key=self.free_at.__getitem__)
        ahead_s = max(0.0, self.free_at[replica] - now)
        over_s = ahead_s - self.max_queue_s - (_ABOVE_S if entered.is_promised else 0.0)
        if over_s > 0:
            num_ahead = math.ceil(ahead_s / (sum(self.work_s) / len(self.work_s)))
            raise QueueFullError("full", retry_after_s=over_s, num_ahead=num_ahead, ahead_s=ahead_s)
        self.free_at[replica] = now + ahead_s + self.work_s[number]
        self.admitted_at[number] = now
        self.latencies_s.append(self.free_at[replica] - now)
        self.at(self.free_at[replica], guard.done)


def overload(
    *,
    seed: int,
    max_queue_s: float,
    factor: float = 3.0,
    seconds: float = 30.0,
    replicas: int = 1,
    processes: int = 1,
    patient_share: float = 1.0,
    impatient_s: float = 0.0,
    work_range_s: tuple[float, float] = (0.03, 0.15),
    way_s: float = 0.0,
) -> tuple[World, list[float]]:
    """Returns a world after so much more was asked than it can do, and the arrivals. `patient_share` of the clients
    come again as they are told, after `impatient_s` in which none of them does."""
    rng = random.Random(seed)
    arrivals, now = [], 0.0
    while (now := now + rng.expovariate(factor * replicas / fmean(work_range_s))) < impatient_s + seconds:
        arrivals.append(now)
    clock = FakeClock()
    clock.now = 0.0
    work_s = [rng.uniform(*work_range_s) for _ in arrivals]
    are_patient = [at >= impatient_s and rng.random() < patient_share for at in arrivals]
    guards = [OverloadGuard(clock, num_processes=processes) for _ in range(processes)]
    world = World(guards, clock, work_s, max_queue_s=max_queue_s, free_at=[0.0] * replicas, way_s=way_s)
    world.run(arrivals, are_patient=are_patient)
    return world, arrivals


@pytest.mark.parametrize(
    ("max_queue_s", "factor", "replicas"), [(5.0, 3.0, 1), (2.0, 3.0, 3), slow(0.5, 3.0, 1), slow(5.0, 1.5, 1)]
)
@pytest.mark.parametrize("seed", [1, slow(2)])
@pytest.mark.parametrize("processes", [2, slow(1), slow(4)])
def test_clients_that_wait_as_told_are_admitted_and_wait_as_long_as_a_queue_would_take(
    *, seed: int, max_queue_s: float, factor: float, replicas: int, processes: int
) -> None:
    world, arrivals = overload(
        seed=seed, max_queue_s=max_queue_s, factor=factor, replicas=replicas, processes=processes
    )
    assert len(world.admitted_at) == len(arrivals)
    assert sum(world.returns) / len(world.returns) >= 0.9
    # The k-th to arrive would have been the k-th to be admitted.
    places = sorted(world.admitted_at.values())
    waits_s = {number: places[number] - arrivals[number] for number in world.told_s}
    assert median(abs(world.told_s[n] - waits_s[n]) / max(waits_s[n], 0.1) for n in waits_s) <= 0.25


@pytest.mark.parametrize(("patient_share", "impatient_s"), [(1.0, 60.0), slow(0.8, 0.0), (0.5, 0.0)])
def test_patient_clients_are_admitted_beside_and_after_others_who_do_not_come_again(
    *, patient_share: float, impatient_s: float
) -> None:
    returns: list[bool] = []
    for seed in range(1, 7):
        world, _ = overload(
            seed=seed,
            max_queue_s=1.0,
            processes=2,
            work_range_s=(0.25, 0.35),
            patient_share=patient_share,
            impatient_s=impatient_s,
        )
        returns += world.returns
    assert sum(returns) / len(returns) >= 0.9


def test_nobody_is_kept_waiting_for_those_who_do_not_come_again() -> None:
    world, arrivals = overload(seed=3, max_queue_s=0.5, patient_share=0.0)
    done_s = sum(world.work_s[number] for number in world.admitted_at)
    assert done_s >= 0.98 * arrivals[-1]  # the device was never idle
    assert max(world.latencies_s) <= 0.5 + 0.15
    assert median(list(world.told_s.values())[-100:]) == 1


@pytest.mark.parametrize(("processes", "share"), [slow(1, 0.2), (2, 0.3)])
@pytest.mark.parametrize("replicas", [slow(1), 20])
def test_few_refusals_are_asked_of_replicas_which_are_busy_and_none_of_them_is_idle(
    *, processes: int, share: float, replicas: int
) -> None:
    world, arrivals = overload(
        seed=4, max_queue_s=0.5, replicas=replicas, processes=processes, seconds=20.0, patient_share=0.0, way_s=0.06
    )
    assert world.num_refused > len(arrivals) / 2
    assert world.num_refused_by_replicas <= share * world.num_refused
    assert sum(world.work_s[number] for number in world.admitted_at) >= 0.98 * replicas * arrivals[-1]
