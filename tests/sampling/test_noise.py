from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stable_audio_serve.core.errors import GenerationError
from stable_audio_serve.sampling.noise import ReplayDraw, ReplayNoise, SeededNoise

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", [0, 42, 2**31, 2**63 + 5, -1])
def test_latent_draws_match_a_single_row_reference_run(seed: int) -> None:
    source = SeededNoise(seed)
    torch.manual_seed(seed)
    assert torch.equal(source.initial((4, 33)), torch.randn(1, 4, 33)[0])
    for _ in range(3):
        assert torch.equal(source.step((4, 33)), torch.randn(1, 4, 33)[0])


def test_any_integer_is_a_seed() -> None:
    assert torch.equal(SeededNoise(2**70 + 3).initial((2, 8)), SeededNoise(3).initial((2, 8)))
    assert not torch.equal(SeededNoise(3).initial((2, 8)), SeededNoise(4).initial((2, 8)))


@given(start=st.integers(0, 200), length=st.integers(1, 150), axis=st.integers(0, 1), seed=st.integers(-5, 2**65))
def test_noise_of_a_frame_does_not_depend_on_the_window(start: int, length: int, axis: int, seed: int) -> None:
    def window(begin: int, frames: int) -> torch.Tensor:
        shape = (frames, 3) if axis == 0 else (3, frames)
        return SeededNoise(seed).window("decode/tokens", begin, shape=shape, frame_axis=axis, device=CPU)

    drawn = window(start, length)
    assert drawn.shape[axis] == length
    assert torch.equal(drawn, window(0, start + length).narrow(axis, start, length))


def test_window_noise_depends_on_stage_seed_and_block_only() -> None:
    source = SeededNoise(1)
    first = source.window("decode/bottleneck", 0, shape=(3, 64), frame_axis=1, device=CPU)
    source.step((3, 64))
    assert torch.equal(first, source.window("decode/bottleneck", 0, shape=(3, 64), frame_axis=1, device=CPU))
    assert not torch.equal(first, source.window("decode/tokens", 0, shape=(3, 64), frame_axis=1, device=CPU))
    assert not torch.equal(
        first, SeededNoise(2).window("decode/bottleneck", 0, shape=(3, 64), frame_axis=1, device=CPU)
    )
    assert not torch.equal(first[:, :32], first[:, 32:])
    assert 0.8 < float(first.std()) < 1.2


SCRIPT = (
    ReplayDraw("initial", 0, (2, 3, 8)),
    ReplayDraw("init/tokens", 0, (8, 1, 5)),
    ReplayDraw("step", 0, (2, 3, 8)),
    ReplayDraw("step", 1, (2, 3, 8)),
    ReplayDraw("decode/bottleneck", 0, (2, 3, 8)),
    ReplayDraw("decode/tokens", 0, (16, 2, 5)),
)


def test_replay_returns_the_references_draws_in_any_order() -> None:
    torch.manual_seed(9)
    expected = [torch.randn(draw.shape) for draw in SCRIPT]
    replay = ReplayNoise(9, SCRIPT, num_rows=2)
    first, second = replay.row(0), replay.row(1)
    tokens = second.window("decode/tokens", 0, shape=(8, 2, 5), frame_axis=0, device=CPU)
    assert torch.equal(tokens, expected[5][8:])
    assert torch.equal(first.window("decode/tokens", 0, shape=(8, 2, 5), frame_axis=0, device=CPU), expected[5][:8])
    assert torch.equal(first.window("decode/bottleneck", 0, shape=(3, 8), frame_axis=1, device=CPU), expected[4][0])
    assert torch.equal(second.step((3, 8)), expected[2][1])
    assert torch.equal(second.step((3, 8)), expected[3][1])
    assert torch.equal(first.step((3, 8)), expected[2][0])
    assert torch.equal(second.initial((3, 8)), expected[0][1])
    for row in (first, second):
        assert torch.equal(row.window("init/tokens", 0, shape=(8, 1, 5), frame_axis=0, device=CPU), expected[1])


def test_replay_is_thread_safe() -> None:
    script = [ReplayDraw("step", step, (2, 64, 50)) for step in range(200)]
    expected = ReplayNoise(3, script, num_rows=2).draw("step", 199)
    for _ in range(5):
        replay = ReplayNoise(3, script, num_rows=2)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda step, replay=replay: replay.draw("step", step), reversed(range(200))))
        assert torch.equal(found[0], expected)


def test_replay_names_a_missing_draw() -> None:
    row = ReplayNoise(9, SCRIPT, num_rows=2).row(0)
    with pytest.raises(GenerationError, match="inpaint/tokens"):
        row.window("inpaint/tokens", 0, shape=(8, 1, 5), frame_axis=0, device=CPU)
    with pytest.raises(GenerationError, match="2x3x8"):
        row.initial((3, 9))
