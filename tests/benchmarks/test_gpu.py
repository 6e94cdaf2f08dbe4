"""The GPU benchmarks run on tiny checkpoints, and an interrupted run resumes where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import main

pytestmark = [pytest.mark.slow, pytest.mark.server]


@pytest.mark.parametrize(
    ("part", "name", "figure"),
    [(1, "lone", "eager_over_captured_ratio"), (2, "busy", "steps_per_s"), (5, "precision", "denoiser_db")],
)
def test_each_part_reports_its_figures_and_resumes(part: int, name: str, figure: str, tmp_path: Path) -> None:
    def run(budget_s: str) -> dict[str, object]:
        assert main(["--device", "cpu", "--part", str(part), "--out", str(tmp_path), "--budget-s", budget_s]) == 0
        results: dict[str, object] = json.loads((tmp_path / f"gpu-{part}-{name}.json").read_text())["results"]
        return results

    assert run("0")["left"], "there is no time for anything"
    first = run("600")
    assert first[figure]
    assert not first["left"]
    assert run("0") == first, "everything is there"
