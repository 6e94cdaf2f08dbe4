"""Make requests and source clips with lengths and sample rates that fit the small reference checkpoints."""

from __future__ import annotations

from typing import Any

import numpy as np

from stable_audio_serve.core.generation import GenerationRequest, SourceAudio


def make_request(**fields: Any) -> GenerationRequest:
    return GenerationRequest(**{"prompt": "dog barking", "duration_s": 2.337, "seed": 7, **fields})


def make_clip(*, seconds: float = 1.0, rate: int = 1000, channels: int = 2) -> SourceAudio:
    samples = np.random.default_rng(0).uniform(-1, 1, (channels, int(seconds * rate)))
    return SourceAudio(samples.astype(np.float32), rate)
