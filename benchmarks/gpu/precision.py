"""Part 5: how far each precision is from float64, whether strict bytes depend on a row's place in its call, and a hunt
for float16 latents that are not finite. The weights are random: real ones may have larger activations.
"""

from __future__ import annotations

import copy
import hashlib
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks.gpu.published import CLIPS, ClipRow
from benchmarks.gpu.record import Done, Measurement
from benchmarks.gpu.subjects import Bench, make_clip
from benchmarks.workload import PROMPTS
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.engine.scheduling.call_shapes import round_up
from stable_audio_serve.models.protocol import BranchConditioning, DiffusionModel, StepBatch
from stable_audio_serve.models.sa3.autoencoder import AudioAutoencoder
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.models.sao.model import SaoModel
from stable_audio_serve.models.sao.oobleck import OobleckAutoencoder
from stable_audio_serve.models.weights import cast_network

_COMPARED = ("small 5 s", "medium 5 s", "medium 120 s", "open 47 s")
_PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SOAKED = ("small", "medium")
_SLOTS, _GRID = 8, 64
_LARGEST_FLOAT16 = 65504.0
_CLIP_EVERY = 16  # calls of the network between two whole clips
_MOST_WORDS = 120
_MOST_SOAKED_S = 30.0

Network = Callable[[nn.Module], Tensor]


def measurements(bench: Bench, done: Done) -> list[Measurement]:
    """Model by model, the soak of small and medium last."""
    rows = {row.name: row for row in CLIPS}
    found: list[Measurement] = []
    for model in bench.sizes.models:
        compared = [rows[name] for name in _COMPARED if rows[name].model == model]
        found += [Measurement(f"precision {row.name}", partial(_compare, bench, row), about_s=25.0) for row in compared]
        found.append(Measurement(f"slots {model}", partial(_compare_slots, bench, compared[0]), about_s=20.0))
    about_s = bench.sizes.soak_s + 20.0
    found += [
        Measurement(f"soak {model}", partial(_soak, bench, rows[f"{model} 5 s"]), about_s=about_s)
        for model in _SOAKED
        if model in bench.sizes.models
    ]
    return found


def summarize(done: Done) -> dict[str, Any]:
    """Decibels over the error of each precision, outputs over all slots, and what the soak found."""
    compared = {name: done[f"precision {name}"] for name in _COMPARED if f"precision {name}" in done}
    slots = {row.model: done[f"slots {row.model}"] for row in CLIPS if f"slots {row.model}" in done}
    soaks = {model: done[f"soak {model}"] for model in _SOAKED if f"soak {model}" in done}
    return {
        "denoiser_db": {name: _pick(values["denoiser"], "db") for name, values in compared.items()},
        "denoiser_cosine": {name: _pick(values["denoiser"], "cosine") for name, values in compared.items()},
        "decoder_db": {name: _pick(values["decoder"], "db") for name, values in compared.items()},
        "decoder_cosine": {name: _pick(values["decoder"], "cosine") for name, values in compared.items()},
        "strict_distinct_outputs": {model: values["distinct_outputs"] for model, values in slots.items()},
        "soak_not_finite": {model: values["not_finite"] for model, values in soaks.items()},
        "soak_calls": {model: values["calls"] for model, values in soaks.items()},
    }


def _pick(values: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, Any]:
    return {precision: errors[key] for precision, errors in values.items()}


def _compare(bench: Bench, row: ClipRow) -> dict[str, Any]:
    """One step and one window, the same float32 weights rounded to each precision, against float64."""
    model = bench.model(row.model, torch.float32)
    assert isinstance(model, Sa3Model | SaoModel)
    plan = model.plan(make_clip(bench, row))[0]
    latents = _noise(model, plan.frames, seed=0)[None]
    with torch.inference_mode():
        step = _record_step(model, make_clip(bench, row), latents=latents)
        span = plan.decode_windows[0]
        window = latents[..., span.start : span.stop]
        return {
            "frames": plan.frames,
            "window_frames": window.shape[-1],
            "denoiser": _against_float64(model.denoiser, step),
            "decoder": _against_float64(
                model.autoencoder, lambda net: cast("Any", net).decode(window.to(next(net.parameters()).dtype))
            ),
        }


