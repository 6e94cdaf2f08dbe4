"""The asyncio API of the engine: start, close, cancellation, deadlines, overload, failures, progress and timings."""

from __future__ import annotations

import asyncio
import gc
import pickle
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.errors import (
    DeadlineExceededError,
    GenerationError,
    InvalidRequestError,
    ModelUnavailableError,
    OverloadedError,
    StartTimeoutError,
)
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult, Progress
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.engine.calls.executor import Executor
from stable_audio_serve.sampling.noise import SeededNoise
from tests.factories import FakeClock, ToyModel, make_audio, make_request, make_varied_requests
from tests.parameters import slow
from tests.patience import PATIENCE_S, until
from tests.recorded_metrics import RecordedMetrics

OnCall = Callable[[str, Sequence[object]], None]


@asynccontextmanager
async def make_engine(
    on_call: OnCall | None = None,
    *,
    clock: Clock = SystemClock(),
    noise_factory: Callable[[int], SeededNoise] = SeededNoise,
    **fields: object,
) -> AsyncIterator[Engine]:
    model = ToyModel(on_call=on_call) if on_call else ToyModel()
    options = replace(EngineOptions(torch_threads=1, warmup_budget_s=0.0), **fields)  # type: ignore[arg-type]
    async with Engine(model, options, clock=clock, noise_factory=noise_factory) as engine:
        yield engine


class Gate:
    """Counts the model's calls by name. Denoiser call number `at` blocks the engine's thread until `open` is called."""

    def __init__(self, at: int = 1) -> None:
        self.calls: Counter[str] = Counter()
        self._at = at
        self._reached = threading.Event()
        self._open = threading.Event()

    def __call__(self, name: str, items: Sequence[object]) -> None:
        self.calls[name] += 1
        if name == "denoise" and self.calls[name] == self._at:
            self._reached.set()
            assert self._open.wait(PATIENCE_S)

    def arm(self) -> None:
        """Stop the engine's thread again before the next denoiser call."""
        self.calls.clear()
        self._at = 1

    async def reached(self) -> None:
        assert await asyncio.to_thread(self._reached.wait, PATIENCE_S)

    def open(self) -> None:
        self._open.set()


class SlowPlanner(ToyModel):
    """A model that plans a request only when `released` is set. `is_planning` is set when planning begins."""

    def __init__(self) -> None:
        super().__init__()
        self.is_planning, self.released = threading.Event(), threading.Event()

    def plan(self, request: GenerationRequest, *, frames: int | None = None):  # type: ignore[no-untyped-def]
        self.is_planning.set()
        assert self.released.wait(PATIENCE_S)
        return super().plan(request, frames=frames)


async def submit(
    engine: Engine, request: GenerationRequest, *, on_progress: Callable[[Progress], None] | None = None
) -> asyncio.Task[GenerationResult]:
    """Submit a request. Returns its task after the engine has accepted it."""
    backlog_ms = engine.backlog_ms
    task = asyncio.create_task(engine.generate(request, on_progress))
    await until(lambda: engine.backlog_ms > backlog_ms)
    return task


class PoisonedNoise(SeededNoise):
    """The noise of the row that should fail. Tests recognise the row's decode windows by this class."""


def make_noise(seed: int) -> SeededNoise:
    return PoisonedNoise(seed) if seed == 666 else SeededNoise(seed)


@pytest.mark.server
async def test_results_can_be_unpickled_without_importing_torch() -> None:
    """The HTTP and job processes unpickle results. Importing torch there would take longer than a request."""
    progress: list[Progress] = []
    async with make_engine() as engine:
        result = await engine.generate(make_request(), progress.append)
    read = "import pickle, sys; pickle.load(sys.stdin.buffer); sys.exit('torch' in sys.modules)"
    for each in (result, progress[0]):
        reader = await asyncio.create_subprocess_exec(sys.executable, "-c", read, stdin=subprocess.PIPE)
        await reader.communicate(pickle.dumps(each))
        assert reader.returncode == 0


