"""The decoder in each precision that this device supports is close to float32. The rest of the model is unchanged."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from stable_audio_serve.core.catalog import DecodePrecision
from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.precision import decoder_products, resolve_decode_precision
from stable_audio_serve.models.protocol import DecodeWindow, SwitchableModel
from stable_audio_serve.models.registry import resolve_entry
from stable_audio_serve.sampling.noise import SeededNoise
from tests.goldens import SHARP, load_goldens
from tests.gpu.loaded import gpu_only, load_on
from tests.models.precisions import LEAST_DB, noise_ratio_db

pytestmark = pytest.mark.gpu


@pytest.fixture(params=get_args(DecodePrecision))
def precision(request: pytest.FixtureRequest, device: torch.device) -> DecodePrecision:
    try:
        return resolve_decode_precision(device, request.param, dtype=torch.float32)
    except ConfigError as error:
        pytest.skip(str(error))


@torch.inference_mode()
def decode(device: torch.device, name: str, **products: Any) -> Tensor:
    """Decode a checkpoint's stored latents on the device. Returns the audio (batch, channels, samples) on the CPU."""
    net = load_on(device, name).autoencoder
    return net.decode(load_goldens(name).tensors["ae/latents"].to(device), **products).cpu()


@pytest.mark.parametrize("name", SHARP)
def test_decoded_audio_is_close_to_float32(device: torch.device, name: str, precision: DecodePrecision) -> None:
    exact = decode(device, name)
    audio = decode(device, name, products=decoder_products(precision, device))
    assert torch.equal(exact, decode(device, name))
    if precision == "float32":
        assert torch.equal(audio, exact)
        return
    kind = precision if precision != "half" else "float16" if device.type == "cuda" else "bfloat16"
    ratio_db = noise_ratio_db(audio, exact)
    print(f"{name} {precision}: {ratio_db:.1f} dB")
    assert ratio_db >= LEAST_DB[kind][name]


@gpu_only
@torch.inference_mode()
def test_a_decoder_in_half_precision_can_also_decode_exactly(device: torch.device) -> None:
    folder, window = load_goldens("sharp-s").folder, load_goldens("sharp-s").tensors["ae/latents"][0]
    half, exact = (
        load_model(resolve_entry(folder.name, path=str(folder)), device=device, decode_precision=precision)
        for precision in (None, "float32")
    )
    windows = [DecodeWindow(window, 0, SeededNoise(0))]
    expected = exact.decode(windows)[0]
    assert not torch.equal(half.decode(windows)[0], expected)
    assert isinstance(half, SwitchableModel)
    half.use_features(fast_decoding=False, fused_kernels=False)
    assert torch.equal(half.decode(windows)[0], expected)
