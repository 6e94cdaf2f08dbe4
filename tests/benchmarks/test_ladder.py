"""The ladder, the formats and the prompt cache: arithmetic by hand, then the toy model and a server without a model."""

from __future__ import annotations

import asyncio
import importlib
import inspect
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.arrivals import Arrival
from benchmarks.cases import ladder, memory, prompt_cache
from benchmarks.cases.cold_start import first_audio_ratio
from benchmarks.cases.formats import Run, check_length, compare_sides
from benchmarks.cases.http import Call, Round, compare_ways
from benchmarks.cases.ladder import LadderSizes, run_ladder_case, summarize_lone_clips
from benchmarks.cases.memory import MemorySizes, growth_share, measure_growth, resident_bytes
from benchmarks.cases.prompt_cache import PromptSizes, run_prompt_cache_case
from benchmarks.cases.scheduler_watch import TimedScheduler, Turn, WatchLimits, summarize_turns
from benchmarks.client import send_in_flight
from benchmarks.compare.asking import Answer
from benchmarks.compare.playing import Record
from benchmarks.registry import CASES
from benchmarks.settings import CaseSettings
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult
from stable_audio_serve.engine.scheduler import RowId, SchedulerLimits
from stable_audio_serve.engine.work import RowWork
from tests.factories import FakeClock, ToyModel

pytestmark = pytest.mark.slow


def test_four_times_the_frames_are_compared_in_the_worst_round() -> None:
    figures = summarize_lone_clips({1.0: [10.0, 20.0], 2.0: [15.0, 15.0], 4.0: [40.0, 90.0], 8.0: [60.0, 75.0]})
    assert figures["duration_4x_frames_time_ratio_rounds"] == {"4 s over 1 s": [4.0, 4.5], "8 s over 2 s": [4.0, 5.0]}
    assert figures["duration_4x_frames_time_ratio"] == 5.0
    assert figures["duration_lone_ms"]["1"] == 15.0


def test_durations_without_a_quarter_state_no_ratio() -> None:
    assert summarize_lone_clips({1.0: [10.0], 3.0: [30.0]})["duration_4x_frames_time_ratio"] is None


def test_the_scheduler_is_stated_as_a_share_of_time_and_by_the_median_turn() -> None:
    few = [Turn(32, 1, 0.001, 0.1), Turn(32, 2, 0.002, 0.2), Turn(32, 1, 0.003, 0.3)]
    many = [Turn(256, 2, 0.003, 0.1), Turn(256, 2, 0.003, 0.1), Turn(256, 2, 0.003, 0.4)]
    figures = summarize_turns({32: [few], 256: [many]})
    assert figures["scheduler_share_of_step_by_active_rows"] == {
        "32": pytest.approx(0.006 / 0.6),
        "256": pytest.approx(0.009 / 0.6),
    }
    assert figures["scheduler_share_of_step"] == pytest.approx(0.009 / 0.6)
    assert figures["scheduler_us_per_step_by_active_rows"] == {
        "32": pytest.approx(2000.0),
        "256": pytest.approx(3000.0),
    }
    assert figures["scheduler_us_per_step_many_over_few_ratio"] == pytest.approx(1.5)
    assert figures["scheduler_us_per_row_by_active_rows"] == {"32": pytest.approx(1000.0), "256": pytest.approx(1500.0)}
    assert figures["scheduler_share_of_step_many_over_few_ratio"] == pytest.approx(1.5)


def test_a_turn_lasts_from_one_pick_to_the_next_and_an_idle_engine_has_none() -> None:
    clock, turns = FakeClock(), []
    scheduler = TimedScheduler(
        SchedulerLimits(max_tokens=0),
        knee_tokens=lambda frames: 0.0,
        step_ms=lambda works, num_new: 1.0,
        note=turns.append,
        clock=clock.monotonic,
    )
    row = RowId(0)
    scheduler.add(row, RowWork(frames=8, branches=(1,), decode_left=(8,)), arrived_at=0.0, alone_s=1.0)
    assert scheduler.pick() == [row]
    clock.now += 2.0  # the step
    scheduler.remove(row)
    assert scheduler.pick() == []
    clock.now += 50.0  # nothing to do
    assert scheduler.pick() == []
    assert turns == [Turn(active=1, picked=1, scheduler_s=0.0, turn_s=2.0)]