async def test_generate_starts_the_engine() -> None:
    result = await Engine(ToyModel(), EngineOptions(torch_threads=1)).generate(make_request(batch_size=2, seed=4))
    assert result.seeds == (4, 5)
    assert result.sample_rate_hz == 800
    assert result.model == "toy"
    for audio in result.audio:
        assert audio.shape == (2, 320)
        assert audio.dtype == np.float32
        assert np.abs(audio).max() <= 1.0
    assert np.abs(result.audio[0] - result.audio[1]).max() > 0.01


async def test_warm_up_predicts_the_first_request_within_a_tenth() -> None:
    clock, gate = FakeClock(), Gate(at=0)

    def on_call(name: str, items: Sequence[object]) -> None:
        clock.now += 0.005
        gate(name, items)

    engine = Engine(ToyModel(on_call=on_call), EngineOptions(torch_threads=1), clock=clock)
    async with engine:
        gate.arm()
        task = asyncio.create_task(engine.generate(make_request(duration_s=2.0, steps=30)))
        await gate.reached()
        predicted_ms = engine.backlog_ms
        gate.open()
        assert predicted_ms == pytest.approx((await task).timings.total_ms, rel=0.1)


async def test_200_concurrent_requests_each_get_their_audio() -> None:
    requests = [make_request(f"sound {i % 9}", duration_s=0.1 + 0.01 * (i % 7), seed=i, steps=1) for i in range(200)]
    async with make_engine() as engine:
        results = await asyncio.gather(*map(engine.generate, requests))
        assert engine.backlog_ms == 0.0
    assert [result.seeds for result in results] == [(i,) for i in range(200)]
    assert len({result.audio[0].tobytes() for result in results}) == 200


@pytest.mark.parametrize("ending", ["finished", "cancelled"])
async def test_audio_is_freed_without_a_collection_of_cycles(ending: str) -> None:
    """If reference cycles held the audio, it would stay in memory until Python's next garbage collection.

    By then, a hundred requests may have ended.
    """
    gate = Gate(at=2)
    async with make_engine(gate) as engine:
        source = make_audio(1.0)
        kept = [weakref.ref(source.samples)]
        gc.disable()
        try:
            task = asyncio.create_task(engine.generate(make_request(steps=3, init_audio=source, init_noise_level=0.5)))
            del source
            await gate.reached()
            if ending == "cancelled":
                task.cancel()
            gate.open()
            if ending == "finished":
                kept.append(weakref.ref((await task).audio[0]))
            del task
            await until(lambda: all(audio() is None for audio in kept))
        finally:
            gc.enable()


async def test_prompts_are_encoded_once() -> None:
    gate = Gate(at=0)
    async with make_engine(gate) as engine:
        await asyncio.gather(*(engine.generate(make_request("same", seed=i)) for i in range(5)))
        await engine.generate(make_request("same", cfg_scale=2.0, negative_prompt="other"))
    assert gate.calls["encode_text"] == 2


async def test_source_is_encoded_once_for_all_variations() -> None:
    gate = Gate(at=0)
    async with make_engine(gate) as engine:
        await engine.generate(make_request(batch_size=3, init_audio=make_audio(), init_noise_level=0.5))
    assert gate.calls["encode_audio"] == 2  # the source is encoded in two windows
    assert gate.calls["condition"] == 1


@pytest.mark.parametrize("mode", ["strict", "fast"])
async def test_cancelled_request_stops_within_one_step(mode: str) -> None:
    gate = Gate(at=3)
    async with make_engine(gate, mode=mode) as engine:
        task = asyncio.create_task(engine.generate(make_request(steps=50)))
        await gate.reached()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.open()
        await until(lambda: engine.backlog_ms == 0.0)
        await engine.generate(make_request(steps=1, sampler="euler"))
    assert gate.calls["denoise"] == 3 + 1


async def test_request_cancelled_in_the_queue_never_starts() -> None:
    gate = Gate()
    async with make_engine(gate) as engine:
        first = asyncio.create_task(engine.generate(make_request(steps=2)))
        await gate.reached()
        second = await submit(engine, make_request("unseen"))
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        gate.open()
        await first
        await until(lambda: engine.backlog_ms == 0.0)
    assert gate.calls["encode_text"] == 1


