"""The check of memory shares: replicas that Ray may place on the same GPU must not need more than its memory."""

from __future__ import annotations

from typing import Any

import pytest

from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.settings import Settings
from stable_audio_serve.core.settings_sources import load_settings
from stable_audio_serve.serving.reservations import check_gpu_shares

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


def test_a_memory_share_may_be_smaller_than_the_share_of_the_gpu() -> None:
    check(model(SFX, 0.5, 0.3, max_replicas=9), model(MUSIC, 0.5, 0.5), model("medium", 1, 1.0))


def test_a_memory_share_above_the_share_of_the_gpu_is_refused_by_name() -> None:
    for models, cluster_gpus in (
        ([model(SFX, 0.5, 0.6)], 1.0),
        ([{"name": SFX, "memory_share": 0.6}, {"name": MUSIC}], 1.0),  # equal shares: half a GPU each
    ):
        with pytest.raises(ConfigError) as refusal:
            check(*models, cluster_gpus=cluster_gpus)
        assert refusal.value.field == "memory_share"
        assert "models.small-sfx: memory_share 0.6 is larger than num_gpus 0.5" in refusal.value.message
    check({"name": SFX, "memory_share": 0.6}, {"name": MUSIC}, cluster_gpus=2)  # a GPU for each


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
