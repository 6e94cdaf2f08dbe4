"""Goal lines from result files: met, close, missed, void, not measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.goals import GOALS, Goal, has_missed, read_standings

LATENCY = Goal(
    "P4", "demo-wide fast p95", "run-demo-wide", ("ratios", "ours-fast", "lock", "p95"), 0.7, count=("num_requests",)
)
RATE = Goal("P16", "step rate", "formats", ("rate",), 0.8, larger_is_better=True, rounds=("rates",))


def write(folder: Path, case: str, results: object) -> None:
    (folder / f"{case}.json").write_text(json.dumps({"case": case, "results": results}))


def ratio(value: float, low: float, high: float) -> dict[str, object]:
    p95 = {"value": value, "low": low, "high": high, "worst": high}
    return {"ratios": {"ours-fast": {"lock": {"p95": p95}}}, "num_requests": 72}


@pytest.mark.parametrize(
    ("results", "line"),
    [
        (ratio(0.66, 0.61, 0.72), "P4 demo-wide fast p95 0.66 (0.61-0.72, n 72) <= 0.70 ok"),
        (ratio(0.71, 0.69, 0.72), "P4 demo-wide fast p95 0.71 (0.69-0.72, n 72) <= 0.70 close"),
        (ratio(0.75, 0.71, 0.80), "P4 demo-wide fast p95 0.75 (0.71-0.80, n 72) <= 0.70 MISS"),
        ({**ratio(0.5, 0.5, 0.5), "is_void": True}, "P4 demo-wide fast p95 0.50 (n 72) <= 0.70 void"),
        ({"ratios": {}}, "P4 demo-wide fast p95 <= 0.70 not measured"),
    ],
)
def test_a_line_says_where_a_ratio_stands(tmp_path: Path, results: dict[str, object], line: str) -> None:
    write(tmp_path, "run-demo-wide", results)
    standings = read_standings(tmp_path, [LATENCY])
    assert [str(standing) for standing in standings] == [line]
    assert has_missed(standings) == line.endswith(("MISS", "void"))


@pytest.mark.parametrize(
    ("rate", "rates", "line"),
    [
        (0.9, [0.9, 1.0], "P16 step rate 0.90 (0.90-1) >= 0.80 ok"),
        (0.7, [0.7, 0.81], "P16 step rate 0.70 (0.70-0.81) >= 0.80 close"),
        (0.7, {"a": [0.7, 0.71], "b": [0.72]}, "P16 step rate 0.70 (0.70-0.72) >= 0.80 MISS"),
    ],
)
def test_a_plain_figure_has_its_rounds_interval(tmp_path: Path, rate: float, rates: object, line: str) -> None:
    write(tmp_path, "formats", {"rate": rate, "rates": rates})
    assert [str(standing) for standing in read_standings(tmp_path, [RATE])] == [line]


def test_without_files_nothing_is_measured_and_nothing_missed(tmp_path: Path) -> None:
    standings = read_standings(tmp_path)
    assert len(standings) == len(GOALS)
    assert {standing.verdict for standing in standings} == {"not measured"}
    assert not has_missed(standings)


def test_goals_are_told_apart() -> None:
    assert len({(goal.id, goal.what) for goal in GOALS}) == len(GOALS)
