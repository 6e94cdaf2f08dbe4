"""The small parts: admission, prompt cache, windows, noise ahead, options."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stable_audio_serve.core.errors import ConfigError, OverloadedError
from stable_audio_serve.engine.admission import Admission
from stable_audio_serve.engine.noise_ahead import RowNoise
from stable_audio_serve.engine.options import EngineOptions
from stable_audio_serve.engine.prompt_cache import PromptCache
from stable_audio_serve.engine.windows import AudioAssembly, SourceEncoding
from stable_audio_serve.models.protocol import SourcePlan, TextEmbedding
from stable_audio_serve.sampling.noise import SeededNoise
from stable_audio_serve.sampling.plan import Guidance, SamplerPlan
from stable_audio_serve.sampling.samplers import build_plan
from tests.factories import make_windows


def test_admission_refuses_above_the_bound_and_says_when_to_return() -> None:
    admission = Admission(max_queue_s=10.0)
    admission.admit(1, 4_000.0)
    admission.admit(2, 9_000.0)
    with pytest.raises(OverloadedError) as refusal:
        admission.admit(3, 1.0)
    assert refusal.value.retry_after_s == pytest.approx(3.0)
    admission.update(2, 5_000.0)
    admission.admit(3, 1.0)
    assert admission.backlog_ms == pytest.approx(9_001.0)


def test_idle_engine_admits_work_of_any_size() -> None:
    admission = Admission(max_queue_s=0.0)
    admission.admit(1, 1e9)
    with pytest.raises(OverloadedError):
        admission.check()
    admission.release(1)
    admission.check()


@given(
    st.lists(
        st.tuples(st.sampled_from(["admit", "update", "release"]), st.integers(0, 5), st.floats(0, 5_000)), max_size=60
    )
)
def test_backlog_never_exceeds_the_bound_by_more_than_one_request(events: list[tuple[str, int, float]]) -> None:
    admission, admitted = Admission(max_queue_s=3.0), dict[int, float]()
    for event, request_id, work_ms in events:
        if event == "release":
            admission.release(request_id)
            admitted.pop(request_id, None)
        elif event == "update" and request_id in admitted:
            admitted[request_id] = min(work_ms, admitted[request_id])
            admission.update(request_id, admitted[request_id])
        elif event == "admit" and request_id not in admitted:
            if sum(admitted.values()) > 3_000.0:
                with pytest.raises(OverloadedError):
                    admission.admit(request_id, work_ms)
            else:
                admission.admit(request_id, work_ms)
                admitted[request_id] = work_ms
        assert admission.backlog_ms == pytest.approx(sum(admitted.values()))
        assert admission.backlog_ms <= 3_000.0 + 5_000.0


def make_plan(sampler: str, steps: int = 4) -> SamplerPlan:
    return build_plan(sampler, torch.linspace(1, 0, steps + 1), guidance=Guidance(), has_source=False)


def make_embedding(prompt: str, *, num_floats: int = 100) -> TextEmbedding:
    return TextEmbedding(prompt, torch.zeros(num_floats, 1), torch.ones(0, dtype=torch.bool))


def test_prompt_cache_drops_the_least_recently_used() -> None:
    cache = PromptCache(max_bytes=800)
    cache.put(make_embedding("a"))
    cache.put(make_embedding("b"))
    assert cache.get("a") is not None
    cache.put(make_embedding("c"))
    assert [cache.get(prompt) is not None for prompt in "abc"] == [True, False, True]


@given(st.lists(st.tuples(st.text(max_size=2), st.integers(0, 300)), max_size=30))
def test_prompt_cache_never_holds_more_than_its_bound(puts: list[tuple[str, int]]) -> None:
    cache = PromptCache(max_bytes=1000)
    for prompt, num_floats in puts:
        cache.put(make_embedding(prompt, num_floats=num_floats))
        assert 0 <= cache.num_bytes <= 1000


@given(frames=st.integers(1, 200), chunk=st.integers(1, 100))
def test_source_windows_join_without_seams(frames: int, chunk: int) -> None:
    samples = torch.arange(frames * 4.0).repeat(2, 1)
    noise = SeededNoise(0)
    encoding = SourceEncoding(SourcePlan(samples, make_windows(frames)), stage="init", noise=noise, hop=4)
    while encoding.lengths_left:
        for window in encoding.pending(chunk):
            encoding.put(window.samples[:1, ::4])
    torch.testing.assert_close(encoding.latents(), samples[:1, ::4], rtol=0, atol=0)


@given(
    frames=st.integers(1, 200), valid_share=st.floats(0, 1), length_share=st.floats(0.01, 1), chunk=st.integers(1, 100)
)
def test_audio_windows_join_trim_and_fall_silent(
    frames: int, valid_share: float, length_share: float, chunk: int
) -> None:
    hop, valid = 4, int(frames * valid_share)
    samples = max(1, int(frames * hop * length_share))
    latents = torch.rand(2, frames)
    audio = AudioAssembly(make_windows(frames), channels=2, hop=hop, valid_frames=valid, output_samples=samples)
    while audio.lengths_left:
        for window in list(audio.pending(latents, SeededNoise(0), chunk)):
            audio.put(window.latents.repeat_interleave(hop, dim=1))
    expected = latents.repeat_interleave(hop, dim=1).numpy()
    expected[:, valid * hop :] = 0
    np.testing.assert_array_equal(audio.audio(), expected[:, :samples])


def test_windows_behind_the_result_are_not_decoded() -> None:
    audio = AudioAssembly(make_windows(200), channels=2, hop=4, valid_frames=200, output_samples=50)
    assert audio.lengths_left == (32,)


def test_audio_keeps_its_level_and_non_numbers_are_noticed() -> None:
    audio = AudioAssembly(make_windows(2), channels=1, hop=2, valid_frames=2, output_samples=4)
    audio.put(torch.tensor([[-3.0, 0.5, 3.0, float("nan")]]))
    np.testing.assert_array_equal(audio.audio()[:, :3], [[-3.0, 0.5, 3.0]])
    assert not audio.is_finite


@pytest.mark.parametrize(("sampler", "num_draws"), [("euler", 0), ("pingpong", 3)])
def test_noise_is_drawn_in_order_and_never_for_nothing(sampler: str, num_draws: int) -> None:
    shape = (3, 5)
    reference = SeededNoise(9)
    with ThreadPoolExecutor(1) as drawer:
        noise = RowNoise(SeededNoise(9), make_plan(sampler), shape=shape, drawer=drawer)
        torch.testing.assert_close(noise.initial(), reference.initial(shape), rtol=0, atol=0)
        for _ in range(num_draws):
            expected = reference.step(shape)
            for _ in range(2):  # a step that failed asks again
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

    with ThreadPoolExecutor(1) as drawer:
        noise = RowNoise(Watched(1), make_plan("pingpong"), shape=(2, 2), drawer=drawer)
        noise.initial()
        noise.current()
    assert threads
    assert threading.get_ident() not in threads


@pytest.mark.parametrize(
    "fields", [{"mode": "exact"}, {"slots": 0}, {"slots": 1}, {"fixed_share": 0}, {"slack": 0.5}, {"max_queue_s": -1}]
)
def test_bad_options_are_refused_by_name(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as refusal:
        EngineOptions(**fields)  # type: ignore[arg-type]
    assert refusal.value.field == next(iter(fields))
