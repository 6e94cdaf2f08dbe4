"""The precision of matrix products and convolutions in an autoencoder's decoder. Everything else stays in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn

from stable_audio_serve.core.catalog import DecodePrecision
from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.processor import has_native_bfloat16
from stable_audio_serve.models.switches import float32_products, tf32_products

Products = Callable[[], AbstractContextManager[Any]]  # creates a context that sets the precision of matrix products
_FIRST_WITH_TF32 = 8  # first major version of CUDA's compute capability with TF32


def resolve_decode_precision(device: torch.device, precision: str | None, *, dtype: torch.dtype) -> DecodePrecision:
    """Returns `precision`, or the default for a denoiser of this `dtype` if it is None.

    On CUDA, the default is half if `dtype` is half precision, else tf32 if the device supports it. On other devices, it
    is float32. On an H100, half is as close to float32 as tf32 is (68 and 71 dB): both have 11-bit significands.

    Raises ConfigError if the device does not support `precision`, or if `precision` is not faster there than float32.
    """
    supported = _supported(device)
    if precision is None:
        if device.type == "cuda" and dtype != torch.float32:
            return "half"
        return "tf32" if "tf32" in supported else "float32"
    for choice in supported:
        if choice == precision:
            return choice
    what = "cannot be used on" if precision in get_args(DecodePrecision) else "is unknown; on"
    allowed = ", ".join(supported)
    message = f"decode_precision {precision!r} {what} {_name(device)}; allowed: {allowed}"
    raise ConfigError(message, field="decode_precision", allowed=allowed)


def _supported(device: torch.device) -> tuple[DecodePrecision, ...]:
    if device.type == "cuda":
        has_tf32 = torch.cuda.get_device_capability(device)[0] >= _FIRST_WITH_TF32
        return ("float32", "tf32", "half") if has_tf32 else ("float32", "half")
    if device.type == "cpu" and has_native_bfloat16():
        return ("float32", "half")
    return ("float32",)


def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return "this processor" if has_native_bfloat16() else "this processor, which has no bfloat16"
    return str(device)


def decoder_products(precision: DecodePrecision, device: torch.device) -> Products:
    """Returns a function that creates a context in which matrix products and convolutions have this precision."""
    match precision:
        case "tf32":
            return tf32_products
        case "half":
            return functools.partial(_half, device)
        case _:
            return functools.partial(float32_products, device)


@contextmanager
def _half(device: torch.device) -> Iterator[None]:
    """Compute linear layers, convolutions and attention in half precision; sums, norms and softmax stay in float32."""
    with float32_products(device), torch.autocast(device.type, dtype=_half_dtype(device), cache_enabled=False):
        yield


def _half_dtype(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.bfloat16


def stores_half(precision: DecodePrecision, device: torch.device) -> bool:
    """Whether the decoder's weights are stored in half precision, which avoids a cast in every call.

    On CUDA they are not: the cast takes little time there, and an engine that finds wrong audio at start decodes in
    float32.
    """
    return precision == "half" and device.type == "cpu"


def stored_dtypes(decoder: nn.Module, device: torch.device) -> dict[str, torch.dtype]:
    """Returns the dtype, by layer name, of the layers that are stored in half precision if `stores_half`.

    These are the layers whose parameter `weight` is a matrix or a convolution kernel. All other parameters stay in
    float32.
    """
    half = _half_dtype(device)
    weights = {name: getattr(part, "weight", None) for name, part in decoder.named_modules()}
    return {name: half for name, weight in weights.items() if isinstance(weight, Tensor) and weight.dim() > 1}


def store_half(decoder: nn.Module, device: torch.device) -> None:
    """Convert the decoder's layers that `stored_dtypes` names to half precision, in place."""
    for name, dtype in stored_dtypes(decoder, device).items():
        for parameter in decoder.get_submodule(name).parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