def _record_step(model: Sa3Model | SaoModel, request: GenerationRequest, *, latents: Tensor) -> Network:
    """Returns a denoiser call with the conditioning of `request` that any copy of the network can make."""
    net, taken = model.denoiser, []
    project = net.condition

    def note(*args: Any, **kwargs: Any) -> Any:
        taken.append((args, kwargs))
        return project(*args, **kwargs)

    plan = model.plan(request)[0]
    net.condition = note  # type: ignore[method-assign]
    try:
        model.condition(plan, prompt=model.encode_text([plan.prompt])[0], negative=None, inpaint_latents=None)
    finally:
        del net.condition
    args, kwargs = taken[0]
    time_of_step = torch.full((1,), 0.5, device=model.device)

    def step(other: nn.Module) -> Tensor:
        conditioning = cast("Any", other).condition(*args, **kwargs)
        return cast("Tensor", other(latents, time_of_step, conditioning=conditioning))

    return step


def _against_float64(net: nn.Module, run: Network) -> dict[str, dict[str, float | None]]:
    exact = copy.deepcopy(net).double()
    with _Float64():
        _resolve_kernels(exact)
        expected = run(exact)
    if expected.dtype != torch.float64:
        raise RuntimeError(f"the reference came out in {expected.dtype}")
    errors = {}
    for name, dtype in _PRECISIONS.items():
        rounded = copy.deepcopy(net)
        cast_network(rounded, dtype)
        _resolve_kernels(rounded)
        errors[name] = measure_error(run(rounded).double(), expected)
    return errors


def _resolve_kernels(net: nn.Module) -> None:
    if isinstance(net, AudioAutoencoder | OobleckAutoencoder):  # which keeps kernels that follow from the weights
        net.resolve()


def measure_error(actual: Tensor, expected: Tensor) -> dict[str, float | None]:
    """Returns signal over error in decibels, the cosine between both, and the largest difference over the peak. None
    where `actual` is not finite; decibels also where there is no error."""
    if not bool(actual.isfinite().all()):
        return dict.fromkeys(("db", "cosine", "largest_share"))
    difference = actual - expected
    power, error = float(expected.square().sum()), float(difference.square().sum())
    return {
        "db": 10.0 * math.log10(power / error) if error > 0 else None,
        "cosine": float(nn.functional.cosine_similarity(actual.flatten(), expected.flatten(), dim=0)),
        "largest_share": float(difference.abs().max() / expected.abs().max()),
    }


