"""The golden requests of a model: few, short, with fixed seeds.

Increment VERSION after any change here. It is part of a report's id, because only reports of equal requests can be
compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.generation import GenerationRequest, SourceAudio

VERSION = 1

_DURATION_S = 1.5
_STEPS = 4  # few, because each step uses every weight, and the quality of the audio does not matter
_NOISE_SHARE = 0.6


def golden_requests(card: ModelCard) -> Mapping[str, GenerationRequest]:
    """Return the requests by name: two with text only, and one with source audio."""
    music = GenerationRequest(
        "warm analogue synth arpeggio, 120 BPM, C major",
        seed=20_240_601,
        duration_s=min(_DURATION_S, card.max_duration_s),
        steps=min(_STEPS, card.default_steps),
        cfg_scale=card.default_cfg_scale,
        duration_padding_s=0.0,
    )
    edit = replace(
        music,
        prompt="a marimba melody",
        seed=4_294_967_311,
        init_audio=_source(card),
        init_noise_level=card.noise_level(_NOISE_SHARE, sampler=None),
        edit_schedule=None if card.objective == "v" else "scaled",
    )
    return {
        "music": music,
        "effect": replace(music, prompt="heavy rain on a tin roof, distant thunder", seed=7),
        "edit": edit,
    }


def _source(card: ModelCard) -> SourceAudio:
    """Return one second of decaying harmonics, different in each channel."""
    times = np.arange(card.sample_rate_hz) / card.sample_rate_hz
    tones = [np.sin(2 * np.pi * hertz * times) for hertz in (55.0, 110.0, 165.0, 220.0)]
    rolled = (np.roll(tones, shift, axis=0) for shift in range(card.channels))
    channels = [sum(tone / k for k, tone in enumerate(own, start=1)) for own in rolled]
    samples = 0.3 * np.exp(-3.0 * times) * np.stack(channels)
    return SourceAudio(samples.astype(np.float32), card.sample_rate_hz)