async def test_so_many_and_no_more_are_in_flight() -> None:
    now, most = 0, 0

    async def send(request: GenerationRequest) -> GenerationResult:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0)
        now -= 1
        return GenerationResult((), 44_100, "none", (0,))

    requests = [GenerationRequest(prompt="x", duration_s=2.0, seed=seed) for seed in range(20)]
    finished = await send_in_flight(send, requests, num_in_flight=3)
    assert most == 3
    assert len(finished) == 20
    assert {request.audio_s for request in finished} == {2.0}


@pytest.mark.parametrize("mode", ["strict", "fast"])
async def test_the_whole_ladder_on_the_toy_model(mode: str) -> None:
    sizes = LadderSizes(
        in_flight=(1, 8),
        durations_s=(0.1, 0.4, 99.0),
        lone_s=(0.1, 0.4, 1.6, 99.0),
        requests=8,
        compared_requests=16,
        lone_clips=1,
        watch=WatchLimits(turns=5, turns_s=0.05),
    )
    results = await run_ladder_case(ToyModel(), CaseSettings(mode=mode, rounds=1), sizes=sizes)
    assert results["mode"] == mode
    assert ladder.rows(results)
    assert results["largest_difference"] <= (0.0 if mode == "strict" else 1e-5)
    assert results["concurrency_in_flight"] == (64, 8)
    assert results["concurrency_throughput_ratio"] > 0
    assert len(results["foreign_cores"]) == 1
    assert 0 < results["scheduler_share_of_step"] < 1
    assert results["scheduler_active_rows"] == [256, 32]
    for figure in ("share_of_step", "us_per_step", "us_per_row"):
        assert set(results[f"scheduler_{figure}_by_active_rows"]) == {"256", "32"}
        assert results[f"scheduler_{figure}_many_over_few_ratio"] > 0
    assert set(results["duration_4x_frames_time_ratio_rounds"]) == {"0.4 s over 0.1 s", "1.6 s over 0.4 s"}
    cells = {(cell["duration_s"], cell["in_flight"]): cell for cell in results["table"]}
    longest_s = ToyModel().spec.card.max_duration_s
    assert set(cells) == {(duration_s, k) for duration_s in (0.1, 0.4, longest_s) for k in (1, 8)}
    for (duration_s, _), cell in cells.items():
        assert cell["audio_s_per_gpu_s"] == pytest.approx(cell["requests_per_s"] * duration_s)


async def test_memory_is_read_after_every_list_once_it_has_settled() -> None:
    readings = iter(mib * 2**20 for mib in (101, 100, 105, 103))
    results = await measure_growth(
        ToyModel(),
        CaseSettings(),
        sizes=MemorySizes(requests=4, settled=2, times=5),
        read_bytes=lambda: next(readings),
    )
    assert results["memory_requests"] == [8, 20]
    assert memory.rows(results)
    assert results["memory_rss_mib"] == [101.0, 100.0, 105.0, 103.0]
    assert results["memory_rss_growth_share"] == pytest.approx(0.03)


def test_growth_is_between_the_least_of_each_half() -> None:
    assert growth_share([110, 100, 132, 132, 104, 131]) == pytest.approx(0.04)
    assert growth_share([100, 132, 100, 132, 132, 100]) == 0.0


def test_resident_memory_grows_with_what_is_held() -> None:
    before = resident_bytes()
    held = bytearray(b"x" * (64 * 2**20))
    assert resident_bytes() - before > 0.9 * len(held)


def _record(*, ended_at: float, total_ms: float, encode_ms: float) -> Record:
    stages_ms = {"total": total_ms, "encode": encode_ms}
    return Record(0, due_at=0.0, ended_at=ended_at, audio_s=1.0, steps=8, stages_ms=stages_ms)


