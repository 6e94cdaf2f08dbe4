"""Two sides that are compared in one run do the same work, and less exact work is void."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.arrivals import Arrival, draw_arrivals, to_request
from benchmarks.cases.engine import resolve_model
from benchmarks.compare.asking import Answer, Asker, Audio, InProcess
from benchmarks.compare.outputs import VoidError, compare, difference
from benchmarks.compare.pieces import Pieces
from benchmarks.compare.run import Run, RunOptions
from benchmarks.sides.servers import batch_key, open_side
from benchmarks.sides.timed_model import TimedModel
from benchmarks.simulate.devices import LinearDevice
from benchmarks.workload import eight_mixed_requests
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult
from stable_audio_serve.engine import EngineOptions
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.protocol import DiffusionModel
from stable_audio_serve.models.weights import cast_network
from tests.factories import ToyModel, make_request
from tests.goldens import SA3_GOLDENS

pytestmark = pytest.mark.server

STRICT = EngineOptions(mode="strict", torch_threads=1, warmup_budget_s=0.0)
QUICK = LinearDevice(
    text_fixed_ms=0.2, step_fixed_ms=0.3, step_per_frame_ms=0.001, coding_fixed_ms=0.5, coding_per_frame_ms=0.001
)


async def generate(name: str, requests: list[GenerationRequest]) -> list[GenerationResult]:
    side = open_side(name, ToyModel(), options=STRICT)
    try:
        return await asyncio.gather(*map(side.generate, requests))
    finally:
        await side.close()


async def test_the_lock_makes_the_engines_bytes() -> None:
    requests = eight_mixed_requests(ToyModel().spec.card)
    for lock, ours in zip(await generate("lock", requests), await generate("ours-strict", requests), strict=True):
        assert np.array_equal(lock.audio[0], ours.audio[0])
        assert (lock.seeds, lock.sample_rate_hz) == (ours.seeds, ours.sample_rate_hz)
        assert lock.timings.total_ms >= lock.timings.queue_ms + lock.timings.denoise_ms > 0


async def test_static_batches_make_nearly_what_the_lock_makes() -> None:
    requests = [*eight_mixed_requests(ToyModel().spec.card)]
    requests += [make_request(f"like {seed}", duration_s=1.0 + seed / 100, seed=seed) for seed in range(4)]
    for static, lock in zip(await generate("static", requests), await generate("lock", requests), strict=True):
        assert np.abs(static.audio[0] - lock.audio[0]).max() < 1e-5


def test_a_static_batch_holds_only_like_requests() -> None:
    model = ToyModel()
    one = make_request(duration_s=1.0, steps=8)
    assert batch_key(model, one) == batch_key(model, make_request("another prompt", duration_s=1.01, seed=5, steps=8))
    for other in ({"duration_s": 2.0}, {"steps": 9}, {"cfg_scale": 3.0}, {"sampler": "euler"}):
        assert batch_key(model, one) != batch_key(model, make_request(**{"duration_s": 1.0, "steps": 8, **other}))


def test_both_sides_get_the_same_list_of_requests() -> None:
    first, again, other = (
        draw_arrivals("edit", rate_hz=4.0, count=60, seed=seed, max_duration_s=20.0) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    model = ToyModel()
    drawn = draw_arrivals("edit", rate_hz=None, count=40, seed=3, max_duration_s=model.spec.card.max_duration_s)
    for arrival in drawn:
        plan = model.plan(to_request(arrival, model.spec.card))[0]
        assert plan.seed == arrival.seed
        assert (plan.init_source is not None) == (arrival.mode == "variation")
        assert (plan.keep_mask is not None) == (arrival.mode == "inpaint")


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


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float16 steps", "half decode", "a step fewer of a hundred"])
async def test_less_exact_work_is_void(precision: str) -> None:
    entry = resolve_model(str(SA3_GOLDENS / "sharp-s"))
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


class OneStepFewer:
    """A side that saves a step."""

    def __init__(self, asker: Asker) -> None:
        self._asker = asker

    async def ask(self, arrival: Arrival) -> Answer:
        return await self._asker.ask(replace(arrival, steps=arrival.steps - 1))


def in_process(name: str, model: TimedModel) -> Asker:
    options = EngineOptions(mode="fast", torch_threads=1, frame_grid=64, warmup_budget_s=0.2)
    return InProcess(open_side(name, model, options=options), model.spec.card)


def make_run(folder: Path, askers: Mapping[str, Asker]) -> Run:
    options = RunOptions("demo-wide", tuple(askers), max_duration_s=10.0, count=10, rounds=2, goodput_trials=2)
    return Run(dict(askers), options, pieces=Pieces(folder, {"options": str(options)}), is_watched=False)


async def test_a_side_that_saves_a_step_is_void(tmp_path: Path) -> None:
    model = TimedModel(QUICK, max_duration_s=10.0)
    askers = {"lock": in_process("lock", model), "fewer": OneStepFewer(in_process("lock", model))}
    with pytest.raises(VoidError, match="fewer is void"):
        await make_run(tmp_path, askers).measure()
    assert not os.listdir(tmp_path)


@pytest.mark.slow
async def test_one_run_states_every_figure_of_every_side(tmp_path: Path) -> None:
    model = TimedModel(QUICK, max_duration_s=10.0)
    results = await make_run(tmp_path, {name: in_process(name, model) for name in ("lock", "static", "ours")}).measure()
    assert results["outputs"]["ours"]["largest_difference"] <= 1e-4
    for side in results["sides"].values():
        assert len(side["capacity_rps"]) == 2
        assert {"all", "8", "50"} <= set(side["latency"])
        assert 0 < side["goodput"]["good_rps"] < side["goodput"]["bad_rps"]
    ratios = results["ratios"]["ours"]["lock"]
    assert {"capacity", "p50", "p95", "p95_8", "p95_50", "goodput"} == set(ratios)
    assert all(ratio["low"] <= ratio["value"] <= ratio["high"] for ratio in ratios.values())
