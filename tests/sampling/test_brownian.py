from __future__ import annotations

import itertools

import pytest
import torch

from stable_audio_serve.sampling.brownian import BrownianTree, ReplayPath, brownian_steps
from stable_audio_serve.sampling.noise import ReplayDraw, ReplayNoise
from tests.goldens import load_open_goldens

COMMON = load_open_goldens("common")
TREE = COMMON.facts["brownian"]["tree"]
SAMPLER = COMMON.facts["brownian"]["sampler"]
SIGMAS = COMMON.tensors["brownian/sigmas"].tolist()
TOLERANCE = 1e-5


def as_float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


@pytest.mark.parametrize("index", range(len(TREE["spans"])))
def test_increments_match_the_reference(index: int) -> None:
    ends = as_float32(TREE["t0"]), as_float32(TREE["t1"])
    tree = BrownianTree(int(TREE["entropy"]), start=ends[0], end=ends[1], shape=tuple(TREE["shape"]))
    low, high = map(as_float32, TREE["spans"][index])
    expected = COMMON.tensors[f"brownian/tree_{index}"]
    torch.testing.assert_close(tree.increment(low, high), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["sampler_f32", "sampler_one_row"])
def test_step_noise_matches_the_reference(name: str) -> None:
    expected = COMMON.tensors[f"brownian/{name}"]
    drawn = torch.stack(brownian_steps(SAMPLER["seed"], SIGMAS, shape=tuple(expected.shape[1:])))
    torch.testing.assert_close(drawn, expected, rtol=0, atol=TOLERANCE)


def test_paths_per_row_match_the_reference() -> None:
    expected = COMMON.tensors["brownian/sampler_seed_list"]
    for row, seed in enumerate(SAMPLER["seed_list"]):
        drawn = torch.stack(brownian_steps(seed, SIGMAS, shape=tuple(expected.shape[2:])))
        torch.testing.assert_close(drawn, expected[:, row], rtol=0, atol=TOLERANCE)


def test_increments_add_up_and_do_not_depend_on_earlier_calls() -> None:
    tree, other = (BrownianTree(7, start=0.3, end=500.0, shape=(3, 4)) for _ in range(2))
    levels = [0.3, 0.7, 3.25, 41.0, 500.0]
    parts = [tree.increment(low, high) for low, high in itertools.pairwise(levels)]
    torch.testing.assert_close(sum(parts), other.increment(0.3, 500.0), rtol=0, atol=1e-4)
    assert torch.equal(other.increment(3.25, 41.0), parts[2])
    assert not tree.increment(2.0, 2.0).any()


def test_step_noise_is_unit_normal_and_uncorrelated_between_steps() -> None:
    first, second = brownian_steps(3, [8.0, 2.0, 0.5, 0.0], shape=(200_000,))
    assert abs(float(first.mean())) < 0.01
    assert abs(float(first.std()) - 1) < 0.01
    assert abs(float((first * second).mean())) < 0.01


def test_replay_draws_one_integer_and_returns_the_paths_steps() -> None:
    script = [ReplayDraw("initial", 0, (2, 3, 5)), ReplayPath((8.0, 2.0, 0.5, 0.0), (2, 3, 5))]
    torch.manual_seed(5)
    torch.randn(2, 3, 5)
    entropy = int(torch.randint(0, 2**63 - 1, []))
    expected = brownian_steps(entropy, [8.0, 2.0, 0.5], shape=(2, 3, 5))
    row = ReplayNoise(5, script, num_rows=2).row(1)
    assert torch.equal(row.step((3, 5)), expected[0][1])
    assert torch.equal(row.step((3, 5)), expected[1][1])
