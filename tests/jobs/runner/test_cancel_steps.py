"""A job that is cancelled at any step of a real engine ends within a step. Other jobs in its batch do not change."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from stable_audio_serve.core.catalog import ModelCatalog
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.jobs.job import Job
from stable_audio_serve.jobs.open import open_queue
from stable_audio_serve.jobs.queue import JobQueue
from stable_audio_serve.jobs.runner.runner import JobRunner
from stable_audio_serve.models.protocol import DecodeWindow, StepBatch
from stable_audio_serve.models.registry import describe_entry, resolve_entry
from stable_audio_serve.serving.local import LocalBackend
from tests.goldens import load_goldens
from tests.jobs.conftest import make_spec
from tests.models.loaded import loaded
from tests.patience import PATIENCE_S

_NAME = "tiny-s"
_STEPS = 3
_VICTIM_S = 1.5  # the cancelled job is the longest, so `GatedModel` recognises it by its length
NEIGHBOURS = (
    GenerationRequest(prompt="rain", duration_s=1.0, seed=1, steps=_STEPS),
    GenerationRequest(prompt="drums", duration_s=0.6, seed=2, steps=_STEPS + 3, cfg_scale=2.0, batch_size=2),
)


class GatedModel:
    """A real model that blocks the engine's thread in the call that `hold` chose, until `opened` is set.

    It blocks in a call for the longest row, which is the cancelled job. `reached` is set when it blocks.
    """

    def __init__(self) -> None:
        self._model = loaded(_NAME)
        self._longest = max(plan.frames for plan in self._model.plan(make_victim()))
        self.num_steps = 0  # number of steps that the longest row has begun
        self._hold_at = ""
        self.reached = threading.Event()
        self.opened = threading.Event()

    def hold(self, call: str) -> None:
        """Choose the call to block in: `step 0` is the first step of the longest row, `decode` its decoding."""
        self.num_steps = 0
        self._hold_at = call
        self.reached.clear()
        self.opened.clear()

    def denoise(self, batch: StepBatch) -> Any:
        if batch.x.shape[-1] >= self._longest:
            self._pass(f"step {self.num_steps}")
            self.num_steps += 1
        return self._model.denoise(batch)

    def decode(self, windows: Sequence[DecodeWindow]) -> Any:
        if self.num_steps == _STEPS:
            self._pass("decode")
        return self._model.decode(windows)

    def _pass(self, call: str) -> None:
        if call == self._hold_at:
            self.reached.set()
            assert self.opened.wait(PATIENCE_S)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def make_victim() -> GenerationRequest:
    return GenerationRequest(prompt="a bell", duration_s=_VICTIM_S, seed=3, steps=_STEPS)


@asynccontextmanager
async def running(folder: Path, model: Any) -> AsyncIterator[JobQueue]:
    """Run a job runner with an engine in this process. Yields the job queue."""
    settings = Settings(output_dir=str(folder))
    card = describe_entry(resolve_entry(_NAME, path=str(load_goldens(_NAME).folder))).card
    engine = Engine(model, EngineOptions(mode="strict", torch_threads=1, warmup_budget_s=0.0))
    async with LocalBackend(ModelCatalog([card]), {_NAME: engine}) as backend:
        queue = open_queue(settings)
        runner = JobRunner(queue.store, queue.artifacts, backend=backend, settings=settings)
        await runner.start()
        queue.wake = runner.wake
        yield queue
        await runner.close()
        await queue.close()


async def finish(queue: JobQueue, job: Job) -> Job:
    async with asyncio.timeout(PATIENCE_S):
        while not job.is_over:
            await asyncio.sleep(0.005)
            job = await queue.get(job.spec.ref) or job
    return job


async def audio_of(queue: JobQueue, job: Job) -> bytes:
    assert job.result is not None, job.error
    return b"".join([chunk async for chunk in queue.artifacts.read(job.result.file)])


@pytest.mark.server
async def test_job_ends_within_a_step_and_neighbours_are_unaffected(tmp_path: Path) -> None:
    model = GatedModel()
    async with running(tmp_path, model) as queue:
        alone = []
        for request in NEIGHBOURS:
            job = await finish(queue, await queue.submit(make_spec(model=_NAME, request=request)))
            alone.append(await audio_of(queue, job))
        for call in (*(f"step {step}" for step in range(_STEPS)), "decode"):
            model.hold(call)
            victim = await queue.submit(make_spec(model=_NAME, request=make_victim()))
            others = [await queue.submit(make_spec(model=_NAME, request=request)) for request in NEIGHBOURS]
            assert await asyncio.to_thread(model.reached.wait, PATIENCE_S), call
            outcome, _ = await queue.cancel(victim.spec.ref)
            assert outcome == "requested", call
            victim = await finish(queue, victim)  # the job ends although the engine is still blocked in a step of it
            num_before = model.num_steps
            model.opened.set()
            crowd = [await audio_of(queue, await finish(queue, other)) for other in others]
            assert (victim.state, victim.result) == ("cancelled", None)
            assert model.num_steps == min(num_before + 1, _STEPS), call  # only the current step was finished
            assert crowd == alone, call
