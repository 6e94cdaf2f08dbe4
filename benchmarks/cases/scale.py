"""The same burst of requests to 1, 2, 4 ... replicas over HTTP: stand-ins whose device is a clock, so that many fit on
two cores, and the real model. All are models of one server, each with a fixed number of replicas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.cases.engine import resolve_model
from benchmarks.figures import capacity_rps
from benchmarks.load import Record, play, require_clips
from benchmarks.quiet import Watch, describe_quiet, in_quiet
from benchmarks.servers.process import serving
from benchmarks.settings import CaseSettings
from benchmarks.workload import MIXES, Mix, draw_arrivals

_STAND_IN, _MODEL = "benchmarks.servers.timed:build", "stable_audio_serve.serving.app:build"
# Equal clips of 270 ms: sixteen devices leave two cores some room, and no share is uneven by the clips' lengths.
_CLIPS = Mix("stand-in", durations_s=((1.0, 1.0),), steps=((24, 1.0),), spread=0.0)
_MODEL_MIX = MIXES["demo-wide"]
_WARM_UP_PER_REPLICA = 4


@dataclass(frozen=True, slots=True)
class ScaleLoad:
    """Replica counts, least first, and how much is sent: `requests` to every count up to `same_up_to`, so many more to
    larger ones that each replica gets as many as there."""

    counts: tuple[int, ...] = (1, 2, 4)
    requests: int = 60
    same_up_to: int = 4
    model_counts: tuple[int, ...] = (1, 2)
    model_requests: int = 60

    def requests_to(self, count: int) -> int:
        """Returns the length of the burst to this many replicas."""
        return self.requests * max(count, self.same_up_to) // self.same_up_to


FULL = ScaleLoad(counts=(1, 2, 4, 8, 16), requests=320, model_requests=300)


@dataclass(frozen=True, slots=True)
class Burst:
    """What a number of replicas made of requests that came at once. Processor time is that of server and client."""

    capacity_rps: float
    cpu_ms_per_request: float
    foreign_cores: float | None


async def run_scale(settings: CaseSettings) -> dict[str, Any]:
    """`settings.rounds` rounds over all counts; the worse round counts. Raises RuntimeError for any wrong answer."""
    load = FULL if settings.full else ScaleLoad()
    stand_in = await _measure(settings, _CLIPS, {count: load.requests_to(count) for count in load.counts}, _STAND_IN)
    model = await _measure(settings, _MODEL_MIX, dict.fromkeys(load.model_counts, load.model_requests), _MODEL)
    return {
        "load": asdict(load),
        "is_void": stand_in["is_void"] or model["is_void"],
        "stand_in": stand_in,
        "model": model,
    }


async def _measure(  # noqa: PLR0917
    settings: CaseSettings, mix: Mix, requests: Mapping[int, int], import_path: str
) -> dict[str, Any]:
    """So many requests to every number of replicas in turn, `settings.rounds` times."""
    entry = resolve_model(settings.model)
    card, names = entry.card, {count: f"replicas-{count}" for count in requests}
    models = {name: {"replicas": {"min_replicas": n, "max_replicas": n}} for n, name in names.items()}
    async with serving(entry, models, threads=settings.threads, import_path=import_path) as sides:

        async def send(count: int, num_requests: int) -> list[Record]:
            arrivals = draw_arrivals(mix, rate_hz=None, count=num_requests, seed=1, max_duration_s=card.max_duration_s)
            records = await play(sides[names[count]], arrivals)
            require_clips(records, sample_rate_hz=card.sample_rate_hz)
            return records

        async def measure(count: int) -> Burst:
            records, watch = await in_quiet(lambda: send(count, requests[count]))
            return Burst(capacity_rps(records), 1000.0 * watch.own_s / len(records), watch.foreign_cores)

        for count in requests:  # opens the connections to all of them
            await send(count, count * _WARM_UP_PER_REPLICA)
        bursts = [{count: await measure(count) for count in requests} for _ in range(settings.rounds)]
    return {
        "requests": requests,
        "worst_capacity_over_one": worst_over_first(
            {count: [one[count].capacity_rps for one in bursts] for count in requests}
        ),
        "worst_cpu_ms_per_request": {count: max(one[count].cpu_ms_per_request for one in bursts) for count in requests},
        **describe_quiet([Watch(0.0, burst.foreign_cores) for one in bursts for burst in one.values()]),
        "rounds": [{count: asdict(burst) for count, burst in one.items()} for one in bursts],
    }


def worst_over_first(values: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """Returns the least of each key's values over those of the first key in the same round; the first is left out."""
    first, *others = values
    return {key: min(value / one for value, one in zip(values[key], values[first], strict=True)) for key in others}


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """One number of replicas per row."""
    return [
        {
            "side": side.replace("_", "-"),
            "replicas": count,
            "capacity over one": ratio,
            "processor time per request (ms)": results[side]["worst_cpu_ms_per_request"][count],
        }
        for side in ("stand_in", "model")
        for count, ratio in results[side]["worst_capacity_over_one"].items()
    ]
