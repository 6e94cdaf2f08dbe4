"""The case `simulate`: what the engine's own scheduling makes of the real networks' work on a model of an H200, and of
the demo's on a CPU, next to a lock server and static batches on the same device; which shapes its calls have in a day.

Figures come from arithmetic, not from a device. `packed` is how the product batches on CUDA in half precision, where
rows of all lengths share a call with room for a few more tokens; `grid` how it does without: rows are padded. On a CPU
`strict` steps one row at a time, and `fast` packs rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tqdm import tqdm

from benchmarks.arrivals import ArrivalList, draw_arrivals
from benchmarks.metrics import percentile
from benchmarks.settings import CaseSettings
from benchmarks.simulate.day import HOURS, draw_day
from benchmarks.simulate.devices import DeviceModel
from benchmarks.simulate.engine import CPU, Counts, SimulatedEngine
from benchmarks.simulate.formula import DEMO_ON_A_CPU
from benchmarks.simulate.requests import Outcome, Shape
from benchmarks.simulate.rivals import run_lock, run_static
from benchmarks.simulate.roofline import MEDIUM, OPEN, OPEN_SMALL, SMALL, Network, Roofline, h200
from benchmarks.workload import MIXES, Mix
from examples.demo_model.architecture import FRAME_S, HEADROOM_S
from stable_audio_serve.engine import EngineOptions
from stable_audio_serve.engine.scheduling.batching import Call
from stable_audio_serve.engine.scheduling.windows import window_lengths
from stable_audio_serve.models.protocol import WindowRule
from stable_audio_serve.models.windows import audible_windows, chunked_windows

_LOAD_SHARE = 0.8
_STEADY = (0.15, 0.95)  # of the requests by arrival
_HALOS = {SMALL.name: 2, MEDIUM.name: 12, OPEN.name: 10, OPEN_SMALL.name: 10}
_LONGEST_S = {"small": 120.0, "medium": 380.0, "stable-audio-open-1.0": 47.5, "demo": 48.0}
_NETWORKS = {
    "equal-5s": SMALL,
    "small-8": SMALL,
    "small-mixed": SMALL,
    "medium-8": MEDIUM,
    "medium-mixed": MEDIUM,
    "sao-100": OPEN,
}
_DAYS = ("small-mixed", "medium-mixed")
# Clips per second of Stability AI's TensorRT pipeline, one after another: one over the published time alone.
_TENSORRT_MS = {("small", 5): 17.0, ("small", 30): 22.0, ("medium", 5): 20.0, ("medium", 30): 50.0}


@dataclass(frozen=True, slots=True)
class SimulationSizes:
    """Requests of each list: of the small mixes, of the other ones, of the demo's, of each hour of a day; a list per
    seed. `clips`: equal ones at once, 20 times the largest static batch."""

    small: int = 2000
    other: int = 400
    demo: int = 900  # three rounds of 300 are pooled
    hour: int = 400
    seeds: tuple[int, ...] = (1, 2, 3)
    clips: int = 640


SHORT = SimulationSizes(small=400, other=200, demo=300, hour=40)


def run_simulate_case(settings: CaseSettings, sizes: SimulationSizes | None = None) -> dict[str, Any]:
    """Ratios of each mix, the worst seed counting; shapes of a day; clips per second over the published pipeline."""
    sizes = sizes or (SimulationSizes() if settings.full else SHORT)
    mixes, days, clips = {}, {}, {}
    total = len(_NETWORKS) + 1 + len(_DAYS) + len(_TENSORRT_MS)
    with tqdm(total=total, desc="simulate", leave=False, disable=None) as bar:
        for name, network in _NETWORKS.items():
            count = sizes.small if network is SMALL else sizes.other
            mixes[name] = {"num_requests": count, **_worst([_compare(name, count=count, seed=s) for s in sizes.seeds])}
            bar.update()
        demo = _worst([compare_demo(count=sizes.demo, seed=seed) for seed in sizes.seeds])
        mixes["demo-wide"] = {"num_requests": sizes.demo, **demo}
        bar.update()
        for name in _DAYS:
            days[name] = count_shapes_of_a_day(name, count=sizes.hour, seeds=sizes.seeds)
            bar.update()
        for (model, seconds), published_ms in _TENSORRT_MS.items():
            clips[f"{model} {seconds} s"] = _clips_ratio(
                model, float(seconds), count=sizes.clips, published_ms=published_ms
            )
            bar.update()
    return {
        "device": "arithmetic: an H200; a CPU for the demo",
        "mixes": mixes,
        "days": days,
        "clips_over_published_ratio": clips,
    }


def network_shape(network: Network) -> Shape:
    """Returns how a model cuts a clip: without headroom, decoded in the product's windows."""

    rule = WindowRule(_HALOS[network.name])

    def windows(frames: int) -> Sequence[int]:
        return window_lengths(audible_windows(frames, num_audible=frames, rule=rule))

    return Shape(network.frames, windows, rule)


