"""Measures the times of clips, decoders, compiled layers, rows, adapters and noise.

Single clips, with and without CUDA graphs, are compared with the published TensorRT pipeline. Rows of different lengths
are measured packed and padded, and with and without fused kernels. Also measured are rows with different adapters, and
the drawing of noise.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, get_args

from benchmarks.goals import CLIPS, FLOPS
from benchmarks.gpu.engines import ALL, Machine
from benchmarks.gpu.load import LEAST_DB
from benchmarks.gpu.results import Results, clip_db
from benchmarks.load import Audio
from benchmarks.models import write_adapters
from stable_audio_serve.core.catalog import DecodePrecision
from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.models.protocol import DiffusionModel
from stable_audio_serve.sampling.noise import SeededNoise

_LONGEST_S = 120.0
_ADAPTED_S = 10.0
_COMPILED_S = 30.0
_DECODED_S = 30.0
_ENOUGH_S = 1.5  # a measurement ends after this time if it has at least `_LEAST_REPEATS` repetitions
_LEAST_REPEATS = 3
_GRAPHS_GB = 2.0  # memory allowed beyond the published peak
_STEP_TOKENS, _ROWS = 16_384, 16  # number of tokens in the largest step, and the number of equally long rows in it
_THREADS = (1, 4)
_WITHOUT: Mapping[str, frozenset[str]] = {
    "all": frozenset(),
    "padded": frozenset({"packed_rows"}),
    "eager": frozenset({"captures"}),
    "unfused": frozenset({"fused_kernels"}),
}


async def measure(machine: Machine, results: Results, *, name: str) -> None:
    """Store the times of each clip with a published time: alone, without CUDA graphs, and together with equally long
    clips.
    """
    model, repeats = machine.load(name, decode=None), machine.sizes.repeats
    weights = machine.memory_bytes().get("held", 0)
    rows = [row for row in CLIPS if row.model == name and row.duration_s <= _LONGEST_S]
    for row in rows[:1] if machine.is_tiny else rows:
        request = _clip(machine, model, duration_s=row.duration_s)
        async with machine.engine(model) as engine:
            held = machine.memory_bytes().get("held", 0)  # the weights, and the arenas, which fill the device
            await engine.prepare(request)
            alone_ms = await _median_ms(partial(engine.together, request), repeats=repeats)
            timings = (await engine.generate(request)).timings
            assert timings is not None
            memory = machine.memory_bytes()
            crowd = [replace(request, seed=seed) for seed in range(machine.sizes.together)]
            await engine.prepare(*crowd)
            crowd_ms = await _median_ms(partial(engine.together, *crowd), repeats=repeats) / len(crowd)
        del engine
        async with machine.engine(model, ALL - {"captures"}) as engine:
            eager_ms = await _median_ms(partial(engine.together, request), repeats=repeats)
        del engine
        figures: dict[str, Any] = {
            "alone_ms": alone_ms,
            "crowd_ms": crowd_ms,
            "eager_ms": eager_ms,
            "eager_over_captured_ratio": eager_ms / alone_ms,
            "text_ms": timings.text_ms,
            "step_ms": timings.denoise_ms / (request.steps or 1),
            "decode_ms": timings.decode_ms,
            "memory_bytes": memory,
            "tensorrt_ms": row.tensorrt_ms,
            "over_tensorrt_ratio": alone_ms / row.tensorrt_ms,
            "roofline_share_alone": row.ideal_ms / alone_ms,
            "roofline_share_crowd": row.clip_tflop * 1e15 / FLOPS / crowd_ms,
        }
        if "peak" in memory:
            needed_gb = (weights + memory["peak"] - held) / 1e9
            figures["peak_over_allowed_gb"] = needed_gb - (row.peak_gb * 1.1 + _GRAPHS_GB)
        results.record(f"clips.{row.name}", figures)


async def measure_compiled(machine: Machine, results: Results) -> None:
    """Store the times of clips with and without `compile: true`, the time until the compiled engine is ready, and how
    close its clips are to those of the other engine.
    """
    for name in ("small", "medium"):
        model, repeats, clips = machine.load(name, decode=None), machine.sizes.repeats, list[Audio]()
        crowd = [_clip(machine, model, duration_s=_COMPILED_S, seed=seed) for seed in range(machine.sizes.together)]
        for kind in ("plain", "compiled"):
            model = machine.compiled(model) if kind == "compiled" else model
            started_at = time.perf_counter()
            async with machine.engine(model) as engine:
                figures: dict[str, float] = {"ready_s": time.perf_counter() - started_at}
                await engine.prepare(crowd[0])
                figures["alone_ms"] = await _median_ms(partial(engine.together, crowd[0]), repeats=repeats)
                await engine.prepare(*crowd)
                figures["crowd_ms"] = await _median_ms(partial(engine.together, *crowd), repeats=repeats) / len(crowd)
                made = await engine.together(*crowd)
                figures["captured"] = engine.captures.num_captured
                results.record(f"compiled.{name}.{kind}", figures)
            del engine
            if clips:
                results.compare(f"{name}_compiled", [made], plain=clips, least_db=LEAST_DB)
            clips = made


async def measure_decoders(machine: Machine, results: Results) -> None:
    """Store the time of decoding one clip of medium in each precision, and how close it is to the one in float32.

    The times include one denoising step.
    """
    plain: list[Audio] = []
    for precision in get_args(DecodePrecision):
        try:
            model = machine.load("medium", decode=precision)
        except ConfigError:  # this device does not have the precision
            continue
        request = replace(_clip(machine, model, duration_s=_DECODED_S), steps=1, cfg_scale=1.0)
        async with machine.engine(model) as engine:
            await engine.prepare(request)
            made = [await engine.generate(request) for _ in range(machine.sizes.repeats)]
        del engine, model
        clips = [made[0].audio[0]]
        plain = plain or clips
        decode_ms = median(result.timings.decode_ms for result in made if result.timings is not None)
        results.record(f"decoders.{precision}", {"ms": decode_ms, "db": clip_db(clips[0], plain[0])})


async def measure_rows(machine: Machine, results: Results) -> None:
    """Store the time of rows of different lengths: packed, with CUDA graphs and fused kernels, and without one of them.

    Also store the time in which the noise of one step is drawn.
    """
    model, count = machine.load("small", decode=None), machine.sizes.together
    requests = [
        _clip(machine, model, duration_s=_LONGEST_S * share / count, seed=share) for share in range(1, count + 1)
    ]
    results.record("can_pack_segments", model.spec.packs_segments)
    for name, left_out in _WITHOUT.items():
        results.record(f"rows.{name}", await _measure_together(machine, model, *requests, features=ALL - left_out))
    shape = model.spec.card.latent_channels, _STEP_TOKENS // _ROWS
    sources = [SeededNoise(seed) for seed in range(_ROWS)]
    for threads in _THREADS:
        with ThreadPoolExecutor(threads) as pool:

            async def draw(pool: ThreadPoolExecutor = pool) -> None:
                list(pool.map(lambda source: source.step(shape), sources))

            taken_ms = await _median_ms(draw, repeats=machine.sizes.repeats)
        results.record(f"noise.ms_of_{_STEP_TOKENS}_tokens_on_{threads}_threads", taken_ms)


async def measure_adapters(machine: Machine, results: Results) -> None:
    """Store the time of clips that have a different adapter each, and of the same clips without adapters.

    Both are measured with CUDA graphs (captured) and without (eager).
    """
    model, count = machine.load("small", decode=None), machine.sizes.together
    with TemporaryDirectory() as folder:
        loras = write_adapters(model, Path(folder), count=count)
        plain = [_clip(machine, model, duration_s=_ADAPTED_S, seed=seed) for seed in range(count)]
        adapted = [replace(request, loras=(lora,)) for request, lora in zip(plain, loras, strict=True)]
        for name, features in (("captured", ALL), ("eager", ALL - {"captures"})):
            plain_ms, adapted_ms = [
                (await _measure_together(machine, model, *requests, features=features))["ms"]
                for requests in (plain, adapted)
            ]
            figures = {"plain_ms": plain_ms, "adapted_ms": adapted_ms, "throughput_ratio": plain_ms / adapted_ms}
            results.record(f"adapters.{name}", figures)


def _clip(machine: Machine, model: DiffusionModel, *, duration_s: float, seed: int = 0) -> GenerationRequest:
    """Returns a request without headroom, with the model's default steps and guidance."""
    card = model.spec.card
    return GenerationRequest(
        prompt="rain on a roof",
        duration_s=min(duration_s, card.max_duration_s, machine.sizes.longest_s),
        seed=seed,
        steps=min(card.default_steps, machine.sizes.most_steps),
        cfg_scale=card.default_cfg_scale,
        duration_padding_s=0.0,
    )


async def _measure_together(
    machine: Machine, model: DiffusionModel, *requests: GenerationRequest, features: Collection[str]
) -> dict[str, float]:
    """Returns the median time of these requests together, and the number of CUDA graphs that the engine captured."""
    async with machine.engine(model, features) as engine:
        await engine.prepare(*requests)
        taken_ms = await _median_ms(partial(engine.together, *requests), repeats=machine.sizes.repeats)
        return {"ms": taken_ms, "captured": engine.captures.num_captured}


async def _median_ms(run: Callable[[], Awaitable[object]], *, repeats: int) -> float:
    """Returns the median time of up to `repeats` calls in milliseconds. One call before them does not count."""
    await run()
    taken_s: list[float] = []
    while len(taken_s) < repeats and (sum(taken_s) < _ENOUGH_S or len(taken_s) < _LEAST_REPEATS):
        started_at = time.perf_counter()
        await run()
        taken_s.append(time.perf_counter() - started_at)
    return median(taken_s) * 1000.0
