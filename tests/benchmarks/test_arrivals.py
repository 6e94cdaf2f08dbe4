"""Arrival lists: reproducible, at their rate, within the model, the same from a file."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from statistics import mean

import pytest

from benchmarks.arrivals import ArrivalList, draw_arrivals, to_request
from benchmarks.workload import MIXES
from tests.factories import ToyModel


def draw(mix: str, *, rate_hz: float | None = 4.0, count: int = 60, seed: int = 1) -> ArrivalList:
    return draw_arrivals(mix, rate_hz=rate_hz, count=count, seed=seed, max_duration_s=20.0)


@pytest.mark.parametrize("mix", MIXES)
def test_the_same_list_for_the_same_seed_and_from_a_file(mix: str, tmp_path: Path) -> None:
    arrivals = draw(mix)
    arrivals.save(tmp_path / "lists" / "list.json")
    assert arrivals == draw(mix) == ArrivalList.load(tmp_path / "lists" / "list.json")
    assert arrivals != draw(mix, seed=2)
    assert all(0 < arrival.duration_s <= 20.0 for arrival in arrivals)
    assert len({arrival.seed for arrival in arrivals}) == 60


def test_another_rate_moves_the_arrivals_alone() -> None:
    slow, fast, burst = draw("demo-wide", rate_hz=2.0), draw("demo-wide", rate_hz=4.0), draw("demo-wide", rate_hz=None)
    for a, b, c in zip(slow, fast, burst, strict=True):
        assert a.at_s == pytest.approx(2 * b.at_s)
        assert c.at_s == 0.0
        assert (a.prompt, a.duration_s, a.steps, a.seed) == (b.prompt, b.duration_s, b.steps, b.seed)
        assert (a.prompt, a.duration_s, a.steps, a.seed) == (c.prompt, c.duration_s, c.steps, c.seed)


def test_poisson_arrivals_rise_at_their_rate() -> None:
    times = [arrival.at_s for arrival in draw("small-8", count=4000)]
    gaps = [after - before for before, after in pairwise(times)]
    assert min(gaps) >= 0
    assert mean(gaps) == pytest.approx(0.25, rel=0.1)
    assert sum(gap > 0.25 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)  # exponential: e^-1


def test_bursts_keep_the_mean_rate_and_their_pauses() -> None:
    times = [arrival.at_s for arrival in draw("bursty", count=4000)]
    assert all(at_s % 15.0 <= 5.0 for at_s in times)
    assert 4000 / times[-1] == pytest.approx(4.0, rel=0.1)


def test_weights_are_kept() -> None:
    arrivals = draw("demo-wide", count=2000)
    assert sum(arrival.is_guided for arrival in arrivals) / 2000 == pytest.approx(0.3, abs=0.04)
    assert {arrival.steps for arrival in arrivals if arrival.is_guided} == {50}
    edits = draw("edit", count=2000)
    assert sum(arrival.mode == "inpaint" for arrival in edits) / 2000 == pytest.approx(0.25, abs=0.04)
    assert {arrival.source is None for arrival in edits if arrival.mode != "text-to-audio"} == {False}


@pytest.mark.parametrize("mix", ["edit", "demo-wide"])
def test_every_request_can_be_planned(mix: str) -> None:
    model = ToyModel()
    arrivals = draw_arrivals(mix, rate_hz=None, count=40, seed=3, max_duration_s=model.spec.card.max_duration_s)
    for arrival in arrivals:
        plan = model.plan(to_request(arrival, model.spec.card))[0]
        assert plan.seed == arrival.seed
        assert (plan.init_source is not None) == (arrival.mode == "variation")
        assert (plan.keep_mask is not None) == (arrival.mode == "inpaint")