def _demo_frames(duration_s: float) -> int:
    return 2 * math.ceil((duration_s + HEADROOM_S) / FRAME_S / 2)


_DEMO_SHAPE = Shape(_demo_frames, lambda frames: window_lengths(chunked_windows(frames)))


def count_shapes_of_a_day(mix: str, *, count: int, seeds: Sequence[int]) -> dict[str, int]:
    """Distinct (rows, frames) of denoiser calls over 24 hours whose load follows a daily curve up to more than the
    engine's capacity; of each hour `count` requests are simulated, so its length is compressed, not its load. The seed
    with the most shapes counts. Without graphs a call costs more before it starts, and other rows share one."""
    captured = max((_run_day(mix, count=count, seed=seed) for seed in seeds), key=lambda counts: len(counts.shapes))
    launched = [_run_day(mix, count=count, seed=seed, is_captured=False) for seed in seeds]
    return {
        "num_shapes": len(captured.shapes),
        "num_text_shapes": len(captured.text_shapes),
        "num_decode_shapes": len(captured.decode_shapes),
        "num_shapes_without_graphs": max(len(counts.shapes) for counts in launched),
        "num_requests": HOURS * count,
        "num_calls": captured.calls,
        "most_rows": max(rows for rows, *_ in captured.shapes),
    }


