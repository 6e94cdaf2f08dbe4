"""Sends a minute of mixed load and compares each clip with a plain engine's. Also measures memory after many clips."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from benchmarks.gpu.engines import PLAIN, Machine, OpenEngine
from benchmarks.gpu.results import Results, clip_db, is_close
from benchmarks.gpu.trace import trace
from benchmarks.load import Audio, send_in_flight
from benchmarks.workload import draw_arrivals, to_request
from stable_audio_serve.core.generation import GenerationRequest

LEAST_DB = 26.0  # low, because small differences grow in up to 100 guided steps in half precision
_LEAK_S, _LEAK_STEPS, _LEAK_IN_FLIGHT = 5.0, 4, 8  # clips of the memory check
_MOST_NAMED = 20  # number of differences, and of failures, that are described; more are only counted


async def measure(machine: Machine, results: Results, *, name: str) -> None:
    """Generate clips under load with an engine that has all features, and compare them with a plain engine's clips.

    The plain engine has no features and no load.
    """
    sizes, model = machine.sizes, machine.load(name, decode=None)
    longest_s = min(sizes.longest_s, model.spec.card.max_duration_s)
    drawn = draw_arrivals(f"{name}-mixed", rate_hz=None, count=sizes.clips, seed=1, max_duration_s=longest_s)
    requests = [to_request(replace(arrival, steps=min(arrival.steps, sizes.most_steps))) for arrival in drawn]
    async with machine.engine(model, PLAIN) as engine:
        started_at = time.perf_counter()
        plain = [(await engine.together(request))[0] for request in requests]
        results.record("plain_clips_per_s", len(plain) / (time.perf_counter() - started_at))
    del engine
    async with machine.engine(model) as engine:
        await _Minute(machine, engine, results, requests, plain).run()


@dataclass
class _Minute:
    """Sends requests in random order, keeps `Sizes.in_flight` of them in flight, and compares clips with `plain`."""

    machine: Machine
    engine: OpenEngine
    results: Results
    requests: Sequence[GenerationRequest]
    plain: Sequence[Audio]
    counts: Counter[str] = field(default_factory=Counter)
    worst_db: dict[str, float] = field(default_factory=dict)

    async def run(self) -> None:
        """Send requests for `load_s` seconds, and profile the device near the end of this time."""
        sizes = self.machine.sizes
        ends_at = time.perf_counter() + sizes.load_s
        tasks = [asyncio.create_task(self._send(random.Random(seed), ends_at)) for seed in range(sizes.in_flight)]
        await asyncio.sleep(sizes.load_s - 2 * sizes.traced_s)
        self.results.record("clips_per_s", self.counts["compared"] / (sizes.load_s - 2 * sizes.traced_s))
        self._report()
        self.results.record("trace", await trace(self.machine.device, partial(asyncio.sleep, sizes.traced_s)))
        await asyncio.gather(*tasks)
        self._report()

    async def _send(self, order: random.Random, ends_at: float) -> None:
        while time.perf_counter() < ends_at:
            index = order.randrange(len(self.requests))
            request = self.requests[index]
            what = f"request {index} ({request.duration_s:.1f} s, {request.steps} steps, cfg {request.cfg_scale:g})"
            try:
                clips = await self.engine.together(request)
            except Exception as error:  # noqa: BLE001 - counted, and the load goes on
                self._differ("failed", f"{what} failed: {type(error).__name__}: {error}"[:300])
                continue
            db = await asyncio.to_thread(clip_db, clips[0], self.plain[index])
            self.counts["compared"] += 1
            self.counts["identical"] += db is None
            if db is not None:
                self.worst_db[what] = min(db, self.worst_db.get(what, db))
            if not is_close(db, LEAST_DB):
                self._differ("different", f"{what}: {db:.1f} dB instead of at least {LEAST_DB:g} dB")

    def _differ(self, kind: str, what: str) -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= _MOST_NAMED:
            self.results.differ(what)

    def _report(self) -> None:
        figures = {name: self.counts[name] for name in ("compared", "identical", "different", "failed")}
        captured = self.engine.captures.num_captured
        self.results.record("load", figures | {"captured": captured, "worst_db": self.worst_db})


async def measure_leak(machine: Machine, results: Results) -> None:
    """Store the memory after `Sizes.few` and after `Sizes.many` short clips, while no request is in flight."""
    few, many = machine.sizes.few, machine.sizes.many
    model, held = machine.load("small", decode=None), {}
    clip = GenerationRequest("rain", min(_LEAK_S, machine.sizes.longest_s), seed=0, steps=_LEAK_STEPS)
    async with machine.engine(model) as engine:
        for first, last in ((0, few), (few, many)):
            requests = [replace(clip, prompt=f"take {seed % few}", seed=seed) for seed in range(first, last)]
            await send_in_flight(engine.together, requests, num_in_flight=_LEAK_IN_FLIGHT)
            await engine.settle()
            held[last] = machine.memory_bytes()
            results.record(f"after_{last}", held[last] | {"captured": engine.captures.num_captured})
    results.record("growth_share", {key: held[many][key] / held[few][key] - 1 for key in held[few]})
