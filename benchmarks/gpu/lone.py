"""Part 1: one clip on an idle device, by stage and as a whole, what a step of the engine launches, eager and captured,
and which attention ran. Compared with the published TensorRT pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.published import CLIPS, ClipRow
from benchmarks.gpu.record import Done, Measurement
from benchmarks.gpu.subjects import Bench, make_clip
from benchmarks.gpu.timing import alternating_ms, forget_peak, median_ms, peak_bytes
from benchmarks.gpu.tracing import StepWatch, Trace
from benchmarks.gpu.watched import WatchedModel, watch_device
from benchmarks.sides.captures import Captures
from benchmarks.sides.servers import wait_for_captures
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.engine import Engine
from stable_audio_serve.models.protocol import DecodeWindow, DiffusionModel, StepBatch
from stable_audio_serve.sampling import SeededNoise

_LAUNCHES = {row.model: row for row in reversed(CLIPS)}  # the shortest clip of each model


@dataclass(frozen=True, slots=True)
class StageCalls:
    """The model's calls for one request by itself; one step is one network call, of two rows when guided."""

    frames: int
    network_rows: int
    text: Callable[[], object]
    step: Callable[[], torch.Tensor]
    decode: Callable[[], object]


def make_calls(model: DiffusionModel, request: GenerationRequest) -> StageCalls:
    """Returns calls with random latents, as the engine would make them for a row alone."""
    plan = model.plan(request)[0]
    conditioning = model.condition(
        plan, prompt=model.encode_text([plan.prompt])[0], negative=None, inpaint_latents=None
    )
    branches = [branch for branch in (conditioning.conditional, conditioning.unconditional) if branch is not None]
    channels = model.spec.card.latent_channels
    latents = torch.randn(channels, plan.frames, generator=torch.Generator().manual_seed(0)).to(model.device)
    batch = StepBatch.of(
        latents.expand(len(branches), -1, -1).contiguous(),
        t=torch.full((len(branches),), 0.5, device=model.device),
        valid=(torch.arange(plan.frames) < plan.valid_frames).expand(len(branches), -1).to(model.device),
        branches=branches,
    )
    windows = [
        DecodeWindow(latents[:, span.start : span.stop], span.start, SeededNoise(plan.seed))
        for span in plan.decode_windows
    ]
    return StageCalls(
        frames=plan.frames,
        network_rows=len(branches),
        text=partial(model.encode_text, [plan.prompt]),
        step=partial(model.denoise, batch),
        decode=lambda: [model.decode([window]) for window in windows],
    )


def measurements(bench: Bench, done: Done) -> list[Measurement]:
    """A clip of every published length, and the launches of every model."""
    clips = [Measurement(row.name, partial(_measure_clip, bench, row), about_s=_about_s(row)) for row in bench.clips]
    watched = [
        Measurement(f"launches {model}", partial(_measure_launches, bench, row), about_s=25.0)
        for model, row in _LAUNCHES.items()
        if model in bench.sizes.models
    ]
    # Models are built anew whenever another is asked for.
    return sorted([*clips, *watched], key=lambda measurement: list(_LAUNCHES)[::-1].index(_model_of(measurement.name)))


def summarize(done: Done) -> dict[str, Any]:
    """P7 in process, P8, launches and attention of each model; None where nothing was measured."""
    over_tensorrt = {
        row.name: done[row.name]["pipeline_ms"] / row.tensorrt_ms
        for row in CLIPS
        if row.tensorrt_ms is not None and row.name in done
    }
    over_bare = {row.name: done[row.name]["engine_over_bare_ratio"] for row in CLIPS if row.name in done}
    added_ms = {
        row.name: done[row.name]["engine_ms"] - done[row.name]["pipeline_ms"] for row in CLIPS if row.name in done
    }
    over_allowed = {
        row.name: done[row.name]["engine_ms"] / _allowed_ms(done[row.name]["pipeline_ms"])
        for row in CLIPS
        if row.name in done
    }
    launches = {model: done[f"launches {model}"] for model in _LAUNCHES if f"launches {model}" in done}
    return {
        "lone_pipeline_over_tensorrt_ratio": over_tensorrt,
        "lone_pipeline_over_tensorrt_worst_ratio": max(over_tensorrt.values(), default=None),
        "lone_engine_over_bare_ratio": over_bare,
        "lone_engine_added_ms": added_ms,
        "lone_engine_over_allowed_worst_ratio": max(over_allowed.values(), default=None),
        "launches_per_engine_call": {model: values["launches_per_engine_call"] for model, values in launches.items()},
        "captured_steps": {model: values["captured"] for model, values in launches.items()},
        "attention_backends": {model: values["attention_backends"] for model, values in launches.items()},
    }


