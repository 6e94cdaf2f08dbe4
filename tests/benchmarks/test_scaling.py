"""The page on scaling says what the committed files say, and its arithmetic is the one written on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.scaling import PAGE, RESULTS, num_gpus, read_costs, render

_INGRESS = {
    "ingresses": {
        "1": {
            "answer of 1 s": {"cpu_ms": {"ingress": 10.0, "proxy": 1.0, "replicas": 4.0}},
            "answer of 10 s": {"cpu_ms": {"ingress": 28.0, "proxy": 1.9, "replicas": 4.0}},
            "job": {"cpu_ms": {"ingress": 5.0}},
        }
    },
    "idle_cores": {"2": {"ray": 0.2}, "12": {"ray": 0.3}},
}
_JOBS = {"databases": {"postgresql": {"worst_submit_p50_ms": 3.0, "worst_lease_p95_ms": 2.0}}}


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == render(), "run `make docs`"


def test_gpus_are_planned_with_seven_tenths_of_what_they_do() -> None:
    assert [num_gpus(load, capacity_per_minute=100.0) for load in (0.1, 70.0, 71.0, 7000.0)] == [1, 1, 2, 100]


def test_costs_are_lines_through_what_was_measured() -> None:
    costs = read_costs(_INGRESS, _JOBS)
    assert costs.of_answer("ingress", audio_s=5.0) == pytest.approx(18.0)
    assert costs.around(audio_s=5.0) == pytest.approx(18.0 + 1.4)
    assert costs.of_answer("replicas", audio_s=100.0) == pytest.approx(4.0)
    assert (costs.ray_cores, costs.ray_cores_per_replica) == pytest.approx((0.18, 0.01))
    assert costs.database_ms == pytest.approx(8.0)


def test_other_results_make_another_page(tmp_path: Path) -> None:
    for name in ("capacity", "ingress", "jobs"):
        shutil.copy(RESULTS / f"{name}.json", tmp_path)
    path = tmp_path / "capacity.json"
    report = json.loads(path.read_text())
    report["results"]["models"]["medium"]["requests_per_minute"] = 1000.0
    path.write_text(json.dumps(report))
    assert "| medium | 100,000 | 143 |" in render(tmp_path)
