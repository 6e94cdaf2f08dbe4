"""What the harness must be able to see, shown on a device that only takes time, with nothing else running."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from statistics import median
from typing import ClassVar

import pytest

from benchmarks.compare.asking import Asker, InProcess
from benchmarks.compare.pieces import Pieces
from benchmarks.compare.playing import read_records
from benchmarks.compare.run import Run, RunOptions
from benchmarks.sides.servers import LockServer
from benchmarks.sides.timed_model import TimedModel
from benchmarks.simulate.devices import LinearDevice
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult
from stable_audio_serve.engine import EngineOptions

pytestmark = [pytest.mark.serial, pytest.mark.slow]

DEVICE = LinearDevice(
    text_fixed_ms=1.0, step_fixed_ms=1.5, step_per_frame_ms=0.01, coding_fixed_ms=4.0, coding_per_frame_ms=0.01
)
OPTIONS = EngineOptions(mode="strict", torch_threads=1)

_ATTEMPTS = 4  # other programs may disturb one


class SlowLock(LockServer):
    """5 ms more per request, within the lock; `given_ms` is what a busy machine made of them."""

    given_ms: ClassVar[list[float]] = []

    def __init__(self, model: TimedModel, options: EngineOptions) -> None:
        super().__init__(model, options)
        self._lock = asyncio.Lock()

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        async with self._lock:
            result = await super().generate(request)
            started_at = time.perf_counter()
            await asyncio.sleep(0.005)
            self.given_ms.append((time.perf_counter() - started_at) * 1000.0)
            return result


async def test_equal_servers_look_equal_and_five_milliseconds_look_like_five(tmp_path: Path) -> None:
    model = TimedModel(DEVICE, max_duration_s=10.0)
    servers = {"lock": LockServer, "again": LockServer, "slow": SlowLock}
    askers: dict[str, Asker] = {
        name: InProcess(server(model, OPTIONS), model.spec.card) for name, server in servers.items()
    }
    options = RunOptions(
        "demo-fast", tuple(askers), max_duration_s=10.0, count=10, rounds=3, load_share=0.3, goodput_trials=0
    )
    for attempt in range(_ATTEMPTS):
        folder = tmp_path / str(attempt)
        results = await Run(askers, options, pieces=Pieces(folder, {}), is_watched=False).measure()
        seen_ms = median(added_ms(folder, number) for number in (1, 2, 3))
        given_ms = median(SlowLock.given_ms)
        again = results["ratios"]["again"]["lock"]["capacity"]["value"]
        if abs(seen_ms - given_ms) <= 1.0 and abs(again - 1.0) <= 0.05:
            return
    pytest.fail(
        f"in none of {_ATTEMPTS} attempts; at last {given_ms:.1f} ms looked like {seen_ms:.1f}, 1 like {again:.2f}"
    )


def added_ms(folder: Path, number: int) -> float:
    """The median of what each request of one round takes more on the slow side."""
    sides = json.loads((folder / f"replay-{number}.json").read_text())["records"]
    pairs = zip(read_records(sides["slow"]), read_records(sides["lock"]), strict=True)
    return median(slow.latency_ms - lock.latency_ms for slow, lock in pairs)
