"""The precision of matrix products and convolutions in an autoencoder's decoder. Everything else stays in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from stable_audio_serve.core.catalog import DecodePrecision
from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.processor import has_matrix_bfloat16, has_native_bfloat16
from stable_audio_serve.models.onednn import linear
from stable_audio_serve.models.switches import (
    SWITCH_LOCK,
    bfloat16_processor_products,
    switched,
    tf32_products,
)

Products = Callable[[], AbstractContextManager[None]]  # creates a context that sets the precision of matrix products
Product = Callable[..., Tensor]  # (layer, x, weight, **options) -> output of the layer without bias, float32

_FACTORS = ("input", "weight", "bias")
_ARGUMENTS: Mapping[Any, tuple[str, ...]] = {  # the parameters, in order, of the functions that SplitProducts replaces
    F.linear: _FACTORS,
    F.conv1d: (*_FACTORS, "stride", "padding", "dilation", "groups"),
    F.conv_transpose1d: (*_FACTORS, "stride", "padding", "output_padding", "groups", "dilation"),
}
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
        # "split" needs AMX. Without it, its three bfloat16 products take 1.9 times as long as one float32 product.
        return ("float32", "split", "half") if has_matrix_bfloat16() else ("float32", "half")
    return ("float32",)


def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return "this processor" if has_native_bfloat16() else "this processor, which has no bfloat16"
    return str(device)


def decoder_products(precision: DecodePrecision, device: torch.device) -> Products:
    """Returns a function that creates a context in which matrix products and convolutions have this precision."""
    match precision:
        case "tf32":
            return _tf32
        case "split":
            return _split
        case "half":
            return functools.partial(_half, device)
        case _:
            return SWITCH_LOCK.shared


@contextmanager
def _tf32() -> Iterator[None]:
    with SWITCH_LOCK.alone(), switched(tf32_products()):
        yield


@contextmanager
def _half(device: torch.device) -> Iterator[None]:
    """Compute linear layers, convolutions and attention in half precision; sums, norms and softmax stay in float32."""
    with SWITCH_LOCK.shared(), torch.autocast(device.type, dtype=_half_dtype(device), cache_enabled=False):
        yield


@contextmanager
def _split() -> Iterator[None]:
    with SWITCH_LOCK.alone(), SplitProducts(_bfloat16_product):
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


class SplitProducts(TorchFunctionMode):
    """Computes each float32 linear layer and convolution as the float32 sum of three cheaper bfloat16 products.

    Input and weight are each split into the value rounded to bfloat16, and the remainder. In bfloat16, the two together
    have 16 significant bits. The product of the two remainders is omitted.
    """

    def __init__(self, product: Product) -> None:
        """`product` computes each of the three products. It may round its input and weight to bfloat16."""
        super().__init__()
        self._product = product

    def __torch_function__(  # noqa: PLR0917  # torch's signature
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        func = F.linear if func is linear else func
        if func not in _ARGUMENTS or args[0].dtype != torch.float32:
            return func(*args, **kwargs)
        given = dict(zip(_ARGUMENTS[func], args, strict=False)) | kwargs
        bias = given.pop("bias", None)
        x, x_rest = _parts(given.pop("input"))
        weight, weight_rest = _parts(given.pop("weight"))
        product = functools.partial(self._product, func, **given)
        out = product(x, weight_rest) + product(x_rest, weight) + product(x, weight)
        if bias is None:
            return out
        return out + (bias if func is F.linear else bias[:, None])


def _parts(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `factor` rounded to bfloat16, and the remainder, both as float32."""
    rounded = factor.bfloat16().float()
    return rounded, factor - rounded


def _bfloat16_product(layer: Callable[..., Tensor], x: Tensor, weight: Tensor, **options: Any) -> Tensor:  # noqa: PLR0917
    """Compute a layer on a CPU with input and weight rounded to bfloat16. Returns float32."""
    with switched(bfloat16_processor_products()):
        return layer(x, weight, **options)