@pytest.mark.parametrize("waiting", [False, True])
async def test_deadline_ends_running_and_waiting_requests(waiting: bool) -> None:
    clock, gate = FakeClock(), Gate()
    async with make_engine(gate, clock=clock) as engine:
        ahead = [asyncio.create_task(engine.generate(make_request(steps=2)))] if waiting else []
        if waiting:
            await gate.reached()
        late = await submit(engine, make_request(deadline_s=20.0))
        await gate.reached()
        clock.now += 21.0
        gate.open()
        with pytest.raises(DeadlineExceededError, match=r"20 s"):
            await late
        await asyncio.gather(*ahead)
        assert (await engine.generate(make_request(deadline_s=30.0))).seeds == (1,)


@pytest.mark.parametrize("waiting", [False, True])
async def test_start_timeout_ends_only_waiting_requests(waiting: bool) -> None:
    clock, gate = FakeClock(), Gate()
    async with make_engine(gate, clock=clock, max_rows=2) as engine:
        ahead = [asyncio.create_task(engine.generate(make_request(steps=2)))] if waiting else []
        if waiting:
            await gate.reached()
        limited = await submit(engine, make_request(start_within_s=20.0))
        await gate.reached()
        clock.now += 21.0
        gate.open()
        if waiting:
            with pytest.raises(StartTimeoutError, match=r"20 s"):
                await limited
        else:
            assert (await limited).seeds == (1,)
        await asyncio.gather(*ahead)


async def test_full_queue_refuses_at_once_with_a_realistic_retry_time() -> None:
    gate = Gate(at=5)
    async with make_engine(gate, max_queue_s=0.001) as engine:
        running = asyncio.create_task(engine.generate(make_request(steps=100, duration_s=2.0)))
        await gate.reached()
        with pytest.raises(OverloadedError) as refusal:
            await asyncio.wait_for(engine.generate(make_request()), PATIENCE_S)
        assert refusal.value.retry_after_s is not None
        assert refusal.value.retry_after_s == pytest.approx(max(0.1, engine.backlog_ms / 1000 - 0.001), rel=0.2)
        gate.open()
        await running
        await engine.generate(make_request())


async def test_full_queue_has_room_for_another_client_only() -> None:
    gate = Gate(at=5)
    async with make_engine(gate, max_queue_s=0.001) as engine:
        greedy = make_request(steps=100, duration_s=2.0, client="greedy")
        running = asyncio.create_task(engine.generate(greedy))
        await gate.reached()
        before_ms = engine.backlog_ms
        with pytest.raises(OverloadedError):
            await asyncio.wait_for(engine.generate(greedy), PATIENCE_S)
        other = asyncio.create_task(engine.generate(make_request(client="other")))
        await until(lambda: engine.backlog_ms > before_ms or other.done())
        gate.open()
        await asyncio.gather(running, other)


async def test_planning_is_bounded() -> None:
    model = SlowPlanner()
    async with Engine(model, EngineOptions(max_planning=3, torch_threads=1, warmup_budget_s=0.0)) as engine:
        tasks = [asyncio.create_task(engine.generate(make_request(seed=i))) for i in range(10)]
        await until(lambda: sum(task.done() for task in tasks) == 7)
        model.released.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(outcome, OverloadedError) for outcome in outcomes] == [False] * 3 + [True] * 7


@pytest.mark.parametrize("field", ["init_audio", "inpaint_audio"])
async def test_requests_without_audio_do_not_wait_for_resampling(field: str) -> None:
    class SlowSources(SlowPlanner):
        def plan(self, request: GenerationRequest, *, frames: int | None = None):  # type: ignore[no-untyped-def]
            has_source = request.init_audio is not None or request.inpaint_audio is not None
            return (super() if has_source else ToyModel()).plan(request, frames=frames)

    model = SlowSources()
    async with Engine(model, EngineOptions(torch_threads=1, warmup_budget_s=0.0)) as engine:
        edit = asyncio.create_task(engine.generate(make_request(**{field: make_audio(1.0)})))
        assert await asyncio.to_thread(model.is_planning.wait, PATIENCE_S)
        async with asyncio.timeout(PATIENCE_S / 2):
            assert (await engine.generate(make_request(seed=9))).seeds == (9,)
        model.released.set()
        await edit


