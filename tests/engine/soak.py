"""Send many different requests to one engine with the demo model, cancel some, and check the results and the memory.

First each request runs alone. Then the requests run repeatedly in random order, eight at a time, directly or over HTTP
in this process. Each result must have the same bytes as when the request ran alone.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest.mock import patch

import httpx
import numpy as np
import torch

from benchmarks.cases.memory import resident_bytes
from stable_audio_serve.api.app import create_app
from stable_audio_serve.api.compat.stable_audio_open_small import windowed_model
from stable_audio_serve.audio.loops import plan_loop
from stable_audio_serve.core.generation import GenerationRequest, Progress, SourceAudio
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.engine import Engine
from stable_audio_serve.serving.engines import load_engine
from stable_audio_serve.serving.local import LocalBackend
from stable_audio_serve.serving.placement import plan_deployments

IN_FLIGHT = 8
CANCEL_SHARE = 0.05
RATE_HZ = 44_100
STEPS = (4, 8)

# A function that sends a request and returns a digest of the result. Its argument is called with each progress report.
Send = Callable[[Callable[[Progress], None]], Awaitable[str]]
OnDone = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Case:
    """A request that the test sends many times."""

    kind: str
    send: Send


@dataclass
class Outcome:
    """The number of requests, by kind, that ended in each way, and measurements of the process's memory."""

    answered: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    cancelled: Counter[str] = field(default_factory=Counter)
    resident: list[tuple[int, int]] = field(default_factory=list)  # (requests so far, bytes of resident memory)
    kept: list[Counter[str]] = field(default_factory=list)  # number of tensors and engine objects that exist, by class


