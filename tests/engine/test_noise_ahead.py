"""The noise of a row is drawn ahead on another thread: in order, and only for steps that use noise."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from stable_audio_serve.engine.calls.requests import RowNoise
from stable_audio_serve.sampling.noise import SeededNoise
from stable_audio_serve.sampling.plan import Guidance, SamplerPlan
from stable_audio_serve.sampling.samplers import build_plan


def make_plan(sampler: str, steps: int = 4) -> SamplerPlan:
    return build_plan(sampler, torch.linspace(1, 0, steps + 1), guidance=Guidance(), has_source=False)


class FasterAndFaster(SeededNoise):
    """A noise source whose draws take less time from one to the next."""

    sleep_s = 0.05

    def initial(self, shape: tuple[int, ...]) -> torch.Tensor:
        time.sleep(self.sleep_s)
        return super().initial(shape)

    def step(self, shape: tuple[int, ...]) -> torch.Tensor:
        self.sleep_s /= 2.0
        time.sleep(self.sleep_s)
        return super().step(shape)


class Counted(SeededNoise):
    """Counts the draws for steps."""

    num_draws = 0

    def step(self, shape: tuple[int, ...]) -> torch.Tensor:
        self.num_draws += 1
        return super().step(shape)


@pytest.mark.parametrize("num_threads", [1, 4])
@pytest.mark.parametrize(("sampler", "num_draws"), [("euler", 0), ("pingpong", 3)])
def test_noise_is_drawn_in_order_and_only_where_it_is_used(sampler: str, num_draws: int, num_threads: int) -> None:
    shape = (3, 5)
    reference = SeededNoise(9)
    with ThreadPoolExecutor(num_threads) as noise_pool:
        noise = RowNoise(FasterAndFaster(9), make_plan(sampler), shape=shape, noise_pool=noise_pool)
        torch.testing.assert_close(noise.initial(), reference.initial(shape), rtol=0, atol=0)
        for _ in range(num_draws):
            expected = reference.step(shape)
            for _ in range(2):  # a step that is repeated after a failure must read the same noise
                current = noise.current()
                assert current is not None
                torch.testing.assert_close(current, expected, rtol=0, atol=0)
            noise.advance()
        assert noise.current() is None


def test_noise_is_drawn_on_the_side_thread() -> None:
    threads: set[int] = set()

    class Watched(SeededNoise):
        def initial(self, shape: tuple[int, ...]) -> torch.Tensor:
            threads.add(threading.get_ident())
            return super().initial(shape)

        def step(self, shape: tuple[int, ...]) -> torch.Tensor:
            threads.add(threading.get_ident())
            return super().step(shape)

    with ThreadPoolExecutor(1) as noise_pool:
        noise = RowNoise(Watched(1), make_plan("pingpong"), shape=(2, 2), noise_pool=noise_pool)
        noise.initial()
        noise.current()
    assert threads
    assert threading.get_ident() not in threads


def test_the_noise_of_two_steps_is_drawn_ahead_while_the_row_runs() -> None:
    source = Counted(1)
    with ThreadPoolExecutor(2) as noise_pool:
        noise = RowNoise(source, make_plan("pingpong", steps=8), shape=(2, 2), noise_pool=noise_pool)
        noise.current()
        assert source.num_draws == 1
        noise.advance()
    assert source.num_draws == 3


def test_a_second_draw_does_not_wait_for_the_first_step() -> None:
    """Otherwise the second step of many new rows would need two draws of each row at once."""
    source = Counted(1)
    with ThreadPoolExecutor(1) as noise_pool:
        noise = RowNoise(source, make_plan("pingpong", steps=8), shape=(2, 2), noise_pool=noise_pool)
        noise.initial()
    assert source.num_draws == 2
