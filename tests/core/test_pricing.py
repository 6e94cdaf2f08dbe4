"""The size of requests and their expected time, compared with values computed by hand."""

from __future__ import annotations

import pytest

from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.core.pricing import Prices, WorkSize

PRICES = Prices(row_ms=10.0, evaluation_ms=2.0, evaluated_second_ms=0.5, audio_second_ms=3.0, default_steps=8)


def request(**fields: object) -> GenerationRequest:
    return GenerationRequest(prompt="x", duration_s=4.0, seed=1, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "size", "ms"),
    [
        ({}, WorkSize(1, 8, 32.0, 4.0), 10 + 16 + 16 + 12),
        ({"steps": 50}, WorkSize(1, 50, 200.0, 4.0), 10 + 100 + 100 + 12),
        ({"cfg_scale": 4.0}, WorkSize(1, 16, 64.0, 4.0), 10 + 32 + 32 + 12),
        ({"sampler": "k-heun", "cfg_scale": 4.0}, WorkSize(1, 32, 128.0, 4.0), 10 + 64 + 64 + 12),
        ({"batch_size": 3, "cfg_scale": 4.0}, WorkSize(3, 48, 192.0, 12.0), 3 * (10 + 32 + 32 + 12)),
    ],
)
def test_price_is_the_sum_of_a_requests_parts(fields: dict[str, object], size: WorkSize, ms: float) -> None:
    assert WorkSize.of(request(**fields), model=PRICES) == size
    assert PRICES.of_request(request(**fields)) == PRICES.of(size) == ms


def test_a_model_that_guides_by_default_costs_twice_the_steps() -> None:
    model = ModelCard("m", "f", default_steps=100, default_cfg_scale=7.0)
    assert WorkSize.of(request(), model=model).evaluations == 200
    assert WorkSize.of(request(cfg_scale=1.0), model=model).evaluations == 100