async def soak(*, num_requests: int, seed: int, output_dir: Path, on_done: OnDone = lambda done: None) -> Outcome:
    """Send `num_requests` requests in at least two groups of at most 100. Measure the memory after each group."""
    outcome, order = Outcome(), random.Random(seed)
    async with run_server(output_dir) as (engine, client):
        cases = draw_cases(engine, client, seed=seed)
        right = {case: await case.send(lambda progress: None) for case in cases}
        outcome.kept.append(count_kept())
        done = 0
        while done < num_requests:
            size = min(100, num_requests - done, max(num_requests // 2, 1))
            await _send_all(_draw(cases, size, order=order), right=right, order=order, outcome=outcome)
            done += size
            assert engine.backlog_ms == 0
            outcome.kept.append(count_kept())
            outcome.resident.append((done, resident_bytes()))
            on_done(done)
    return outcome


@asynccontextmanager
async def run_server(output_dir: Path) -> AsyncIterator[tuple[Engine, httpx.AsyncClient]]:
    """Yields an engine in strict mode with the demo model, and a client of the HTTP API that uses this engine."""
    settings = Settings.model_validate(
        {
            "models": [{"name": "demo", "mode": "strict", "threads": 1, "engine": {"warmup_budget_s": 0}}],
            "output_dir": str(output_dir),
        }
    )
    engine = load_engine(settings, settings.models[0])
    async with LocalBackend(plan_deployments(settings).catalog, {"demo": engine}) as backend:
        app = create_app(backend, settings)
        # A shorter window, because loops are cut from a whole window.
        with patch.object(windowed_model, "WINDOW_S", 4.0):
            transport = httpx.ASGITransport(app)
            async with (
                app.router.lifespan_context(app),
                httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=300) as client,
            ):
                yield engine, client


def draw_cases(engine: Engine, client: httpx.AsyncClient, *, seed: int) -> tuple[Case, ...]:
    """Returns 24 requests for clips of 1 to 4 s: text, variations, inpainting and loops. Six go over HTTP."""
    draw = random.Random(f"cases {seed}")
    noise = np.random.default_rng(seed)

    def source(duration_s: float) -> SourceAudio:
        samples = 0.3 * noise.standard_normal((2, int(duration_s * RATE_HZ))).clip(-1, 1)
        return SourceAudio(samples.astype(np.float32), RATE_HZ)

    def request(prompt: str, duration_s: float, **fields: object) -> GenerationRequest:
        values = {"seed": draw.randrange(2**31), "steps": draw.choice(STEPS), **fields}
        return GenerationRequest(prompt=prompt, duration_s=duration_s, **values)  # type: ignore[arg-type]

    cases: list[Case] = []
    for number in range(6):
        length_s = round(1.0 + 3.0 * draw.random() ** 4, 2)
        start_s = draw.uniform(0.0, length_s / 2)
        loop = plan_loop(draw.randrange(100, 180), bars=1, window_s=4.0)
        requests = {
            "text": request(
                f"rain {number}", length_s, batch_size=1 + number % 2, cfg_scale=1.0 if number % 3 else 4.0
            ),
            "variation": request("wind", length_s, init_audio=source(1.0), init_noise_level=draw.uniform(0.3, 0.9)),
            "inpaint": request(
                "birds", length_s, inpaint_audio=source(length_s), inpaint_regions_s=((start_s, start_s + 0.5),)
            ),
            "loop": request(f"drum loop {loop.tempo_bpm} bpm", loop.duration_s),
        }
        cases += [Case(kind, partial(_send_direct, engine, made)) for kind, made in requests.items()]
    for number in range(3):
        body = {"prompt": f"rain {number}", "duration": 1.0 + number, "steps": STEPS[0], "seed": number}
        form = {"prompt": f"drum loop {100 + 30 * number}bpm", "bars": "1", "steps": str(STEPS[0]), "seed": str(number)}
        cases[4 * number] = Case("text over HTTP", partial(_send_http, client, "/generate", json=body))
        cases[4 * number + 3] = Case("loop over HTTP", partial(_send_http, client, "/generate/loop", data=form))
    return tuple(cases)


async def _send_direct(engine: Engine, request: GenerationRequest, on_progress: Callable[[Progress], None]) -> str:
    result = await engine.generate(request, on_progress)
    assert len(result.audio) == request.batch_size
    for audio in result.audio:
        assert abs(audio.shape[1] - request.duration_s * RATE_HZ) <= 1
        assert np.isfinite(audio).all()
    return _digest(*(audio.tobytes() for audio in result.audio))


async def _send_http(
    client: httpx.AsyncClient, path: str, on_progress: Callable[[Progress], None], **body: object
) -> str:
    sending = asyncio.ensure_future(client.post(path, **body))  # type: ignore[arg-type]
    try:
        # `on_progress` may cancel the request. HTTP has no progress reports, so it is called with made-up ones.
        for index in range(STEPS[0]):
            await asyncio.sleep(0.001)
            on_progress(Progress("queued", 0.0, steps_done=index))
        response = await sending
    finally:
        sending.cancel()
    assert response.status_code == 200, response.text
    return _digest(response.content)


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _draw(cases: Sequence[Case], size: int, *, order: random.Random) -> list[Case]:
    """Returns `size` requests in random order. Each of `cases` occurs about equally often."""
    drawn = [case for _ in range(-(-size // len(cases))) for case in order.sample(cases, len(cases))][:size]
    order.shuffle(drawn)
    return drawn


async def _send_all(cases: Sequence[Case], *, right: dict[Case, str], order: random.Random, outcome: Outcome) -> None:
    """Send the requests, eight at a time. One in twenty is cancelled at one of its first progress reports."""
    num_cancels = max(1, round(CANCEL_SHARE * len(cases)))
    cancels = {index: order.randrange(STEPS[0]) for index in order.sample(range(len(cases)), num_cancels)}
    waiting = iter(enumerate(cases))

    async def work() -> None:
        for index, case in waiting:
            await _send_one(case, right=right[case], cancel_at=cancels.get(index), outcome=outcome)

    await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))


async def _send_one(case: Case, *, right: str, cancel_at: int | None, outcome: Outcome) -> None:
    num_reports = 0

    def on_progress(_: Progress) -> None:
        nonlocal num_reports
        if num_reports == cancel_at:
            task.cancel()
        num_reports += 1

    task = asyncio.ensure_future(case.send(on_progress))
    try:
        answer = await task
    except asyncio.CancelledError:
        if cancel_at is None:
            raise
        outcome.cancelled[case.kind] += 1
    else:
        (outcome.answered if answer == right else outcome.wrong)[case.kind] += 1


def count_kept() -> Counter[str]:
    """Returns how many tensors and engine objects exist in this process, by class."""
    gc.collect()
    kept: Counter[str] = Counter()
    for cls, count in Counter(map(type, gc.get_objects())).items():
        if issubclass(cls, torch.Tensor):
            kept["Tensor"] += count
        elif str(getattr(cls, "__module__", "")).startswith("stable_audio_serve.engine."):
            kept[cls.__name__] += count
    return kept