async def test_deadline_includes_the_wait_for_planning() -> None:
    model = SlowPlanner()
    async with Engine(model, EngineOptions(torch_threads=1, warmup_budget_s=0.0)) as engine:
        tasks = [asyncio.create_task(engine.generate(make_request(deadline_s=0.05))) for _ in range(3)]
        outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), PATIENCE_S)
        assert all(isinstance(outcome, DeadlineExceededError) for outcome in outcomes)
        model.released.set()
        assert (await engine.generate(make_request(deadline_s=30.0))).seeds == (1,)


async def test_metrics_describe_the_finished_requests() -> None:
    metrics = RecordedMetrics()
    options = EngineOptions(mode="strict", frame_grid=64, torch_threads=1, warmup_budget_s=0.0)
    clips = (("a bell", 0.4), ("rain", 1.2), ("a bell", 0.8))
    async with Engine(ToyModel(), options, metrics=metrics) as engine:
        requests = [make_request(prompt, duration_s=duration_s, steps=3) for prompt, duration_s in clips]
        timings = [(await engine.generate(request)).timings for request in requests]
    assert metrics.counters == {
        ("engine_requests", "finished"): 3,
        "engine_audio_seconds": pytest.approx(2.4),
        "engine_prompt_cache_misses": 2,
        "engine_prompt_cache_hits": 1,
    }
    assert metrics.gauges == {
        ("engine_profile", "plain"): 1.0,
        "engine_backlog_ms": pytest.approx(0.0),
        "engine_pad_share": pytest.approx(1 - 90 / 128),  # of the last clip
        "engine_device_memory_bytes": 0.0,
    }
    samples = metrics.samples
    assert samples["engine_queue_ms"] == [each.queue_ms for each in timings]
    assert samples["engine_request_ms"] == [each.total_ms for each in timings]
    assert samples["engine_rows_per_step"] == [1] * 9
    assert (len(samples["engine_text_ms"]), len(samples["engine_denoise_ms"])) == (2, 9)
    in_calls = sum(sum(samples[f"engine_{work}_ms"]) for work in ("text", "denoise", "decode"))
    assert 0 < in_calls <= sum(each.total_ms for each in timings)


async def test_metrics_count_requests_cancelled_in_planning() -> None:
    model, metrics = SlowPlanner(), RecordedMetrics()
    async with Engine(model, EngineOptions(torch_threads=1, warmup_budget_s=0.0), metrics=metrics) as engine:
        task = asyncio.create_task(engine.generate(make_request()))
        assert await asyncio.to_thread(model.is_planning.wait, PATIENCE_S)
        task.cancel()
        await asyncio.wait([task])
        model.released.set()
        await engine.generate(make_request())
    outcomes = [(outcome, metrics.counters["engine_requests", outcome]) for outcome in ("cancelled", "finished")]
    assert outcomes == [("cancelled", 1), ("finished", 1)]


async def test_closing_fails_requests_in_planning_as_unavailable() -> None:
    model = SlowPlanner()
    engine = Engine(model, EngineOptions(torch_threads=1, warmup_budget_s=0.0))
    tasks = [asyncio.create_task(engine.generate(make_request(seed=i))) for i in range(3)]
    assert await asyncio.to_thread(model.is_planning.wait, PATIENCE_S)
    await engine.close()
    model.released.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(outcome, ModelUnavailableError) and outcome.retry_after_s for outcome in outcomes)


@pytest.mark.parametrize("started", [False, True])
async def test_a_closed_engine_does_not_start(started: bool) -> None:
    engine = Engine(ToyModel(), EngineOptions(torch_threads=1, warmup_budget_s=0.0))
    if started:
        await engine.start()
    await engine.close()
    with pytest.raises(ModelUnavailableError):
        await asyncio.wait_for(engine.start(), PATIENCE_S)