def _allowed_ms(bare_ms: float) -> float:
    """Returns what the engine may take for a clip that takes so long without it."""
    return max(1.03 * bare_ms, bare_ms + 1.0)


def _measure_clip(bench: Bench, row: ClipRow) -> dict[str, Any]:
    model = bench.model(row.model)
    request = make_clip(bench, row)
    calls = make_calls(model, request)
    stages_ms = {
        name: median_ms(run, device=bench.device, sizes=bench.sizes)
        for name, run in (("text", calls.text), ("step", calls.step), ("decode", calls.decode))
    }
    bare, engine = bench.side(row.model, "lock"), bench.side(row.model, "ours")
    for _ in range(bench.sizes.clips_before):
        bench.run(bare.generate(request))
        bench.run(engine.generate(request))
    bench.settle()
    forget_peak(bench.device)
    pipeline_ms, engine_ms = alternating_ms(
        lambda: bench.run(bare.generate(request)),
        lambda: bench.run(engine.generate(request)),
        device=bench.device,
        sizes=bench.sizes,
    )
    return {
        "duration_s": request.duration_s,
        "frames": calls.frames,
        "steps": request.steps,
        "network_rows": calls.network_rows,
        **{f"{name}_ms": value for name, value in stages_ms.items()},
        "pipeline_ms": pipeline_ms,
        "engine_ms": engine_ms,
        "engine_over_bare_ratio": engine_ms / pipeline_ms,
        "ideal_ms": row.ideal_ms,
        "tensorrt_ms": row.tensorrt_ms,
        "peak_gb": peak_bytes(bench.device) / 1e9,
        "captured": engine.captures.num_captured,
    }


def _measure_launches(bench: Bench, row: ClipRow) -> dict[str, Any]:
    """Everything between the beginning of one step and that of the next: network, guidance, update."""
    eager = _watch_steps(bench, row, captures_calls=False)
    captured = _watch_steps(bench, row, captures_calls=True)
    steps = bench.sizes.watched_steps
    return {
        "clip": row.name,
        "counted": eager.counted,
        "launches_per_engine_call": eager.launches / steps,
        "copies_to_device_per_engine_call": eager.copies_to_device / steps,
        "waits_per_engine_call": eager.waits / steps,
        "attention_backends": eager.attention,
        "operators_per_engine_call": _per_step(eager.operators.most_common(30), steps),
        "captured": {
            "kernels_per_step": captured.launches / steps,
            "host_launches_per_step": captured.host_launches / steps,
            "copies_to_device_per_step": captured.copies_to_device / steps,
            "waits_per_step": captured.waits / steps,
        },
    }


def _watch_steps(bench: Bench, row: ClipRow, *, captures_calls: bool) -> Trace:
    """Raises RuntimeError if a request ends before its steps were seen."""
    model, request, captures = bench.model(row.model), make_clip(bench, row), Captures()
    watch = StepWatch(
        bench.device,
        skip=1,
        steps=bench.sizes.watched_steps,
        per_trace=bench.sizes.watched_steps,
        operators=not captures_calls,
    )
    device = watch_device(model, watch, captures_calls=captures_calls)

    async def watch_one() -> None:
        async with Engine(WatchedModel(model, watch), bench.options, device=device, metrics=captures) as engine:
            if captures_calls:
                for _ in range(bench.sizes.clips_before):
                    await engine.generate(request)
                await wait_for_captures(captures)
            watch.armed.set()
            await engine.generate(request)

    bench.run(watch_one())
    if not watch.finished.is_set():
        raise RuntimeError("the request ended before its steps were seen")
    return watch.traces[0]


def _per_step(counts: Sequence[tuple[str, int]], steps: int) -> dict[str, float]:
    return {name: count / steps for name, count in counts}


def _model_of(name: str) -> str:
    return next(model for model in _LAUNCHES if model in name)


def _about_s(row: ClipRow) -> float:
    """Seconds: an eager engine takes some ten times the ideal, the bench's repeats and a model to build."""
    return 15.0 + 80 * row.ideal_ms / 1000.0
