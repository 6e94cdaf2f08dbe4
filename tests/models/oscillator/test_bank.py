from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch

from examples.demo_model.captions import nearest_oscillator
from stable_audio_serve.models.oscillator.bank import (
    A4_INDEX,
    FRAME_SAMPLES,
    NUM_CHANNELS,
    NUM_OSCILLATORS,
    OSCILLATOR_HZ,
    SAMPLE_RATE_HZ,
    OscillatorBank,
    compress,
    expand,
)
from tests.models.oscillator.frames import make_frames, render
from tests.models.oscillator.plain_bank import render_plainly
from tests.parameters import some


def test_compress_and_expand_are_inverse() -> None:
    amplitude = torch.tensor([0.0, 0.001, 0.3, 1.0])
    torch.testing.assert_close(expand(compress(amplitude)), amplitude)
    assert compress(torch.tensor(1.0)) == pytest.approx(1.0)


@pytest.mark.parametrize("index", [10, 33, 58, A4_INDEX, 127, 150])
def test_an_oscillator_sounds_at_its_frequency_and_level(index: int) -> None:
    audio = render(make_frames(96, tones={index: 0.25}))[0].numpy()[4096:]
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio)))) * 4 / len(audio)
    assert abs(spectrum.argmax() * SAMPLE_RATE_HZ / len(audio) - OSCILLATOR_HZ[index]) < 1.2
    assert spectrum.max() == pytest.approx(0.25, rel=0.16)  # between two bins, a Hann window loses up to 1.4 dB (16 %)


def test_every_frequency_is_within_25_cents_of_an_oscillator() -> None:
    for hertz in range(80, 2001):
        cents = 1200 * math.log2(OSCILLATOR_HZ[nearest_oscillator(hertz)] / hertz)
        assert abs(cents) <= 25.01


def test_an_onset_is_sharp_and_silent_before_its_frame() -> None:
    frames = make_frames(32, tones={A4_INDEX: 0.5})
    frames[:, :16] = 0
    audio = render(frames)[0]
    onset = 16 * FRAME_SAMPLES
    assert audio[: onset - 1].abs().max() == 0
    assert audio[onset + FRAME_SAMPLES // 4 : onset + FRAME_SAMPLES].abs().max() > 0.45


def test_noise_bands_have_the_requested_level() -> None:
    noise = torch.randn(2, 200 * FRAME_SAMPLES, generator=torch.Generator().manual_seed(1))
    audio = render(make_frames(200, bands=0.05), noise=noise)[:, 2048:]
    assert audio.square().mean().sqrt() == pytest.approx(0.05 * math.sqrt(20), rel=0.05)


def test_balance_silences_one_side() -> None:
    frames = make_frames(40, tones={60: 0.3})
    frames[-2] = -1.0
    left, right = render(frames).square().mean(dim=1)
    assert left > 1e6 * right


def test_a_window_renders_the_same_samples_as_the_whole_clip() -> None:
    generator = torch.Generator().manual_seed(0)
    frames = (torch.rand(NUM_CHANNELS, 120, generator=generator) - 0.4).clamp(min=0)
    noise = torch.randn(2, 120 * FRAME_SAMPLES, generator=generator)
    whole = render(frames, noise=noise)
    first, last = 40, 90
    inside = slice(first * FRAME_SAMPLES, last * FRAME_SAMPLES)
    window = render(frames[:, first:last], start=first, noise=noise[:, inside])
    halo = OscillatorBank.halo_frames * FRAME_SAMPLES
    torch.testing.assert_close(window[:, halo:-halo], whole[:, inside][:, halo:-halo], atol=1e-5, rtol=0)


SIZES, SHARES = (1, 2, 7, 36, 130, 431), (0.0, 0.02, 0.3, 1.0)


@pytest.mark.parametrize(
    ("num_frames", "sounding_share"),
    some(
        product(SIZES, SHARES),
        [(size, share) for i, size in enumerate(SIZES) for j, share in enumerate(SHARES) if (i + j) % 2 == 0],
    ),
)
@torch.inference_mode()
def test_rendering_equals_the_plain_formulas(num_frames: int, sounding_share: float) -> None:
    generator = torch.Generator().manual_seed(num_frames)
    levels = torch.rand(NUM_CHANNELS, num_frames, generator=generator) - 0.3
    sounding = torch.rand(NUM_OSCILLATORS, 1, generator=generator) < sounding_share
    frames = levels.clone()
    frames[:NUM_OSCILLATORS] = torch.where(sounding, levels[:NUM_OSCILLATORS], -1.0)  # negative levels are silent
    # The last two channels are the balances. Some values are outside the allowed -1..1.
    frames[-2:] = 3.0 * torch.rand(2, num_frames, generator=generator) - 1.5
    noise = torch.randn(2, num_frames * FRAME_SAMPLES, generator=generator)
    within = 1e-6 if sounding_share else 0.0  # noise must be identical; tones are summed in another order
    for first in (0, num_frames // 3):  # the whole clip, and a part of the clip
        last = num_frames - first // 2
        window, drawn = frames[:, first:last], noise[:, first * FRAME_SAMPLES : last * FRAME_SAMPLES]
        start = 5000 + first
        made, expected = render(window, start=start, noise=drawn), render_plainly(window, drawn, start=start)
        torch.testing.assert_close(made, expected, atol=within * float(expected.abs().max()), rtol=0)
