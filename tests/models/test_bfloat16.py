"""A denoiser in bfloat16 is close to the reference values, for Stable Audio 3 and Stable Audio Open.

The tests run on any processor. A processor without bfloat16 instructions gives the same results but is slow, so a
server refuses bfloat16 there.
"""

from __future__ import annotations

import asyncio
import copy
import math
from collections import defaultdict
from collections.abc import Container
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.models.blocks.norms import RMSNorm
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.registry import resolve_entry
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.models.sao.denoiser import ScaledLayerNorm
from stable_audio_serve.models.sao.model import SaoModel
from stable_audio_serve.models.weights import cast_network
from stable_audio_serve.verification.checks import Finding, Goldens
from stable_audio_serve.verification.verify import Report, compare
from tests.factories import make_request
from tests.goldens import OPEN_GOLDENS, SA3_GOLDENS, SHARP, TINY
from tests.parameters import slow

# Kind of comparison -> least allowed signal-to-error ratio in decibels, about 4 dB below the lowest measured value.
# Guidance multiplies the error. Most whole runs reach 40 dB for latents and 29 dB for audio.
LEAST_DB: dict[str, float] = {
    "denoiser": 34.0,
    "denoiser padding": 36.0,
    "denoiser guidance": 28.0,
    "end-to-end steps": 28.0,
    "end-to-end latents": 24.0,
    "end-to-end audio": 17.0,
}


class Decibels(Report):
    """A verification report that stores the signal-to-error ratio of each comparison, in decibels."""

    def __init__(self) -> None:
        super().__init__(say=lambda line: None)
        self.found: dict[str, list[tuple[float, str]]] = defaultdict(list)

    def compare(self, component: str, found: Finding) -> None:
        key, actual, expected, only, own = found
        kept = torch.ones_like(expected, dtype=torch.bool) if only is None else only.expand_as(expected)
        signal = expected[kept].double()
        error = actual[kept].double() - signal
        if len(signal) and error.any():
            self.found[own or component].append((20.0 * math.log10(signal.norm() / error.norm()), key))


def load_in_bfloat16(folder: Path) -> Sa3Model | SaoModel:
    model = load_model(resolve_entry(folder.name, path=str(folder)))
    assert isinstance(model, Sa3Model | SaoModel)
    cast_network(model.denoiser, torch.bfloat16)
    return model


@pytest.mark.parametrize(
    ("folder", "cases"),
    [
        (SA3_GOLDENS / "tiny-l", {"gen/t2a_short_unchunked", "gen/t2a_cfg3_neg_apg1"}),
        *(slow(SA3_GOLDENS / name, None) for name in (*SHARP, *TINY)),
        *(slow(OPEN_GOLDENS / name, None) for name in ("tiny-small", "tiny-1.0")),
    ],
)
@torch.no_grad()
def test_bfloat16_runs_are_near_the_stored_numbers(folder: Path, cases: Container[str] | None) -> None:
    report, goldens = Decibels(), Goldens.load(folder)
    if cases is not None:
        goldens.facts["cases"] = {name: case for name, case in goldens.facts["cases"].items() if name in cases}
    only = {"denoiser", "denoiser guidance", "denoiser padding", "end-to-end"}
    compare(report, goldens, model=load_in_bfloat16(folder), only=only)
    found = {component: min(values) for component, values in report.found.items() if component in LEAST_DB}
    assert {"denoiser", "denoiser guidance", "end-to-end latents", "end-to-end audio"} <= found.keys()
    assert {component: worst for component, worst in found.items() if worst[0] < LEAST_DB[component]} == {}


@pytest.mark.parametrize("folder", [slow(SA3_GOLDENS / "tiny-s"), slow(OPEN_GOLDENS / "tiny-small")])
async def test_other_rows_change_no_byte_in_strict_mode(folder: Path) -> None:
    requests = [make_request(seed=n, duration_s=0.4 + 0.2 * n, steps=2 + n, cfg_scale=1.0 + n) for n in range(3)]
    options = EngineOptions(mode="strict", torch_threads=1, warmup_budget_s=0.0)
    async with Engine(load_in_bfloat16(folder), options) as engine:
        alone = [(await engine.generate(request)).audio[0] for request in requests]
        crowd = [result.audio[0] for result in await asyncio.gather(*map(engine.generate, requests))]
    for one, other in zip(alone, crowd, strict=True):
        np.testing.assert_array_equal(other, one)


@pytest.mark.parametrize("folder", [SA3_GOLDENS / "sharp-l", OPEN_GOLDENS / "tiny-small"])
def test_angles_and_times_stay_in_float32(folder: Path) -> None:
    net: nn.Module = load_in_bfloat16(folder).denoiser
    transformer = net.transformer
    assert isinstance(transformer, nn.Module)
    table = transformer.rotary_table(torch.arange(9).float())  # type: ignore[operator]
    assert table.cos.dtype == table.sin.dtype == torch.float32
    assert net.timestep_features(torch.tensor([0.3])).dtype == torch.float32  # type: ignore[operator]


def test_norms_compute_statistics_in_float32() -> None:
    """In bfloat16, the sum of the squares of 1024 values near 300 would have a large rounding error."""
    x = (300.0 + torch.randn(4, 1024, generator=torch.Generator().manual_seed(0))).bfloat16()
    for norm in (RMSNorm(1024), ScaledLayerNorm(1024)):
        exact = copy.deepcopy(norm).double()(x.double())
        cast_network(norm, torch.bfloat16)
        made = norm(x)
        assert made.dtype == torch.bfloat16
        torch.testing.assert_close(made.double(), exact.double(), atol=1e-6, rtol=2**-8)


def test_attention_computes_softmax_in_float32() -> None:
    """The relative error is 1.7e-3. It would be 9e-3 if the softmax were rounded to bfloat16 like inputs and result."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 16, 256, 64, generator=generator).bfloat16() for _ in range(3))
    exact = nn.functional.scaled_dot_product_attention(4 * q.double(), k.double(), v.double())
    made = nn.functional.scaled_dot_product_attention(4 * q, k, v)
    assert (made - exact).norm() < 3e-3 * exact.norm()