async def test_invalid_request_raises_the_models_error() -> None:
    async with make_engine() as engine:
        with pytest.raises(InvalidRequestError) as refusal:
            await engine.generate(make_request(duration_s=1e6))
    assert refusal.value.field == "duration"


def break_on(prompt: str, stage: str) -> OnCall:
    """Returns a callback that raises in each call of `stage` that has a row with this prompt."""
    poisoned: list[object] = []

    def on_call(name: str, items: Sequence[object]) -> None:
        if name == "condition" and getattr(items[0], "prompt", None) == prompt:
            poisoned.append(items[0])
        if name != stage:
            return
        for item in items:
            if item == prompt or getattr(item, "prompt", None) == prompt:
                raise RuntimeError("poisoned")
            if name in ("decode", "encode_audio") and isinstance(getattr(item, "noise", None), PoisonedNoise):
                raise RuntimeError("poisoned")

    return on_call


@pytest.mark.parametrize("mode", ["fast", slow("strict")])
@pytest.mark.parametrize("stage", ["encode_text", "encode_audio", "condition", "decode"])
async def test_row_that_breaks_a_stage_fails_alone(mode: str, stage: str) -> None:
    poison = make_request("poison", seed=666, init_audio=make_audio(), init_noise_level=0.5)
    crowd = make_varied_requests()
    async with make_engine(break_on("poison", stage), noise_factory=make_noise, mode=mode) as engine:
        bad, *good = await asyncio.gather(*map(engine.generate, [poison, *crowd]), return_exceptions=True)
        assert isinstance(bad, GenerationError)
        assert not [result for result in good if isinstance(result, BaseException)]
        assert (await engine.generate(make_request())).seeds == (1,)
        engine.check_health()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": "unreadable"}, "prompt"),
        ({"negative_prompt": "unreadable", "cfg_scale": 3.0}, "negative_prompt"),
        ({"batch_size": 2, "variation_prompts": ("tone", "unreadable")}, "prompts"),
    ],
)
async def test_a_prompt_that_the_model_refuses_is_named_by_its_field(fields: dict[str, Any], field: str) -> None:
    def refuse(name: str, items: Sequence[object]) -> None:
        if name == "encode_text" and "unreadable" in items:
            raise InvalidRequestError("the text has an unknown token", field="prompt")

    async with make_engine(refuse) as engine:
        bad, good = await asyncio.gather(
            engine.generate(make_request(**fields)), engine.generate(make_request()), return_exceptions=True
        )
    assert isinstance(bad, InvalidRequestError)
    assert (bad.field, bad.message) == (field, "the text has an unknown token")
    assert isinstance(good, GenerationResult)


@pytest.mark.parametrize("mode", ["fast", slow("strict")])
@pytest.mark.parametrize("when", ["made", "drawn"])
async def test_row_whose_noise_breaks_fails_alone(mode: str, when: str) -> None:
    class Broken(SeededNoise):
        def initial(self, shape: tuple[int, ...]) -> torch.Tensor:
            raise RuntimeError("no noise")

    def make_broken_noise(seed: int) -> SeededNoise:
        if seed == 666 and when == "made":
            raise KeyError(seed)
        return Broken(seed) if seed == 666 else SeededNoise(seed)

    options = EngineOptions(mode=mode, torch_threads=1, warmup_budget_s=0.0)  # type: ignore[arg-type]
    async with Engine(ToyModel(), options, noise_factory=make_broken_noise) as engine:
        requests = [make_request(seed=1), make_request(seed=666), make_request(seed=2)]
        first, bad, last = await asyncio.gather(*map(engine.generate, requests), return_exceptions=True)
    assert isinstance(bad, GenerationError)
    assert not isinstance(first, BaseException)
    assert not isinstance(last, BaseException)


