"""The comparison itself: what it makes of records, that it refuses unlike work, that it goes on where it was cut."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.arrivals import Arrival
from benchmarks.cases.engine import resolve_model
from benchmarks.cases.run import RunRequest
from benchmarks.compare.asking import Answer, Asker, Audio, InProcess, RefusedError
from benchmarks.compare.figures import (
    Bracket,
    capacity_rps,
    describe_bursts,
    describe_replays,
    fit_alone_ms,
    is_good,
    ratio_of_brackets,
    ratio_of_medians,
    ratio_of_pooled_p95,
    steady_latencies_ms,
)
from benchmarks.compare.outputs import VoidError, compare, difference
from benchmarks.compare.pictures import format_comparison, write_plots
from benchmarks.compare.pieces import OtherRunError, Pieces, measuring_into
from benchmarks.compare.playing import Record
from benchmarks.compare.run import OutOfTimeError, Run, RunOptions, SideFailedError
from benchmarks.sides.servers import open_side
from benchmarks.sides.timed_model import TimedModel
from benchmarks.simulate.devices import LinearDevice
from benchmarks.workload import MIXES
from stable_audio_serve.engine import EngineOptions
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.protocol import DiffusionModel
from stable_audio_serve.models.weights import cast_network
from tests.factories import make_request
from tests.goldens import OPEN_GOLDENS, SA3_GOLDENS

pytestmark = pytest.mark.slow

QUICK = LinearDevice(
    text_fixed_ms=0.2, step_fixed_ms=0.3, step_per_frame_ms=0.001, coding_fixed_ms=0.5, coding_per_frame_ms=0.001
)


def record(due_at: float, latency_s: float, *, steps: int = 8, audio_s: float = 1.0, refused: bool = False) -> Record:
    return Record(0, due_at, due_at + latency_s, audio_s, steps, {}, refused)


def in_process(name: str, model: TimedModel) -> Asker:
    options = EngineOptions(mode="fast", torch_threads=1, frame_grid=64, warmup_budget_s=0.2)
    return InProcess(open_side(name, model, options=options), model.spec.card)


class OneStepFewer:
    """A side that saves a step."""

    def __init__(self, asker: Asker) -> None:
        self._asker = asker

    async def ask(self, arrival: Arrival) -> Answer:
        return await self._asker.ask(replace(arrival, steps=arrival.steps - 1))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def make_run(folder: Path, askers: dict[str, Asker], *, budget_s: float = float("inf"), **options: object) -> Run:
    chosen = {"count": 10, "rounds": 2, "goodput_trials": 2, **options}
    run_options = RunOptions("demo-wide", tuple(askers), max_duration_s=10.0, **chosen)  # type: ignore[arg-type]
    pieces = Pieces(folder, {"options": str(run_options)})
    return Run(askers, run_options, pieces=pieces, is_watched=False, budget_s=budget_s)


def test_figures_by_hand() -> None:
    burst = [record(0.0, 1.0), record(0.0, 2.0), record(0.0, 4.0)]
    assert capacity_rps(burst) == 0.75
    listed = [record(float(i), 0.1 * (i + 1), steps=8 if i % 2 else 50) for i in range(20)]
    kept = steady_latencies_ms(listed)
    assert kept == pytest.approx([100.0 * (i + 1) for i in range(3, 19)])  # without the first 15 and last 5 %
    assert steady_latencies_ms(listed, steps=50) == pytest.approx([100.0 * (i + 1) for i in range(4, 19, 2)])
    capacity = ratio_of_medians([3.0, 4.0, 9.0], [2.0, 2.0, 3.0], larger_is_better=True)
    assert (capacity.value, capacity.low, capacity.high, capacity.worst) == (2.0, 1.5, 3.0, 1.5)
    p95 = ratio_of_pooled_p95([[1.0, 1.0], [2.0, 2.0]], [[2.0, 2.0], [2.0, 2.0]])
    assert p95 is not None
    assert (p95.value, p95.low, p95.high, p95.worst) == (1.0, 0.5, 1.0, 1.0)
    assert ratio_of_pooled_p95([[], [1.0]], [[1.0], [1.0]]) is None
    goodput = ratio_of_brackets(Bracket(2.0, 2.5), Bracket(1.0, 1.25))
    assert (goodput.value, goodput.low, goodput.high) == (2.0, 1.6, 2.5)


def test_what_was_refused_is_no_work_and_no_latency() -> None:
    burst = [record(0.0, 1.0), record(0.0, 0.01, refused=True), record(0.0, 4.0), record(0.0, 0.01, refused=True)]
    assert capacity_rps(burst) == 0.5
    assert steady_latencies_ms(burst) == [1000.0, 4000.0]
    described = describe_replays([burst], step_classes=(8,))
    assert (described["num_requests"], described["refused"]) == (2, 2)
    assert describe_bursts([burst])["refused_at_once"] == [2]


async def test_a_side_that_refuses_everything_cannot_be_compared(tmp_path: Path) -> None:
    class Refusing:
        async def ask(self, arrival: Arrival) -> Answer:
            raise RefusedError("full", retry_after_s=1.0)

    run = make_run(tmp_path, {"lock": Refusing()})
    with pytest.raises(SideFailedError, match="lock failed: full"):
        await run.measure()
    with pytest.raises(SideFailedError, match="refused every request"):
        await run._play("lock", run._draw(0, rate_hz=None), what="burst")


def test_a_rate_is_good_while_nineteen_of_twenty_end_in_time() -> None:
    alone_ms = fit_alone_ms([record(0, 0.1, audio_s=1.0), record(0, 0.5, audio_s=5.0)])
    assert alone_ms(record(0, 9.0, audio_s=3.0)) == pytest.approx(300.0)
    in_time = [record(0, 0.9, audio_s=1.0)] * 18 + [record(0, 1.4, audio_s=3.0)]  # within a second, within 5 x 0.3 s
    assert is_good([*in_time, record(0, 1.1, audio_s=1.0)], alone_ms=alone_ms)
    assert is_good([*in_time, record(0, 0.0, refused=True)], alone_ms=alone_ms)
    assert not is_good([*in_time, record(0, 1.1, audio_s=1.0), record(0, 0.0, refused=True)], alone_ms=alone_ms)


def test_unlike_clips_differ() -> None:
    clip = np.sin(np.arange(2000, dtype=np.float32)).reshape(2, 1000)
    assert difference(clip, clip) == 0.0
    assert difference(clip + np.float32(0.01) * clip, clip) == pytest.approx(0.01, rel=1e-3)
    for other in (clip[:, :-1], clip * np.nan):
        assert difference(other, clip) == float("inf")
    assert difference(clip, 0 * clip) == float("inf")
    assert compare([clip], {"same": [clip.copy()]})["same"].num_identical == 1
    with pytest.raises(VoidError, match="other is void"):
        compare([clip, clip], {"other": [clip, clip * np.float32(1.1)]})


@pytest.mark.parametrize("folder", [SA3_GOLDENS / "sharp-s", OPEN_GOLDENS / "tiny-small"], ids=lambda path: path.name)
@pytest.mark.parametrize("precision", ["float16 steps", "half decode", "a step fewer of a hundred"])
async def test_less_exact_work_is_void(folder: Path, precision: str) -> None:
    entry = resolve_model(str(folder))
    other = load_model(entry, decode_precision="half" if "decode" in precision else "float32")
    if "float16" in precision:
        cast_network(other.denoiser, torch.float16)  # type: ignore[attr-defined]
    steps = 100 if "hundred" in precision else 8
    exact = await make_clip(load_model(entry), steps=steps)
    less = await make_clip(other, steps=steps - ("fewer" in precision))
    compare([exact], {"the same": [await make_clip(load_model(entry), steps=steps)]})
    with pytest.raises(VoidError):
        compare([exact], {"less": [less]})


async def make_clip(model: DiffusionModel, *, steps: int) -> Audio:
    side = open_side("lock", model, options=EngineOptions(mode="strict", torch_threads=1))
    result = await side.generate(make_request("a low bell", duration_s=1.0, seed=3, steps=steps))
    await side.close()
    return result.audio[0]


async def test_a_whole_run_states_every_figure_and_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    model = TimedModel(QUICK, max_duration_s=10.0)
    askers = {name: in_process(name, model) for name in ("lock", "static", "ours")}
    with pytest.raises(OutOfTimeError, match="alone"):
        await make_run(tmp_path, askers, budget_s=0.0).measure()
    results = await make_run(tmp_path, askers).measure()
    assert results["outputs"]["ours"]["largest_difference"] <= 1e-4
    assert results["outputs"]["static"]["num_clips"] >= 4
    for name in askers:
        side = results["sides"][name]
        assert len(side["capacity_rps"]) == 2
        assert {"all", "8", "50"} <= set(side["latency"])
        assert 0 < side["goodput"]["good_rps"] < side["goodput"]["bad_rps"]
        assert side["stages_ms"]["denoise"] > 0
    ratios = results["ratios"]["ours"]["lock"]
    assert {"capacity", "p50", "p95", "p95_8", "p95_50", "goodput"} == set(ratios)
    assert all(ratio["low"] <= ratio["value"] <= ratio["high"] for ratio in ratios.values())
    kept = json.loads((tmp_path / "replay-2.json").read_text())
    assert await make_run(tmp_path, askers, budget_s=0.0).measure() == results  # nothing is measured again
    (tmp_path / "replay-2.json").unlink()
    await make_run(tmp_path, askers).measure()
    assert json.loads((tmp_path / "replay-2.json").read_text()) != kept
    with pytest.raises(RuntimeError, match="other options"):
        make_run(tmp_path, askers, count=12)
    assert "| ours |" in format_comparison(results)
    write_plots(tmp_path, results)
    assert {"latency.svg", "throughput.svg", "stages.svg"} <= names(tmp_path)


async def test_a_side_that_saves_a_step_is_void(tmp_path: Path) -> None:
    model = TimedModel(QUICK, max_duration_s=10.0)
    askers = {"lock": in_process("lock", model), "fewer": OneStepFewer(in_process("lock", model))}
    with pytest.raises(VoidError, match="fewer is void"):
        await make_run(tmp_path, askers).measure()
    assert names(tmp_path) == set()


class Failing:
    """A side that dies after some requests."""

    def __init__(self, asker: Asker, *, after: int) -> None:
        self._asker = asker
        self._left = after

    async def ask(self, arrival: Arrival) -> Answer:
        self._left -= 1
        if self._left < 0:
            raise ConnectionResetError("the server went away")
        return await self._asker.ask(arrival)


@pytest.mark.parametrize("after", [1, 15])
async def test_a_side_that_dies_is_named_and_what_was_measured_is_kept(tmp_path: Path, after: int) -> None:
    model = TimedModel(QUICK, max_duration_s=10.0)
    askers = {"lock": in_process("lock", model), "ours": Failing(in_process("ours", model), after=after)}
    with pytest.raises(SideFailedError, match="ours failed: the server went away"):
        await make_run(tmp_path, askers).measure()
    assert ("alone.json" in names(tmp_path)) == (after == 15)
    assert "capacity-1.json" not in names(tmp_path)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("count", [1, 30, 300])
def test_requests_whose_time_alone_is_known_have_every_number_of_steps(mix: str, count: int, tmp_path: Path) -> None:
    options = RunOptions(mix, ("lock",), max_duration_s=400.0, count=count)
    probes = Run({}, options, pieces=Pieces(tmp_path, {}))._choose_probes()
    assert {probe.steps for probe in probes} == {steps for steps, _ in MIXES[mix].steps}


def test_a_folder_takes_one_run_at_a_time(tmp_path: Path) -> None:
    with measuring_into(tmp_path), pytest.raises(OtherRunError, match="another run"), measuring_into(tmp_path):
        pass
    with measuring_into(tmp_path):
        pass


async def test_pieces_of_another_run_are_refused_by_what_differs(tmp_path: Path) -> None:
    async def measure() -> int:
        return 1

    Pieces(tmp_path, {"count": 1, "options": {"mix": "a"}})  # nothing is measured yet
    await Pieces(tmp_path, {"count": 2, "options": {"mix": "a"}}).take("piece", measure=measure)
    with pytest.raises(OtherRunError, match=r"other options \(count, mix\)"):
        Pieces(tmp_path, {"count": 3, "options": {"mix": "b"}})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mix": "other"}, "no mix"),
        ({"mix": "demo-fast", "against": ("lock", "theirs")}, "theirs"),
        ({"mix": "demo-fast", "against": ("lock",)}, "two sides"),
        ({"mix": "demo-fast", "against": ("lock", "lock")}, "named twice"),
        ({"mix": "demo-fast", "url": "localhost:8000"}, "http://host:8000"),
        ({"mix": "demo-fast", "url": "http://host:8000/below"}, "http://host:8000"),
    ],
)
def test_a_comparison_of_the_unknown_is_refused_by_name(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunRequest(**fields)  # type: ignore[arg-type]
