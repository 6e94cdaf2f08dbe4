"""What an account admits, counted by hand: never more than the limit in any minute, whatever clocks do."""

from __future__ import annotations

import math
import random

import pytest

from stable_audio_serve.core.ids import ClientId
from stable_audio_serve.core.keys import KeyLimits
from stable_audio_serve.jobs.store.account import Account, Ask, Charge, Full, Visit

ALICE = ClientId("alice")
LIMITS = KeyLimits(600.0, 4)
NOW = 1_790_000_000.0


def settle(account: Account, now: float, *asks: Ask, holder: str = "a", num_held: int = 0) -> list[Charge | Full]:
    visit = Visit(ALICE, LIMITS, num_held, asks=asks)
    return account.settle(visit, now, holder=holder, lease_s=15)


def test_a_minutes_worth_may_come_at_once_and_then_nothing_until_it_is_over() -> None:
    account = Account()
    assert settle(account, NOW, *[Ask(30, takes_place=False)] * 21)[19:] == [
        Charge(30, math.ceil(NOW)),
        Full("audio_seconds_per_minute", 60.0),
    ]
    assert settle(account, NOW + 45, Ask(30, takes_place=False)) == [Full("audio_seconds_per_minute", 15.0)]
    assert settle(account, NOW + 59.9, Ask(1, takes_place=False)) == [
        Full("audio_seconds_per_minute", pytest.approx(0.1, abs=1e-3))
    ]
    assert isinstance(settle(account, NOW + 60, Ask(600, takes_place=False))[0], Charge)


def test_the_wait_is_until_enough_of_what_was_used_is_a_minute_old() -> None:
    account = Account()
    for second, audio_s in ((0, 200), (10, 300), (20, 100)):
        settle(account, NOW + second, Ask(audio_s, takes_place=False))
    waits = [account.ready_in_s(audio_s, rate=600, now=NOW + 30) for audio_s in (200, 201, 500, 501, 600)]
    assert waits == [30, 40, 40, 50, 50]
    assert account.ready_in_s(0, rate=600, now=NOW + 30) == 0


def test_places_are_of_their_holders_and_end_with_them() -> None:
    account = Account()
    place = Ask(0, takes_place=True)
    assert [type(outcome) for outcome in settle(account, NOW, *[place] * 3, holder="a")] == [Charge] * 3
    assert [type(outcome) for outcome in settle(account, NOW, *[place] * 2, holder="b")] == [Charge, Full]
    assert settle(account, NOW + 1, place, holder="c") == [Full("concurrency")]
    settle(account, NOW + 10, holder="a", num_held=2)  # one is free, and its time begins again
    assert isinstance(settle(account, NOW + 14, place, holder="c")[0], Charge)
    assert settle(account, NOW + 14, place, holder="d") == [Full("concurrency")]
    assert isinstance(settle(account, NOW + 15.5, place, holder="d")[0], Charge)  # b has been silent for 15 s
    assert account.places.keys() == {"a", "c", "d"}
    settle(account, NOW + 16, holder="a")
    assert account.places.keys() == {"c", "d"}


def test_what_is_given_back_can_be_used_again() -> None:
    account = Account()
    (charge,) = settle(account, NOW, Ask(600, takes_place=False))
    assert isinstance(charge, Charge)
    back = Visit(ALICE, LIMITS, returned=[charge], asks=[Ask(600, takes_place=False), Ask(1, takes_place=False)])
    assert [type(outcome) for outcome in account.settle(back, NOW + 2, holder="b", lease_s=15)] == [Charge, Full]
    account.settle(Visit(ALICE, LIMITS, returned=[charge] * 5), NOW + 3, holder="b", lease_s=15)
    assert sum(account.charges.values()) == 600  # nobody gets more back than was charged in that second


def test_what_was_admitted_elsewhere_counts_even_over_the_limit() -> None:
    account = Account()
    posted = [Charge(500), Charge(500)]
    account.settle(Visit(ALICE, LIMITS, posted=posted), NOW, holder="a", lease_s=15)
    assert [charge.second for charge in posted] == [math.ceil(NOW)] * 2
    assert settle(account, NOW + 1, Ask(1, takes_place=False)) == [Full("audio_seconds_per_minute", 59.0)]


def test_a_clock_that_was_set_back_locks_nobody_out_for_longer_than_a_minute() -> None:
    account = Account()
    settle(account, NOW, Ask(600, takes_place=True))
    earlier = NOW - 86_400
    assert settle(account, earlier, Ask(1, takes_place=False), holder="b") == [Full("audio_seconds_per_minute", 60.0)]
    assert account.places == {"a": (1, earlier + 15)}
    assert isinstance(settle(account, earlier + 60, Ask(600, takes_place=False), holder="b")[0], Charge)
    assert account.places == {}


def test_it_is_the_same_after_a_round_trip() -> None:
    account = Account()
    settle(account, NOW, Ask(0.1, takes_place=True), Ask(1 / 3, takes_place=True))
    again = Account.load(account.dump())
    assert again.places == account.places
    assert again.charges == pytest.approx(account.charges, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_no_minute_has_more_than_the_limit_and_a_hammered_one_nearly_all_of_it(seed: int) -> None:
    chance, account, now = random.Random(seed), Account(), NOW
    admitted: list[tuple[float, float]] = []
    while now < NOW + 300:
        now += chance.expovariate(20)
        holder, audio_s = chance.choice("abc"), chance.choice([0.5, 1, 7.3, 47])
        (outcome,) = settle(account, now, Ask(audio_s, takes_place=False), holder=holder)
        if isinstance(outcome, Charge):
            admitted.append((now, audio_s))
    for begin, _ in admitted:
        assert sum(audio_s for at, audio_s in admitted if begin <= at < begin + 60) <= 600 + 1e-6
    total = sum(audio_s for _, audio_s in admitted)
    assert 0.95 * 5 * 600 < total <= 5 * 600
    assert len(account.charges) <= 61


def test_hostile_quantities_stay_small() -> None:
    account = Account()
    limits = KeyLimits(1e8, None)
    for number in range(10_000):
        visit = Visit(ALICE, limits, asks=[Ask(1, takes_place=False)] * 3)
        account.settle(visit, NOW + number / 100, holder=f"{number % 7}", lease_s=15)
    assert len(account.charges) <= 62
    assert len(account.dump()) < 2500
