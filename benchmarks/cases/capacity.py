"""How many requests a minute one H200 does, by model: the engine's own scheduling on a device that is arithmetic, as in
`simulate`. The page on scaling divides by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from benchmarks.arrivals import draw_arrivals
from benchmarks.cases.simulate import network_shape, packed_call_ms
from benchmarks.settings import CaseSettings
from benchmarks.simulate.engine import SimulatedEngine
from benchmarks.simulate.roofline import MEDIUM, OPEN, OPEN_SMALL, SMALL, Network, h200
from benchmarks.workload import MIXES, Mix

_CHANNELS, _RATE_HZ, _SAMPLE_BYTES = 2, 44_100, 2
_EIGHT = ((8, 1.0),)


@dataclass(frozen=True, slots=True)
class Asked:
    """A model, and what is asked of it."""

    network: Network
    mix: Mix
    longest_s: float
    what: str


MODELS: Mapping[str, Asked] = {
    "small-sfx": Asked(SMALL, Mix("small-sfx", ((2.0, 0.5), (5.0, 0.3), (11.0, 0.2)), _EIGHT), 120.0, "2, 5 and 11 s"),
    "small-music": Asked(SMALL, MIXES["small-8"], 120.0, "5, 30 and 92 s"),
    "medium": Asked(MEDIUM, MIXES["medium-8"], 380.0, "5, 30, 92 and 290 s"),
    "stable-audio-open-1.0": Asked(OPEN, MIXES["sao-100"], 47.5, "47 s, 100 guided steps"),
    "stable-audio-open-small": Asked(OPEN_SMALL, Mix("open-small", ((11.0, 1.0),), _EIGHT, spread=0.0), 11.9, "11 s"),
}


@dataclass(frozen=True, slots=True)
class CapacitySizes:
    """Requests of each list, and a list per seed."""

    count: int = 400
    seeds: tuple[int, ...] = (1, 2, 3)


FULL = CapacitySizes(count=2000)


def run_capacity_case(settings: CaseSettings, sizes: CapacitySizes | None = None) -> dict[str, Any]:
    """Requests a minute of a GPU that always has enough to do, the worst seed counting."""
    sizes = sizes or (FULL if settings.full else CapacitySizes())
    models = {name: _measure(asked, sizes) for name, asked in MODELS.items()}
    return {"device": "arithmetic: an H200", "sizes": asdict(sizes), "models": models}


def _measure(asked: Asked, sizes: CapacitySizes) -> dict[str, Any]:
    device = h200(asked.network)
    per_minute, audio_s = [], []
    for seed in sizes.seeds:
        burst = draw_arrivals(asked.mix, rate_hz=None, count=sizes.count, seed=seed, max_duration_s=asked.longest_s)
        engine = SimulatedEngine(
            device,
            network_shape(asked.network),
            longest_frames=asked.network.frames(asked.longest_s),
            pack=partial(packed_call_ms, device),
            prefix_tokens=asked.network.prefix_tokens,
        )
        ended_s = max(outcome.ended_at for outcome in engine.run(burst))
        per_minute.append(len(burst.arrivals) / ended_s * 60.0)
        audio_s.append(sum(arrival.duration_s for arrival in burst.arrivals) / len(burst.arrivals))
    mean_s = sum(audio_s) / len(audio_s)
    return {
        "asked": asked.what,
        "mean_audio_s": mean_s,
        "requests_per_minute": min(per_minute),
        "wav_bytes": mean_s * _RATE_HZ * _CHANNELS * _SAMPLE_BYTES,
    }


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """Requests a minute of one GPU."""
    return [
        {
            "model": name,
            "asked": figures["asked"],
            "mean_audio_s": figures["mean_audio_s"],
            "requests_per_minute": figures["requests_per_minute"],
        }
        for name, figures in results["models"].items()
    ]