class _Float64(TorchFunctionMode):
    """The networks go to float32 in places; inside, what is float64 stays so."""

    def __torch_function__(  # noqa: PLR0917  # as torch calls it
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        if func in {Tensor.matmul, Tensor.__matmul__, torch.matmul}:
            args = tuple(factor.double() for factor in args)
        return func(*args, **(kwargs or {}))


def _compare_slots(bench: Bench, row: ClipRow) -> dict[str, Any]:
    """The same row in every slot of a call, among other neighbours each time."""
    model = bench.model(row.model)
    plan = model.plan(make_clip(bench, row))[0]
    frames = round_up(plan.frames, _GRID) if model.spec.pads_rows else plan.frames
    branches = [_branch(model, replace(make_clip(bench, row), prompt=prompt)) for prompt in PROMPTS[: 2 * _SLOTS]]
    own = _noise(model, frames, seed=0)
    digests, outputs = set(), []
    for slot in range(_SLOTS):
        chosen = [branches[0] if index == slot else branches[1 + (index + slot) % 15] for index in range(_SLOTS)]
        x = torch.stack(
            [own if index == slot else _noise(model, frames, seed=100 * slot + index) for index in range(_SLOTS)]
        )
        times = torch.tensor([0.5 if index == slot else (index + 1) / 10 for index in range(_SLOTS)])
        valid = torch.arange(frames)[None].expand(_SLOTS, -1) < plan.valid_frames
        batch = StepBatch.of(x, t=times.to(model.device), valid=valid.to(model.device), branches=chosen)
        output = model.denoise(batch)[slot, :, : plan.valid_frames].cpu().contiguous()
        digests.add(hashlib.sha256(output.numpy().tobytes()).hexdigest())
        outputs.append(output)
    return {
        "slots": _SLOTS,
        "frames": frames,
        "distinct_outputs": len(digests),
        "largest_difference": max(float((output - outputs[0]).abs().max()) for output in outputs),
    }


def _soak(bench: Bench, row: ClipRow) -> dict[str, Any]:
    """Random prompts, levels, scales and lengths through the network, now and then a whole clip."""
    model, rng = bench.model(row.model), random.Random(0)
    side = bench.side(row.model, "lock")
    longest_s = min(_MOST_SOAKED_S, model.spec.card.max_duration_s)
    calls, clips, not_finite = 0, 0, []
    ends_at = time.monotonic() + bench.sizes.soak_s
    with _largest_activation(model) as largest:
        while not calls or time.monotonic() < ends_at:
            request = replace(
                make_clip(bench, row, seed=rng.randrange(2**31)),
                prompt=" ".join(rng.choices(PROMPTS, k=rng.randrange(_MOST_WORDS // 4))),
                duration_s=longest_s ** rng.random(),
            )
            level, scale = rng.choice((0.0, 1e-3, 1.0, rng.random())), rng.choice((0.1, 1.0, 3.0))
            output = _step_once(model, request, level=level, scale=scale)
            calls += 1
            if not bool(output.isfinite().all()):
                not_finite.append({"duration_s": request.duration_s, "level": level, "scale": scale, "call": calls})
            if calls % _CLIP_EVERY == 1:
                audio = bench.run(side.generate(request)).audio[0]
                clips += 1
                if not np.isfinite(audio).all():
                    not_finite.append({"duration_s": request.duration_s, "seed": request.seed, "clip": clips})
    activation = float(largest)
    return {
        "calls": calls,
        "clips": clips,
        "not_finite": len(not_finite),
        "first_not_finite": not_finite[:20],
        "largest_activation": activation if math.isfinite(activation) else None,
        "float16_range_over_activation": _LARGEST_FLOAT16 / activation if math.isfinite(activation) else None,
    }


def _step_once(model: DiffusionModel, request: GenerationRequest, *, level: float, scale: float) -> Tensor:
    """Returns the network's output (1, D, F) for noise of this deviation at this level."""
    plan = model.plan(request)[0]
    valid = (torch.arange(plan.frames) < plan.valid_frames)[None].to(model.device)
    batch = StepBatch.of(
        scale * _noise(model, plan.frames, seed=request.seed)[None],
        t=torch.full((1,), level, device=model.device),
        valid=valid,
        branches=[_branch(model, request)],
    )
    return model.denoise(batch)[..., : plan.valid_frames]


@contextmanager
def _largest_activation(model: DiffusionModel) -> Iterator[Tensor]:
    """Yields a tensor () that follows the largest finite or infinite output of the denoiser's linear layers."""
    assert isinstance(model, Sa3Model | SaoModel)
    largest = torch.zeros((), device=model.device)

    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:  # noqa: PLR0917  # as torch calls it
        torch.maximum(largest, output.detach().abs().amax().float(), out=largest)

    hooks = [part.register_forward_hook(note) for part in model.denoiser.modules() if isinstance(part, nn.Linear)]
    try:
        yield largest
    finally:
        for hook in hooks:
            hook.remove()


def _branch(model: DiffusionModel, request: GenerationRequest) -> BranchConditioning:
    plan = model.plan(request)[0]
    prompt = model.encode_text([plan.prompt])[0]
    return model.condition(plan, prompt=prompt, negative=None, inpaint_latents=None).conditional


def _noise(model: DiffusionModel, frames: int, *, seed: int) -> Tensor:
    """Returns (D, F) float32, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(model.spec.card.latent_channels, frames, generator=generator).to(model.device)
