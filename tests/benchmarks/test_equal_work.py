"""A benchmark that compares two programs is void unless both do the same work."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.compare import Run, RunOptions, VoidError, compare, difference
from benchmarks.dialects import DIALECTS, OverHttp, open_clients
from benchmarks.load import Answer, Asker, InProcess
from benchmarks.report import OtherRunError, Pieces
from benchmarks.sides.servers import batch_key, open_side
from benchmarks.workload import Arrival, draw_arrivals, eight_mixed_requests
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult
from stable_audio_serve.engine import EngineOptions
from tests.api.compat.serving import serve_app
from tests.factories import ToyModel, make_request

pytestmark = pytest.mark.server

STRICT = EngineOptions(mode="strict", torch_threads=1, warmup_budget_s=0.0)


async def generate(name: str, requests: list[GenerationRequest]) -> list[GenerationResult]:
    side = open_side(name, ToyModel(), options=STRICT)
    try:
        return await asyncio.gather(*map(side.generate, requests))
    finally:
        await side.close()


async def test_a_lock_and_the_engine_generate_the_same_bytes() -> None:
    requests = eight_mixed_requests(ToyModel().spec.card)
    for lock, ours in zip(await generate("lock", requests), await generate("ours-strict", requests), strict=True):
        assert np.array_equal(lock.audio[0], ours.audio[0])
        assert (lock.seeds, lock.sample_rate_hz) == (ours.seeds, ours.sample_rate_hz)
        assert lock.timings.total_ms >= lock.timings.queue_ms + lock.timings.denoise_ms > 0


async def test_static_batches_and_a_lock_generate_nearly_the_same() -> None:
    requests = [*eight_mixed_requests(ToyModel().spec.card)]
    requests += [make_request(f"like {seed}", duration_s=1.0 + seed / 100, seed=seed) for seed in range(4)]
    for static, lock in zip(await generate("static", requests), await generate("lock", requests), strict=True):
        assert np.abs(static.audio[0] - lock.audio[0]).max() < 1e-5


def test_a_static_batch_has_only_similar_requests() -> None:
    model = ToyModel()
    one = make_request(duration_s=1.0, steps=8)
    assert batch_key(model, one) == batch_key(model, make_request("another prompt", duration_s=1.01, seed=5, steps=8))
    for other in ({"duration_s": 2.0}, {"steps": 9}, {"cfg_scale": 3.0}, {"sampler": "euler"}):
        assert batch_key(model, one) != batch_key(model, make_request(**{"duration_s": 1.0, "steps": 8, **other}))


def test_both_sides_get_the_same_list_of_requests() -> None:
    first, again, other = (
        draw_arrivals("small-mixed", rate_hz=4.0, count=60, seed=seed, max_duration_s=20.0) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    faster = draw_arrivals("small-mixed", rate_hz=8.0, count=60, seed=1, max_duration_s=20.0)
    assert [replace(arrival, at_s=2 * arrival.at_s) for arrival in faster] == list(first)


def test_different_clips_are_detected() -> None:
    clip = np.sin(np.arange(2000, dtype=np.float32)).reshape(2, 1000)
    assert difference(clip, clip) == 0.0
    assert difference(clip + np.float32(0.01) * clip, clip) == pytest.approx(0.01, rel=1e-3)
    for other in (clip[:, :-1], clip * np.nan):
        assert difference(other, clip) == float("inf")
    assert difference(clip, 0 * clip) == float("inf")
    assert compare([clip], {"same": [clip.copy()]})["same"]["num_identical"] == 1
    with pytest.raises(VoidError, match="other is void"):
        compare([clip, clip], {"other": [clip, clip * np.float32(1.1)]})


class OneStepFewer:
    """A compared program that cheats: it runs one sampling step fewer than requested."""

    def __init__(self, asker: Asker) -> None:
        self._asker = asker

    async def ask(self, arrival: Arrival) -> Answer:
        return await self._asker.ask(replace(arrival, steps=arrival.steps - 1))

    async def settle(self) -> None:
        """Nothing to wait for."""


def in_process(name: str) -> Asker:
    return InProcess(open_side(name, ToyModel(), options=EngineOptions(mode="fast", torch_threads=1)))


def make_run(folder: Path, askers: Mapping[str, Asker]) -> Run:
    options = RunOptions(
        "demo-wide",
        tuple(askers),
        max_duration_s=ToyModel().spec.card.max_duration_s,
        count=10,
        rounds=2,
        goodput_trials=2,
    )
    pieces = Pieces(folder, {"options": str(options)})
    return Run(dict(askers), options, pieces=pieces, is_watched=False)


async def test_the_result_of_a_side_that_saves_a_step_is_void(tmp_path: Path) -> None:
    askers = {"lock": in_process("lock"), "fewer": OneStepFewer(in_process("lock"))}
    with pytest.raises(VoidError, match="fewer is void"):
        await make_run(tmp_path, askers).measure()
    assert not os.listdir(tmp_path)


@pytest.mark.slow
async def test_one_run_reports_every_figure_of_every_side(tmp_path: Path) -> None:
    askers = {name: in_process(name) for name in ("lock", "static", "ours")}
    results = await make_run(tmp_path, askers).measure()
    assert results["outputs"]["ours"]["largest_difference"] <= 1e-4
    for side in results["sides"].values():
        assert len(side["capacity_rps"]) == 2
        assert {"all", "8", "50"} <= set(side["latency"])
        good_rps, bad_rps = side["goodput"].values()
        assert bad_rps is None or (good_rps or 0.0) < bad_rps
    ratios = results["ratios"]["ours"]["lock"]
    assert {"capacity", "p50", "p95", "p95_8", "p95_50", "goodput"} == set(ratios)
    assert all(ratio["low"] <= ratio["value"] <= ratio["high"] for ratio in filter(None, ratios.values()))
    assert await make_run(tmp_path, askers).measure() == results, "all pieces are there"


async def test_an_interrupted_run_resumes_with_the_same_options_only(tmp_path: Path) -> None:
    async def measure() -> list[float]:
        return [1.5]

    async def fail() -> list[float]:
        raise AssertionError("a finished measurement was made again")

    assert await Pieces(tmp_path, {"count": 1}).take("one", measure) == [1.5]
    assert await Pieces(tmp_path, {"count": 1}).take("one", fail) == [1.5]
    with pytest.raises(OtherRunError, match="count"):
        Pieces(tmp_path, {"count": 2})


@pytest.mark.slow
@pytest.mark.parametrize("dialect", list(DIALECTS))
async def test_every_dialect_is_asked_for_a_clip(dialect: str) -> None:
    async with serve_app() as (port, backend), open_clients(f"http://127.0.0.1:{port}") as clients:
        arrival = Arrival(0.0, "a bell", 2.0, seed=3, steps=8)
        answer = await OverHttp(clients, dialect).ask(arrival)
        audio = answer.read()
    assert audio.shape[1] > 0
    assert answer.num_samples in (0, audio.shape[1])
    assert [(request.prompt, request.steps) for _, request in backend.requests] == [("a bell", 8)]