@pytest.mark.parametrize("mode", ["strict", "fast"])
async def test_row_that_breaks_the_denoiser_fails_alone(mode: str) -> None:
    class Fragile(ToyModel):
        def denoise(self, batch):  # type: ignore[no-untyped-def]
            if batch.x.shape[-1] >= 140:  # only the longest row has that many frames
                raise RuntimeError("too long for this network")
            return super().denoise(batch)

    options = EngineOptions(mode=mode, torch_threads=1, warmup_budget_s=0.0)  # type: ignore[arg-type]
    crowd = make_varied_requests()
    async with Engine(Fragile(), options) as engine:
        results = await asyncio.gather(*map(engine.generate, crowd), return_exceptions=True)
    assert [isinstance(result, GenerationError) for result in results] == [
        request.duration_s > 1.25 for request in crowd
    ]


@pytest.mark.parametrize("mode", ["fast", slow("strict")])
@pytest.mark.parametrize("where", ["denoise", "decode"])
async def test_row_that_turns_non_finite_fails_alone(mode: str, where: str) -> None:
    class Unstable(ToyModel):
        def denoise(self, batch):  # type: ignore[no-untyped-def]
            velocity = super().denoise(batch)
            rows = batch.valid.sum(-1) == 70  # the length of the request that should fail
            if where == "denoise":
                velocity[rows] = float("nan")
            return velocity

        def decode(self, windows):  # type: ignore[no-untyped-def]
            audio = super().decode(windows)
            for window, piece in zip(windows, audio, strict=True):
                if where == "decode" and isinstance(window.noise, PoisonedNoise):
                    piece[0, 3] = float("inf")
            return audio

    options = EngineOptions(mode=mode, torch_threads=1, warmup_budget_s=0.0)  # type: ignore[arg-type]
    poison = make_request(seed=666, duration_s=0.6, duration_padding_s=0.1)
    async with Engine(Unstable(), options, noise_factory=make_noise) as engine:
        bad, *good = await asyncio.gather(
            *map(engine.generate, [poison, *make_varied_requests()]), return_exceptions=True
        )
    assert isinstance(bad, GenerationError)
    assert not [result for result in good if isinstance(result, BaseException)]
    assert all(np.isfinite(audio).all() for result in good for audio in result.audio)  # type: ignore[union-attr]


async def test_planning_failure_is_a_generation_error() -> None:
    class Broken(ToyModel):
        def plan(self, request: GenerationRequest, *, frames: int | None = None):  # type: ignore[no-untyped-def]
            raise ZeroDivisionError

    with pytest.raises(GenerationError):
        await Engine(Broken(), EngineOptions(torch_threads=1, warmup_budget_s=0.0)).generate(make_request())


@pytest.mark.parametrize("is_lost", [True, False])
async def test_only_a_lost_device_ends_the_engine(monkeypatch: pytest.MonkeyPatch, is_lost: bool) -> None:
    """If the device still answers after a failed launch, only the rows of that call fail."""

    def on_call(name: str, items: Sequence[object]) -> None:
        if name == "denoise":
            raise torch.AcceleratorError("launch failed")

    def synchronize(device: torch.device) -> None:
        if is_lost:
            raise torch.AcceleratorError("launch failed")

    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    async with make_engine(on_call) as engine:
        engine.check_health()
        outcomes = await asyncio.gather(*map(engine.generate, make_varied_requests()), return_exceptions=True)
        expected = ModelUnavailableError if is_lost else GenerationError
        assert all(isinstance(outcome, expected) for outcome in outcomes)
        if not is_lost:
            engine.check_health()
            return
        await until(lambda: not engine.is_alive)
        assert engine.has_crashed
        with pytest.raises(ModelUnavailableError):
            engine.check_health()
        with pytest.raises(ModelUnavailableError):
            await engine.generate(make_request())


async def test_a_long_turn_counts_as_work_while_it_runs() -> None:
    gate, clock = Gate(), FakeClock()
    async with make_engine(gate, clock=clock) as engine:
        running = asyncio.create_task(engine.generate(make_request()))
        await gate.reached()
        before = engine.busy_s
        clock.now += 3.0
        assert engine.busy_s == pytest.approx(before + 3.0)
        gate.open()
        await running
        assert not engine.has_crashed
    after = engine.busy_s  # the thread has ended, so no turn runs
    clock.now += 3.0
    assert engine.busy_s == after


