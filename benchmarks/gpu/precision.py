"""Part 5 of the GPU benchmarks: the error of one step and one decoded window in each precision, relative to float64.

The models have random weights. Models with real weights may have larger activations.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.published import ClipRow
from benchmarks.pieces import Pieces
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.models.protocol import DiffusionModel
from stable_audio_serve.models.sa3.autoencoder import AudioAutoencoder
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.models.sao.model import SaoModel
from stable_audio_serve.models.sao.oobleck import OobleckAutoencoder
from stable_audio_serve.models.weights import cast_network

_COMPARED = ("small 5 s", "medium 5 s", "medium 120 s", "open 47 s")
_PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Network = Callable[[nn.Module], Tensor]


async def measure(bench: Bench, pieces: Pieces) -> dict[str, Any]:
    """Returns the signal-to-error ratio of each precision in decibels, by clip."""
    rows = [row for row in bench.clips if row.name in _COMPARED]
    compared = {row.name: await pieces.attempt(row.name, partial(_compare, bench, row)) for row in rows}
    found = {name: values for name, values in compared.items() if values}
    return {
        **{
            f"{part}_db": {
                name: {precision: errors["db"] for precision, errors in values[part].items()}
                for name, values in found.items()
            }
            for part in ("denoiser", "decoder")
        },
        "clips": found,
    }


async def _compare(bench: Bench, row: ClipRow) -> dict[str, Any]:
    """Measure the errors of one step and one decoded window. Each precision rounds the same float32 weights."""
    model = await bench.model(row.model, torch.float32)
    assert isinstance(model, Sa3Model | SaoModel)
    request = await bench.clip(row)
    plan = model.plan(request)[0]
    latents = _noise(model, plan.frames)
    with torch.inference_mode():
        step = _record_step(model, request, latents=latents)
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
    """Returns a function that runs one step with a copy of the denoiser, its argument.

    The step has the given latents and the conditioning of `request`.
    """
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
    if isinstance(net, AudioAutoencoder | OobleckAutoencoder):  # autoencoders cache kernels computed from weights
        net.resolve()


def measure_error(actual: Tensor, expected: Tensor) -> dict[str, float | None]:
    """Returns the error of `actual` relative to `expected` in three figures.

    `db` is the signal-to-error ratio in decibels (None if there is no error), `cosine` the cosine similarity,
    `largest_share` the largest difference divided by the peak. All are None if `actual` is not finite.
    """
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
    """While active, networks compute in float64: their conversions of float64 tensors to float32 have no effect."""

    def __torch_function__(  # noqa: PLR0917  # torch's signature
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        if func in {Tensor.matmul, Tensor.__matmul__, torch.matmul}:
            args = tuple(factor.double() for factor in args)
        return func(*args, **(kwargs or {}))


def _noise(model: DiffusionModel, frames: int) -> Tensor:
    """Returns normal noise (1, latent channels, frames) float32, with the same values on every device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, model.spec.card.latent_channels, frames, generator=generator).to(model.device)
