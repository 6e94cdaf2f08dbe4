"""The engine by itself: eight unlike requests at once against the same eight one after another, in one process."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.client import Run, send_one_after_another, send_together
from benchmarks.metrics import Finished, audio_s_per_s, summarize, throughput_rps, worst_ratio
from benchmarks.settings import CaseSettings
from benchmarks.workload import eight_mixed_requests
from stable_audio_serve.core.generation import GenerationResult, Mode
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.protocol import DiffusionModel
from stable_audio_serve.models.registry import BUILT_IN, ModelEntry, resolve_entry

_FALLBACK = Path(__file__).parents[2] / "tests" / "data" / "goldens" / "sa3" / "sharp-s"
# Above this, as a share of the peak, the two sides did not make the same audio and their times mean nothing.
_LARGEST_DIFFERENCE = {"strict": 0.0, "fast": 1e-2}


_SIDES = {"one_after_another": send_one_after_another, "together": send_together}


@dataclass(frozen=True, slots=True)
class _Timed:
    """One run of one side; processor time tells the truth on a machine that others use too."""

    finished: Sequence[Finished]
    cpu_s: float


def load(settings: CaseSettings) -> DiffusionModel:
    """The model to measure, on its device."""
    return load_model(resolve_model(settings.model), device=settings.device)


def resolve_model(name: str | None) -> ModelEntry:
    """The entry to measure; without a name the demo model if it is packaged, else the tiny test checkpoint."""
    if name is not None:
        return resolve_entry(Path(name).name, path=name) if Path(name).is_dir() else resolve_entry(name)
    demo = Path(BUILT_IN["demo"].folder or "")
    return resolve_entry("demo") if demo.is_dir() else resolve_entry("tiny", path=str(_FALLBACK))


async def run_engine_case(model: DiffusionModel, settings: CaseSettings) -> dict[str, Any]:
    """Sides in the order A B A B, three rounds; the worse round counts. Raises RuntimeError if the audio differs."""
    options = EngineOptions(mode=settings.mode, torch_threads=settings.threads)  # type: ignore[arg-type]
    async with Engine(model, options) as engine:
        requests = eight_mixed_requests(model.spec.card)
        alone, _ = await send_one_after_another(engine.generate, requests)
        together, _ = await send_together(engine.generate, requests)
        difference = compare_audio(alone, together, mode=engine.mode)
        rounds = []
        for _ in range(settings.rounds):
            sides: dict[str, list[_Timed]] = {name: [] for name in _SIDES}
            for name in (*_SIDES, *_SIDES):
                sides[name].append(await _timed(_SIDES[name](engine.generate, requests)))
            rounds.append({name: _figures(runs) for name, runs in sides.items()})
        return {
            "model": describe_model(model),
            "mode": engine.mode,
            "largest_difference": difference,
            "rounds": rounds,
            **_ratios(rounds),
        }


async def _timed(run: Awaitable[Run]) -> _Timed:
    started_s = time.process_time()
    _, finished = await run
    return _Timed(finished, time.process_time() - started_s)


def _figures(runs: Sequence[_Timed]) -> dict[str, float]:
    latencies_ms = [request.latency_ms for run in runs for request in run.finished]
    return {
        "throughput_rps": mean(throughput_rps(run.finished) for run in runs),
        "audio_s_per_s": mean(audio_s_per_s(run.finished) for run in runs),
        "cpu_s": mean(run.cpu_s for run in runs),
        **asdict(summarize(latencies_ms)),
    }


def _ratios(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, float]:
    """Together over one after another, worse round."""

    def pairs(figure: str) -> list[tuple[float, float]]:
        return [(sides["together"][figure], sides["one_after_another"][figure]) for sides in rounds]

    return {
        "throughput_ratio": worst_ratio(pairs("throughput_rps"), larger_is_better=True),
        "cpu_time_ratio": worst_ratio(pairs("cpu_s"), larger_is_better=False),
        "mean_latency_ratio": worst_ratio(pairs("mean_ms"), larger_is_better=False),
        "p50_latency_ratio": worst_ratio(pairs("p50_ms"), larger_is_better=False),
    }


def compare_audio(left: Sequence[GenerationResult], right: Sequence[GenerationResult], *, mode: Mode) -> float:
    """Returns the largest difference as a share of the peak. Raises RuntimeError if it is more than `mode` allows."""
    pairs = [(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x.audio, y.audio, strict=True)]
    difference = max(float(np.abs(a - b).max() / max(1.0, np.abs(a).max())) for a, b in pairs)
    if difference > _LARGEST_DIFFERENCE[mode]:
        raise RuntimeError(f"the two sides differ by {difference}: the comparison is void")
    return difference


def describe_model(model: DiffusionModel) -> dict[str, Any]:
    """Its device and everything fixed about it."""
    return {"device": str(model.device), **asdict(model.spec)}


async def run_engine(settings: CaseSettings) -> dict[str, Any]:
    """`run_engine_case` on the model of these settings."""
    return await run_engine_case(load(settings), settings)


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """One mode."""
    return [
        {
            "mode": results["mode"],
            "model": results["model"]["card"]["name"],
            "throughput_ratio": results["throughput_ratio"],
            "cpu_time_ratio": results["cpu_time_ratio"],
            "mean_latency_ratio": results["mean_latency_ratio"],
            "largest_difference": f"{results['largest_difference']:.1e}",
        }
    ]
