"""The figures of the mixed load on a GPU."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from benchmarks.gpu import load
from benchmarks.gpu.engines import Machine, OpenEngine, Sizes
from benchmarks.gpu.results import Results


async def test_steps_are_counted_only_during_the_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    captures = SimpleNamespace(num_steps=0, num_captured=0)

    async def trace(_: torch.device, run: Callable[[], Awaitable[object]]) -> dict[str, Any]:
        captures.num_steps += 100  # while the profiler starts
        await run()
        captures.num_steps += 100  # while it stops
        return {"idle_ms": 3.0}

    async def pause(_: float) -> None:
        captures.num_steps += 10

    monkeypatch.setattr(load, "trace", trace)
    monkeypatch.setattr(load.asyncio, "sleep", pause)
    machine = SimpleNamespace(device=torch.device("cpu"), sizes=Sizes(load_s=1.0, in_flight=0, traced_s=0.1))
    results = Results(tmp_path / "results.json")
    engine = cast("OpenEngine", SimpleNamespace(captures=captures))
    await load._Minute(cast("Machine", machine), engine, results, requests=[], plain=[]).run()
    assert results.values["trace"] == {"idle_ms": 3.0, "steps_per_s": 100.0, "idle_ms_per_step": 0.3}
