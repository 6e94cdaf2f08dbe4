"""Sides as models of one real server, batches of `@serve.batch` among them, and that server asked in the dialect whose
clips are jobs. The lock is a replica like the batches; `tests/test_bare_machine.py` has all three in one process.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.cases.engine import resolve_model
from benchmarks.cases.run import URL_SIDE, RunRequest, run_comparison, serving_sides
from benchmarks.compare.asking import Asker
from benchmarks.compare.dialects import DIALECTS, OverHttp, open_session
from benchmarks.compare.pieces import Pieces
from benchmarks.compare.run import Run, RunOptions
from benchmarks.settings import CaseSettings
from tests.goldens import SA3_GOLDENS

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SIDES = ("static", "ours")


async def test_sides_of_one_server(tmp_path: Path) -> None:
    settings = CaseSettings(model=str(SA3_GOLDENS / "sharp-s"), rounds=1)
    with serving_sides(settings, SIDES, entry=resolve_model(settings.model)) as url:
        async with open_session(url) as http:
            askers: dict[str, Asker] = {name: OverHttp(http, DIALECTS["sa3"], model=name) for name in SIDES}
            options = RunOptions("demo-fast", SIDES, max_duration_s=4.0, count=4, rounds=1, goodput_trials=1)
            results = await Run(askers, options, pieces=Pieces(tmp_path / "sides", {}), is_watched=False).measure()
        request = RunRequest(
            "demo-fast", url=url, dialect="aiml", count=2, goodput_trials=0
        )  # whose jobs need a runner
        asked = await run_comparison(settings, request, folder=tmp_path / "aiml")
        assert asked["sides"][URL_SIDE]["latency"]["all"]["p95_ms"] > 0
    assert results["outputs"]["ours"]["largest_difference"] < 1e-3
    for name in SIDES:
        assert results["sides"][name]["stages_ms"]["denoise"] > 0
        assert results["sides"][name]["goodput"]["good_rps"] > 0
    assert results["ratios"]["ours"]["static"]["p95_8"]["value"] > 0
