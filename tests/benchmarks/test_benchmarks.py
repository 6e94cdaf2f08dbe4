"""The pure parts of the benchmarks, and one engine run on the toy-sized checkpoint."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.cases.engine import run_engine_case
from benchmarks.metrics import Finished, percentile, steady, summarize, throughput_rps, worst_ratio
from benchmarks.report import format_cell, format_table, write_report
from benchmarks.settings import CaseSettings
from benchmarks.workload import eight_mixed_requests
from tests.factories import ToyModel

pytestmark = pytest.mark.slow

times = st.floats(0, 1e6, allow_nan=False)


@given(st.lists(times, min_size=1, max_size=50))
def test_percentiles_are_ordered_and_inside(values: list[float]) -> None:
    latency = summarize(values)
    assert min(values) <= latency.p50_ms <= latency.p95_ms <= latency.p99_ms <= max(values)


def test_percentile_interpolates() -> None:
    assert percentile([10.0, 20.0], 0.5) == 15.0
    assert percentile([3.0], 0.99) == 3.0
    with pytest.raises(ValueError, match="values"):
        percentile([], 0.5)


def test_latency_counts_from_the_scheduled_arrival() -> None:
    assert Finished(due_at=1.0, ended_at=3.5, audio_s=2.0).latency_ms == 2500.0


@given(st.integers(1, 200))
def test_steady_part_drops_the_ends_but_never_everything(count: int) -> None:
    finished = [Finished(float(i), i + 1.0, 1.0) for i in range(count)]
    kept = steady(finished)
    assert kept
    if count >= 20:
        assert kept[0].due_at == float(int(0.15 * count))
        assert len(kept) == count - int(0.15 * count) - int(0.05 * count)


def test_throughput_spans_first_arrival_to_last_end() -> None:
    assert throughput_rps([Finished(0.0, 1.0, 1.0), Finished(1.0, 4.0, 1.0)]) == 0.5


def test_worse_round_counts() -> None:
    assert worst_ratio([(4.0, 2.0), (3.0, 2.0)], larger_is_better=True) == 1.5
    assert worst_ratio([(4.0, 2.0), (3.0, 2.0)], larger_is_better=False) == 2.0


def test_eight_mixed_requests_are_unlike_and_plannable() -> None:
    model = ToyModel()
    plans = [model.plan(request)[0] for request in eight_mixed_requests(model.spec.card)]
    assert len(plans) == 8
    assert len({plan.frames for plan in plans}) >= 4
    assert sum(plan.init_source is not None for plan in plans) == 1
    assert sum(plan.keep_mask is not None for plan in plans) == 1
    assert sum(plan.sampler.evaluations[0].guided for plan in plans) == 2


def test_table_aligns_columns() -> None:
    assert format_table([{"a": 1, "long": 0.5}, {"a": 200, "long": 1.0}]) == "a    long \n1    0.500\n200  1    "


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (69.0, "69"),
        (0.0, "0"),
        (1234.56, "1235"),
        (86.415, "86.4"),
        (1.43, "1.43"),
        (-0.8606, "-0.861"),
        (0.00602, "0.00602"),
        (3.1e-7, "3.10e-7"),
        (9.999, "10.0"),
        (float("inf"), "inf"),
        (7, "7"),
        ("ours", "ours"),
    ],
)
def test_figures_have_three_digits_and_whole_numbers_no_point(value: object, text: str) -> None:
    assert format_cell(value) == text


@pytest.mark.parametrize("mode", ["strict", "fast"])
async def test_engine_case_compares_outputs_and_states_ratios(mode: str, tmp_path: Path) -> None:
    settings = CaseSettings(mode=mode, rounds=2)
    results = await run_engine_case(ToyModel(), settings)
    path = write_report(tmp_path, "engine", settings=asdict(settings), results=results)
    report = json.loads(path.read_text())
    assert report["results"]["largest_difference"] <= (0.0 if mode == "strict" else 1e-5)
    assert len(report["results"]["rounds"]) == 2
    assert report["results"]["throughput_ratio"] > 0
    assert report["environment"]["versions"]["torch"]
    assert report["environment"]["settings"]["mode"] == mode


def test_what_is_added_is_what_the_engine_did_not_spend() -> None:
    from benchmarks.cases.http import Call, parse_server_timing

    stages = parse_server_timing(
        "queue;dur=1.5, text;dur=2, denoise;dur=90.5, decode;dur=6, encode;dur=4, total;dur=104"
    )
    call = Call(wall_ms=120.0, stages_ms=stages)
    assert call.engine_ms == 100.0
    assert call.added_ms == 20.0


def test_cold_start_stages_are_read_from_what_the_server_says() -> None:
    from benchmarks.servers.process import Server

    line = "cold start: ray 2.5 s, serve 1.0 s, models 7.25 s; demo: import 3.0 s, warm_up 0.5 s"
    server = Server("", lines=["loading", line])
    stages = {"ray": 2.5, "serve": 1.0, "models": 7.25, "demo import": 3.0, "demo warm_up": 0.5}
    assert server.stages_s == stages


@pytest.mark.parametrize("container", ["WAV", "FLAC", "MP3"])
def test_upload_files_are_what_they_say(container: str) -> None:
    from benchmarks.cases.uploads import make_file

    info = soundfile.info(io.BytesIO(make_file(container, duration_s=2.0)))
    assert (info.format, info.frames, info.channels) == (container, 88_200, 2)


def test_the_job_store_is_measured_on_both_databases() -> None:
    from benchmarks.cases.jobs import Load, run_jobs_case

    load = Load(submit_hz=50.0, submit_s=0.4, queued=200, leases=10, reads_s=0.1)
    results = run_jobs_case(CaseSettings(rounds=1), load)["databases"]
    assert "sqlite" in results
    for figures in results.values():
        assert 0 < figures["worst_submit_p50_ms"] <= figures["worst_submit_p95_ms"]
        assert figures["worst_lease_p95_ms"] > 0
        assert figures["worst_reads_per_s"] > 0
