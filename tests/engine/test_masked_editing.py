"""Inpainting with a model that has no mask input: the engine restores the source's latent frames after each step."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.models.protocol import DecodeWindow, EncodeWindow
from stable_audio_serve.sampling.samplers import SAMPLERS
from tests.engine.test_batch_independence import assert_same, make_options
from tests.factories import ToyModel, make_audio, make_request, make_varied_requests
from tests.parameters import slow

HOP, RATE_HZ = 8, 800
DURATION_S = 0.6
OPTIONS = EngineOptions(mode="strict", warmup_budget_s=0.0, torch_threads=1)


class Watched(ToyModel):
    """A toy model that records the latents of each window that it encodes or decodes."""

    def __init__(self) -> None:
        super().__init__(noisy_source_encoder=True, blends=True)
        self.encoded: dict[tuple[str, int], Tensor] = {}
        self.decoded: dict[int, Tensor] = {}

    def encode_audio(self, windows: Sequence[EncodeWindow]) -> list[Tensor]:
        latents = super().encode_audio(windows)
        self.encoded.update({(w.stage, w.start): z for w, z in zip(windows, latents, strict=True)})
        return latents

    def decode(self, windows: Sequence[DecodeWindow]) -> list[Tensor]:
        self.decoded.update({window.start: window.latents for window in windows})
        return super().decode(windows)


def make_edit(sampler: str, *regions_s: tuple[float, float], **fields: object) -> GenerationRequest:
    audio = make_audio(1.0, seed=4)
    return make_request(
        duration_s=DURATION_S, sampler=sampler, seed=9, inpaint_audio=audio, inpaint_regions_s=regions_s, **fields
    )


def make_model() -> ToyModel:
    return ToyModel(noisy_source_encoder=True, blends=True)


@pytest.fixture(params=["strict", slow("fast")])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("variation", [False, True])
async def test_kept_frames_equal_the_sources_latents(sampler: str, variation: bool) -> None:
    fields = {"init_audio": make_audio(0.5), "init_noise_level": 0.5} if variation else {}
    model = Watched()
    async with Engine(model, OPTIONS) as engine:
        await engine.generate(make_edit(sampler, (0.2, 0.4), cfg_scale=2.0, **fields))
    generated = slice(int(0.2 * RATE_HZ / HOP), int(0.4 * RATE_HZ / HOP))
    source, result = model.encoded["inpaint", 0], model.decoded[0]
    changed = torch.ones(result.shape[1], dtype=torch.bool)
    changed[generated] = False
    assert torch.equal(result[:, changed], source[:, : result.shape[1]][:, changed])
    assert (result != source)[:, generated].all()


async def test_a_mask_that_keeps_nothing_equals_text_to_audio() -> None:
    async with Engine(make_model(), OPTIONS) as engine:
        for sampler in SAMPLERS:
            edited = await engine.generate(make_edit(sampler, (0.0, 10.0)))
            plain = await engine.generate(make_request(duration_s=DURATION_S, sampler=sampler, seed=9))
            np.testing.assert_array_equal(edited.audio[0], plain.audio[0])


async def test_a_mask_that_keeps_everything_returns_the_source() -> None:
    model = Watched()
    async with Engine(model, OPTIONS) as engine:
        results = [await engine.generate(make_edit(sampler, steps=3)) for sampler in SAMPLERS]
    assert torch.equal(model.decoded[0], model.encoded["inpaint", 0])
    for result in results[1:]:
        np.testing.assert_array_equal(result.audio[0], results[0].audio[0])


async def test_an_edit_in_a_crowd_equals_the_edit_alone(mode: str) -> None:
    options = make_options(mode)
    subjects = [
        request
        for sampler in SAMPLERS
        for request in (
            make_edit(sampler, (0.1, 0.3), cfg_scale=3.0),
            make_edit(sampler, (0.5, 2.0), init_audio=make_audio(0.5), init_noise_level=0.7, batch_size=2),
            make_request(duration_s=DURATION_S, sampler=sampler, seed=9),
        )
    ]
    async with Engine(make_model(), options) as engine:
        alone = [await engine.generate(subject) for subject in subjects]
    async with Engine(make_model(), options) as engine:
        crowd = [*make_varied_requests(), *(replace(subject, seed=70) for subject in subjects)]
        results = await asyncio.gather(*map(engine.generate, [*crowd[:4], *subjects, *crowd[4:]]))
    for result, expected in zip(results[4 : 4 + len(subjects)], alone, strict=True):
        assert_same(mode, result, expected)


async def test_each_variation_keeps_its_own_encoding() -> None:
    request = make_edit("euler", (0.2, 0.4), batch_size=3)
    async with Engine(make_model(), OPTIONS) as engine:
        together = await engine.generate(request)
        for index, seed in enumerate(together.seeds):
            single = await engine.generate(replace(request, seed=seed, batch_size=1))
            np.testing.assert_array_equal(together.audio[index], single.audio[0])