def test_the_step_rate_ends_with_the_last_audio_and_not_with_its_file() -> None:
    wav = Run(
        [_record(ended_at=1.0, total_ms=900, encode_ms=100), _record(ended_at=1.7, total_ms=1650, encode_ms=50)], {}
    )
    mp3 = Run(
        [_record(ended_at=2.0, total_ms=1900, encode_ms=900), _record(ended_at=4.0, total_ms=4000, encode_ms=2000)], {}
    )
    assert wav.step_rate_hz == pytest.approx(16 / 1.6)
    assert mp3.step_rate_hz == pytest.approx(16 / 2.0)
    assert mp3.requests_per_s == pytest.approx(2 / 4.0)
    figures = compare_sides([{"mp3": [mp3, mp3], "wav": [wav, wav]}, {"mp3": [wav], "wav": [wav]}])
    assert figures["mp3_over_wav_step_rate_ratio"] == pytest.approx(0.8)
    assert figures["mp3_over_wav_step_rate_ratio_rounds"] == [pytest.approx(0.8), pytest.approx(1.0)]


def test_audio_of_a_wrong_length_is_refused() -> None:
    arrival = Arrival(0.0, "x", duration_s=2.0, seed=1, steps=8)

    def answer(samples: int) -> Answer:
        return Answer({}, lambda: np.zeros((2, samples), dtype=np.float32))

    check_length(arrival, answer(88_200), sample_rate_hz=44_100)
    check_length(replace(arrival, audio_format="opus"), answer(96_000), sample_rate_hz=44_100)
    for samples in (88_100, 96_000, 0):
        with pytest.raises(RuntimeError, match="88200"):
            check_length(arrival, answer(samples), sample_rate_hz=44_100)


async def test_the_text_encoder_runs_once_for_each_prompt() -> None:
    prompts: list[str] = []

    def note(name: str, items: object) -> None:
        if name == "encode_text":
            prompts.extend(items)  # type: ignore[call-overload]

    model = ToyModel(on_call=note)
    results = await run_prompt_cache_case(model, CaseSettings(), sizes=PromptSizes(requests=60, compared=3))
    assert results["prompts"] == 60
    assert prompt_cache.rows(results)
    assert results["distinct_prompts"] == results["text_encodes"] < 60
    assert results["text_encodes_over_distinct_prompts_ratio"] == 1.0
    assert results["warm_prompts_with_identical_audio"] == 3
    asked = [prompt for prompt in prompts if prompt != "warm-up"]
    assert results["text_encodes"] < len(asked) <= results["text_encodes"] + 2 * 3  # the compared ones again, apart


def test_a_lone_request_is_compared_by_the_medians_of_the_worse_round() -> None:
    def calls(*walls_ms: float) -> list[Call]:
        return [Call(wall_ms, {"denoise": 90.0, "encode": 4.0}) for wall_ms in walls_ms]

    first = Round([100.0, 100.0, 400.0], [105.0, 104.0, 900.0], calls(120.0, 125.0, 800.0))
    second = Round([100.0], [110.0], calls(115.0))
    figures = compare_ways([first, second], allowed={"engine": (1.10, 5.0), "http": (1.0, 25.0)})
    assert figures["engine_over_bare_ratio"] == pytest.approx(1.10)
    assert figures["engine_over_bare_added_ms"] == pytest.approx(10.0)
    assert figures["http_over_bare_added_ms"] == pytest.approx(25.0)
    assert figures["engine_over_allowed_ratio_rounds"] == [pytest.approx(105 / 110), pytest.approx(1.0)]
    assert figures["http_over_allowed_ratio"] == pytest.approx(1.0)
    assert figures["http_over_engine_ratio"] == pytest.approx(125 / 105)
    assert figures["added_ms"]["worst_round_median"] == pytest.approx(35.0)
    assert figures["encode_ms"] == 4.0


def test_a_cold_start_is_compared_with_what_cannot_be_left_out() -> None:
    first = {"first_audio_s": 12.0, "stages_s": {"ray": 2.0, "models": 5.0}}
    again = {"first_audio_s": 9.0, "stages_s": {"ray": 1.0}}
    assert first_audio_ratio([first, again], bare_s=4.0) == 2.0
    assert first_audio_ratio([again], bare_s=5.0) == 1.5


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_run_with_the_settings_alone_and_has_a_table(name: str) -> None:
    module = importlib.import_module(f"benchmarks.cases.{CASES[name].module}")
    inspect.signature(getattr(module, CASES[name].function)).bind(CaseSettings())
    inspect.signature(module.rows).bind({})