async def test_start_fails_if_the_warm_up_fails() -> None:
    def on_call(name: str, items: Sequence[object]) -> None:
        raise RuntimeError("no such kernel")

    with pytest.raises(ModelUnavailableError):
        await Engine(ToyModel(on_call=on_call), EngineOptions(torch_threads=1)).start()


async def test_health_check_fails_after_a_long_silence() -> None:
    clock, gate = FakeClock(), Gate()
    async with make_engine(gate, clock=clock) as engine:
        task = asyncio.create_task(engine.generate(make_request()))
        await gate.reached()
        clock.now += 301.0
        with pytest.raises(ModelUnavailableError):
            engine.check_health()
        gate.open()
        await task
        engine.check_health()


STAGES = ["queued", "encoding", "denoising", "decoding", "done"]


async def test_progress_only_moves_forward_and_ends_done() -> None:
    requests = make_varied_requests()
    progress: list[list[Progress]] = [[] for _ in requests]
    async with make_engine() as engine:
        await asyncio.gather(
            *(engine.generate(request, reports.append) for request, reports in zip(requests, progress, strict=True))
        )
    for request, reports in zip(requests, progress, strict=True):
        fractions = [report.fraction for report in reports]
        assert fractions == sorted(fractions)
        assert reports[0].stage == "queued"
        assert reports[0].queue_position is not None
        assert reports[-1].stage == "done"
        assert reports[-1].fraction == 1.0
        assert reports[-1].steps_done == reports[-1].steps_total == request.batch_size * (request.steps or 4)
        stages = [STAGES.index(report.stage) for report in reports]
        assert stages == sorted(stages)


async def test_queue_position_counts_the_rows_ahead() -> None:
    gate, progress = Gate(), [list[Progress]() for _ in range(4)]
    async with make_engine(gate) as engine:
        tasks = [asyncio.create_task(engine.generate(make_request(steps=2)))]
        await gate.reached()  # the engine's thread stands still, so it takes no new request
        tasks += [await submit(engine, make_request(), on_progress=reports.append) for reports in progress]
        gate.open()
        await asyncio.gather(*tasks)
    assert [(reports[0].stage, reports[0].queue_position) for reports in progress] == [
        ("queued", i) for i in (1, 2, 3, 4)
    ]


async def test_failing_progress_callback_does_not_fail_the_request() -> None:
    def broken(progress: Progress) -> None:
        raise RuntimeError("listener")

    problems: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context))
    async with make_engine() as engine:
        assert (await engine.generate(make_request(), broken)).seeds == (1,)
    assert problems


async def test_stages_sum_to_the_total() -> None:
    async with make_engine() as engine:
        results = await asyncio.gather(*map(engine.generate, make_varied_requests()))
    for result in results:
        timings = result.timings
        stages = timings.queue_ms + timings.text_ms + timings.source_ms + timings.denoise_ms + timings.decode_ms
        assert stages == pytest.approx(timings.total_ms, rel=0.02)
        assert timings.denoise_ms > 0
        assert timings.decode_ms > 0
    assert sum(result.timings.source_ms > 0 for result in results) == 2


async def test_waiting_between_its_steps_counts_as_denoising() -> None:
    clock, gate = FakeClock(), Gate(at=2)

    def on_call(name: str, items: Sequence[object]) -> None:
        clock.now += 0.01
        gate(name, items)

    async with make_engine(on_call, clock=clock) as engine:
        long = asyncio.create_task(engine.generate(make_request(steps=40, duration_s=2.0)))
        await gate.reached()
        short = await submit(engine, make_request(steps=1, duration_s=0.1))
        clock.now += 0.1
        gate.open()
        timings = (await long).timings
        assert timings.denoise_ms > 510.0  # 40 steps of 10 ms, the 100 ms of the second, and steps of the other request
        assert (await short).timings.queue_ms == pytest.approx(100.0)


