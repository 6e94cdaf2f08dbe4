"""The check of memory shares: replicas that Ray may place on the same GPU must not need more than its memory."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.core.settings_sources import load_settings
from stable_audio_serve.serving.reservations import GpuReplicas, check_gpu_shares, check_shares

SFX, MUSIC = "small-sfx", "small-music"


def check(*models: dict[str, Any], cluster_gpus: float = 1.0) -> None:
    check_gpu_shares(Settings.model_validate({"models": models}), cluster_gpus=cluster_gpus)


def model(name: str, num_gpus: float, memory_share: float | None = None, max_replicas: int = 1) -> dict[str, Any]:
    return {
        "name": name,
        "num_gpus": num_gpus,
        "memory_share": memory_share,
        "replicas": {"max_replicas": max_replicas},
    }


def test_default_memory_shares_always_fit() -> None:
    check(model(SFX, 0.25, max_replicas=100), model(MUSIC, 0.3333, max_replicas=100), model("medium", 1))
    check({"name": SFX}, {"name": MUSIC}, {"name": "medium"})  # with default shares


def test_memory_shares_may_differ_from_gpu_shares() -> None:
    check(model(SFX, 0.5, 0.3), model(MUSIC, 0.5, 0.7))


def test_two_models_too_large_for_one_gpu_are_named() -> None:
    with pytest.raises(ConfigError) as refusal:
        check(model(SFX, 0.5, 0.6), model(MUSIC, 0.5, 0.7))
    assert refusal.value.field == "memory_share"
    assert "1 of small-music (num_gpus 0.5, memory_share 0.7)" in refusal.value.message
    assert "1 of small-sfx (num_gpus 0.5, memory_share 0.6)" in refusal.value.message
    assert "1.3 of its memory" in refusal.value.message


def test_replicas_of_one_model_share_a_gpu() -> None:
    check(model(SFX, 0.25, 0.5, max_replicas=2))
    with pytest.raises(ConfigError, match=r"4 of small-sfx .* together 2 of its memory"):
        check(model(SFX, 0.25, 0.5, max_replicas=9))


def test_whole_gpu_is_not_shared() -> None:
    check(model("medium", 1, 0.9), model(SFX, 0.5, 0.5, max_replicas=8))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_gpus": 1.5}, "num_gpus must be a whole number when"),
        ({"num_gpus": 2.0001}, "num_gpus must be a whole number when"),
        ({"memory_share": 0}, "memory_share: Input should be "),
        ({"memory_share": 1.01}, "memory_share: Input should be "),
        ({"memory_share": float("nan")}, "memory_share: Input should be "),
        ({"memory_share": 0.5, "device": "cpu"}, "needs a GPU"),
        ({"memory_share": 0.5, "num_gpus": 0}, "needs a GPU"),
    ],
)
def test_impossible_share_is_refused_by_name(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings({"models": [{"name": SFX, **keys}]}, environ={})


def test_fullest_combination_on_a_gpu_is_found() -> None:
    """The result is compared with a search through all combinations."""
    draw = random.Random(3)
    for _ in range(60):
        models = [
            GpuReplicas(name, draw.choice([0.1, 0.2, 0.25, 0.5]), draw.choice([0.1, 0.2, 0.3, 0.4]), draw.randint(1, 4))
            for name in "abc"
        ]
        fullest = max(
            sum(count * each.memory for count, each in zip(counts, models, strict=True))
            for counts in itertools.product(*(range(each.count + 1) for each in models))
            if sum(count * each.gpu for count, each in zip(counts, models, strict=True)) <= 1 + 1e-9
        )
        if fullest > 1 + 1e-9:
            with pytest.raises(ConfigError, match=f"together {fullest:.4g} of"):
                check_shares(models)
        else:
            check_shares(models)


@pytest.mark.slow
def test_thousands_of_tiny_replicas_are_counted() -> None:
    models = [GpuReplicas(f"m{number}", 0.0001 * (number + 1), 0.001, 10**9) for number in range(10)]
    with pytest.raises(ConfigError, match="together 10 of its memory"):
        check_shares(models)
