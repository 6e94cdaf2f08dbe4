"""Inpainting with Stable Audio Open. Its networks have no mask input, so the engine restores the kept latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stable_audio_serve.core.generation import GenerationRequest, SourceAudio
from stable_audio_serve.models.protocol import DecodeWindow, EncodeWindow, StepBatch
from tests.models.forwarding import ForwardingModel
from tests.models.sao.test_model import loaded, run
from tests.parameters import slow

FRAMES, HOP = 64, 64
REGION = slice(20, 36)
CLIP = np.random.default_rng(5).uniform(-0.8, 0.8, (2, FRAMES * HOP)).astype(np.float32)


class Watched(ForwardingModel):
    """A model that records the encoded source, the network's input at each step, and the decoded latents."""

    def __init__(self, name: str) -> None:
        super().__init__(loaded(name))
        self.encoded: dict[str, Tensor] = {}
        self.seen: list[Tensor] = []
        self.decoded: list[Tensor] = []

    def encode_audio(self, windows: Sequence[EncodeWindow]) -> list[Tensor]:
        latents = super().encode_audio(windows)
        self.encoded.update({window.stage: z for window, z in zip(windows, latents, strict=True)})
        return latents

    def denoise(self, batch: StepBatch) -> Tensor:
        self.seen.append(batch.x[0].clone())
        return super().denoise(batch)

    def decode(self, windows: Sequence[DecodeWindow]) -> list[Tensor]:
        self.decoded += [window.latents for window in windows]
        return super().decode(windows)


def edit(name: str, sampler: str, **fields: Any) -> Watched:
    model = Watched(name)
    request = GenerationRequest(
        prompt="rain",
        duration_s=FRAMES * HOP / 1000,
        seed=3,
        steps=4,
        sampler=sampler,
        chunked_decode=False,
        inpaint_audio=SourceAudio(CLIP, 1000),
        inpaint_regions_s=((REGION.start * HOP / 1000, REGION.stop * HOP / 1000),),
        **fields,
    )
    run(model, [request], frames=FRAMES)
    return model


CASES = [
    ("tiny-small", "pingpong"),
    ("tiny-1.0", "dpmpp-3m-sde"),
    slow("tiny-small", "rk4"),
    slow("tiny-1.0", "v-ddim"),
    slow("tiny-1.0", "k-heun"),
]


@pytest.mark.server
@pytest.mark.parametrize(("name", "sampler"), CASES)
@pytest.mark.parametrize("starts_from_source", [False, True])
def test_frames_outside_the_region_equal_the_sources(name: str, sampler: str, starts_from_source: bool) -> None:
    start = {"init_audio": SourceAudio(CLIP, 1000), "init_noise_level": 0.6} if starts_from_source else {}
    model = edit(name, sampler, **start)
    kept = torch.ones(FRAMES, dtype=torch.bool)
    kept[REGION] = False
    (made,), source = model.decoded, model.encoded["inpaint"]
    assert torch.equal(made[:, kept], source[:, kept])
    assert (made[:, REGION] != source[:, REGION]).all()


@pytest.mark.server
def test_the_network_sees_the_source_at_the_current_noise_level() -> None:
    """Outside the region, each step's input is (1 - t) * source + t * noise, with the same noise in all steps."""
    model = edit("tiny-small", "euler", cfg_scale=1.0)
    kept = torch.ones(FRAMES, dtype=torch.bool)
    kept[REGION] = False
    noise, source = model.seen[0][:, kept], model.encoded["inpaint"][:, kept]
    times = [evaluation.t for evaluation in model.plan(plain_request())[0].sampler.evaluations]
    assert len(model.seen) == len(times) == 4
    for seen, t in zip(model.seen, times, strict=True):
        torch.testing.assert_close(seen[:, kept], (1 - t) * source + t * noise, rtol=0, atol=1e-5)


def plain_request() -> GenerationRequest:
    return GenerationRequest(prompt="rain", duration_s=1.0, seed=3, steps=4, sampler="euler")
