"""The cache of encoded prompts stays within its memory limit by dropping the least recently used prompts."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from stable_audio_serve.engine.calls.stages import PromptCache
from stable_audio_serve.models.protocol import TextEmbedding


def make_embedding(prompt: str, *, num_floats: int = 100) -> TextEmbedding:
    return TextEmbedding(prompt, torch.zeros(num_floats, 1), torch.ones(0, dtype=torch.bool))


def test_prompt_cache_drops_the_least_recently_used() -> None:
    cache = PromptCache(max_bytes=1000)
    cache.put(make_embedding("a"))
    cache.put(make_embedding("b"))
    assert cache.get("a") is not None
    cache.put(make_embedding("c"))
    assert [cache.get(prompt) is not None for prompt in "abc"] == [True, False, True]


def test_prompt_cache_counts_the_text_of_prompts() -> None:
    cache = PromptCache(max_bytes=10_000)
    prompts = [letter * 1000 for letter in "abcdefghijklmnopqrst"]
    for prompt in prompts:
        cache.put(make_embedding(prompt))
    held = sum(len(prompt) for prompt in prompts if cache.get(prompt) is not None)
    assert 0 < held <= 10_000


@given(st.lists(st.tuples(st.text(max_size=2), st.integers(0, 300)), max_size=30))
def test_prompt_cache_never_holds_more_than_its_bound(puts: list[tuple[str, int]]) -> None:
    cache = PromptCache(max_bytes=1000)
    for prompt, num_floats in puts:
        cache.put(make_embedding(prompt, num_floats=num_floats))
        assert 0 <= cache.num_bytes <= 1000