def _run_day(mix: str, *, count: int, seed: int, is_captured: bool = True) -> Counts:
    network = _NETWORKS[mix]
    burst = _draw(mix, rate_hz=None, count=HOURS * count // 4, seed=seed)
    capacity_hz = _rate_hz(_engine(network, is_packed=True, is_captured=is_captured).run(burst))
    engine = _engine(network, is_packed=True, is_captured=is_captured)
    longest_s = _LONGEST_S[network.name]
    engine.run(draw_day(MIXES[mix], capacity_hz=capacity_hz, count=count, seed=seed, max_duration_s=longest_s))
    return engine.counts


def _compare(mix: str, *, count: int, seed: int) -> dict[str, dict[str, float]]:
    """Ratios of one seed on an H200, by batching."""
    network = _NETWORKS[mix]
    engines = {name: partial(_engine, network, is_packed=name == "packed") for name in ("grid", "packed")}
    lists = _Lists.draw(mix, device=h200(network), shape=network_shape(network), count=count, seed=seed)
    return {name: _ratios(lists, engine) for name, engine in engines.items()}


def compare_demo(*, count: int, seed: int) -> dict[str, dict[str, float]]:
    """Ratios of one seed on a CPU, by mode."""
    lists = _Lists.draw("demo-wide", device=DEMO_ON_A_CPU, shape=_DEMO_SHAPE, count=count, seed=seed)
    engine = partial(SimulatedEngine, DEMO_ON_A_CPU, _DEMO_SHAPE, longest_frames=_demo_frames(_LONGEST_S["demo"]))
    engines = {
        "strict": partial(engine, options=EngineOptions(mode="strict"), kind=CPU),
        "fast": partial(
            engine,
            options=EngineOptions(mode="fast"),
            kind=CPU,
            pack=lambda call: DEMO_ON_A_CPU.packed_step_ms([(1, frames) for frames in call.lengths]),
        ),
    }
    return {name: _ratios(lists, engine) for name, engine in engines.items()}


@dataclass(frozen=True, slots=True)
class _Lists:
    """One seed's requests, at once and at a share of the lock server's capacity, and what the rivals make of them."""

    burst: ArrivalList
    replay: ArrivalList
    lock_hz: float
    static_hz: float
    lock: list[Outcome]  # of the replay

    @classmethod
    def draw(cls, mix: str, *, device: DeviceModel, shape: Shape, count: int, seed: int) -> _Lists:
        """Returns lists of `count` requests each."""
        burst = _draw(mix, rate_hz=None, count=count, seed=seed)
        lock_hz = _rate_hz(run_lock(burst, device, shape=shape))
        static_hz = _rate_hz(run_static(burst, device, shape=shape))
        replay = _draw(mix, rate_hz=_LOAD_SHARE * lock_hz, count=count, seed=seed)
        return cls(burst, replay, lock_hz, static_hz, run_lock(replay, device, shape=shape))


def _ratios(lists: _Lists, make: Callable[[], SimulatedEngine]) -> dict[str, float]:
    """Capacity and latencies of an engine over the lock server's, and capacity over static batches."""
    own_hz = _rate_hz(make().run(lists.burst))
    own = make().run(lists.replay)
    return {
        "capacity_over_lock_ratio": own_hz / lists.lock_hz,
        "capacity_over_static_ratio": own_hz / lists.static_hz,
        "p95_over_lock_ratio": _p95_ms(own) / _p95_ms(lists.lock),
    } | {
        f"p95_{steps}_over_lock_ratio": _p95_ms(own, steps=steps) / _p95_ms(lists.lock, steps=steps)
        for steps in lists.replay.step_classes
    }


def _worst(seeds: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The worst seed of each ratio: the lowest capacity, the highest latency."""
    return {
        batching: {
            name: (min if name.startswith("capacity") else max)(seed[batching][name] for seed in seeds)
            for name in seeds[0][batching]
        }
        for batching in seeds[0]
    }


def _clips_ratio(model: str, duration_s: float, *, count: int, published_ms: float) -> dict[str, float]:
    """Clips per second of equal requests at once over those of the published pipeline."""
    network = {"small": SMALL, "medium": MEDIUM}[model]
    mix = Mix(f"equal-{duration_s:g}s", ((duration_s, 1.0),), ((8, 1.0),), spread=0.0)
    burst = draw_arrivals(mix, rate_hz=None, count=count, seed=1, max_duration_s=_LONGEST_S[network.name])
    return {
        batching: _rate_hz(_engine(network, is_packed=batching == "packed").run(burst)) * published_ms / 1000.0
        for batching in ("grid", "packed")
    }


def _engine(network: Network, *, is_packed: bool = False, is_captured: bool = True) -> SimulatedEngine:
    device: Roofline = h200(network, is_captured=is_captured)
    return SimulatedEngine(
        device,
        network_shape(network),
        longest_frames=network.frames(_LONGEST_S[network.name]),
        pack=partial(packed_call_ms, device) if is_packed else None,
        prefix_tokens=network.prefix_tokens,
    )


def packed_call_ms(device: Roofline, call: Call) -> float:
    """Returns the time of a call that rows of all lengths share."""
    return device.packed_step_ms([(1, frames) for frames in call.lengths], num_spare=call.num_spare)


def _draw(mix: str, *, rate_hz: float | None, count: int, seed: int) -> ArrivalList:
    longest_s = _LONGEST_S[_NETWORKS[mix].name if mix in _NETWORKS else "demo"]
    return draw_arrivals(MIXES[mix], rate_hz=rate_hz, count=count, seed=seed, max_duration_s=longest_s)


def _rate_hz(outcomes: Sequence[Outcome]) -> float:
    return len(outcomes) / max(outcome.ended_at for outcome in outcomes)


def _p95_ms(outcomes: Sequence[Outcome], *, steps: int | None = None) -> float:
    ordered = sorted(outcomes, key=lambda outcome: outcome.arrival.at_s)
    kept = ordered[int(_STEADY[0] * len(ordered)) : int(_STEADY[1] * len(ordered))]
    return percentile([o.latency_ms for o in kept if steps in (None, o.arrival.steps)], 0.95)


def rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """The engine's scheduling on a model of an H200: ratios by mix, then the shapes of a day."""
    return [
        {
            "mix": mix,
            "batching": batching,
            "capacity_over_lock": figures[batching]["capacity_over_lock_ratio"],
            "capacity_over_static": figures[batching]["capacity_over_static_ratio"],
            "p95_over_lock": figures[batching]["p95_over_lock_ratio"],
            "p95_8_over_lock": figures[batching].get("p95_8_over_lock_ratio", ""),
            "shapes_of_a_day": results["days"].get(mix, {}).get("num_shapes", ""),
        }
        for mix, figures in results["mixes"].items()
        for batching in ("grid", "packed", "strict", "fast")
        if batching in figures
    ]