async def test_closing_refuses_new_work_and_fails_waiting_requests() -> None:
    gate = Gate()
    engine = Engine(ToyModel(on_call=gate), EngineOptions(torch_threads=1, warmup_budget_s=0.0))
    running = asyncio.create_task(engine.generate(make_request(steps=1000)))
    await gate.reached()
    closing = asyncio.create_task(engine.close())
    await asyncio.sleep(0.05)
    gate.open()
    await closing
    with pytest.raises(ModelUnavailableError):
        await running
    with pytest.raises(ModelUnavailableError):
        await engine.generate(make_request())
    assert not engine.is_alive


def test_engine_serves_several_event_loops_and_survives_a_closed_one() -> None:
    gate = Gate(at=2)
    engine = Engine(ToyModel(on_call=gate), EngineOptions(torch_threads=1, warmup_budget_s=0.0))

    dying = asyncio.new_event_loop()
    task = dying.create_task(engine.generate(make_request(steps=30), lambda progress: None))
    dying.run_until_complete(gate.reached())
    asyncio.all_tasks(dying)
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    dying.close()
    gate.open()

    async def others() -> tuple[int, ...]:
        results = await asyncio.gather(*map(engine.generate, make_varied_requests()))
        await until(lambda: engine.backlog_ms == 0.0)
        return tuple(result.seeds[0] for result in results)

    assert asyncio.run(others()) == tuple(request.seed for request in make_varied_requests())
    assert asyncio.run(engine.generate(make_request(seed=3))).seeds == (3,)
    assert gate.calls["denoise"] > 0
    asyncio.run(engine.close())


def test_request_of_a_closed_event_loop_is_cancelled() -> None:
    gate = Gate(at=2)
    engine = Engine(ToyModel(on_call=gate), EngineOptions(torch_threads=1, warmup_budget_s=0.0))
    dying = asyncio.new_event_loop()
    task = dying.create_task(engine.generate(make_request(steps=50)))
    dying.run_until_complete(gate.reached())
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    dying.close()
    del task
    gc.collect()
    gate.open()
    asyncio.run(until(lambda: engine.backlog_ms == 0.0))
    assert gate.calls["denoise"] == 2
    asyncio.run(engine.close())


async def test_thread_ends_when_the_engine_is_garbage_collected() -> None:
    others = set(threading.enumerate())
    engine = Engine(ToyModel(), EngineOptions(torch_threads=1, warmup_budget_s=0.0))
    await engine.generate(make_request())
    (thread,) = (t for t in set(threading.enumerate()) - others if t.name == "engine")
    del engine
    gc.collect()
    await until(lambda: not thread.is_alive())


async def test_an_error_after_the_last_step_ends_only_its_own_request(monkeypatch: pytest.MonkeyPatch) -> None:
    release, num_calls = Executor.release, 0

    def fail_once(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            raise torch.OutOfMemoryError("no room")
        return release(*args, **kwargs)

    monkeypatch.setattr(Executor, "release", fail_once)
    async with make_engine() as engine:
        requests = [make_request(f"rain {seed}", seed=seed) for seed in range(4)]
        outcomes = await asyncio.gather(*map(engine.generate, requests), return_exceptions=True)
    assert [isinstance(outcome, GenerationError) for outcome in outcomes].count(True) == 1
    assert [isinstance(outcome, GenerationResult) for outcome in outcomes].count(True) == 3


async def test_a_second_engine_of_a_process_uses_as_many_threads() -> None:
    found: list[int] = []

    class Watching(ToyModel):
        def denoise(self, batch: Any) -> torch.Tensor:
            found.append(torch.get_num_threads())
            return super().denoise(batch)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(2):
            async with Engine(Watching(), EngineOptions(mode="fast", warmup_budget_s=0.0)) as engine:
                result = await engine.generate(make_request())
            assert result.provenance is not None
            assert result.provenance.threads == 2
    finally:
        torch.set_num_threads(before)
    assert set(found) == {2}
