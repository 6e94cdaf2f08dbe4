from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.oscillator.analysis import analyse
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
    nearest_oscillator,
)
from stable_audio_serve.models.parts import WindowNoise
from stable_audio_serve.models.sa3.autoencoder import AudioAutoencoder
from stable_audio_serve.sampling.noise import SeededNoise


def make_frames(num_frames: int, *, tones: dict[int, float] | None = None, bands: float = 0.0) -> torch.Tensor:
    frames = torch.zeros(NUM_CHANNELS, num_frames)
    for index, amplitude in (tones or {}).items():
        frames[index] = compress(torch.tensor(amplitude))
    frames[NUM_OSCILLATORS:-2] = compress(torch.tensor(bands))
    return frames


def render(frames: torch.Tensor, *, start: int = 0, noise: torch.Tensor | None = None) -> torch.Tensor:
    raw = torch.zeros(2, frames.shape[1] * FRAME_SAMPLES) if noise is None else noise
    return OscillatorBank().render(frames, raw, start_frame=start)


def make_autoencoder() -> AudioAutoencoder:
    torch.manual_seed(3)
    sizes = {"patch_frames": 8, "width": 16, "depth": 1, "latent_dim": 4}
    return AudioAutoencoder(
        ConfigReader(
            {
                "encoder": {"type": "patch_mlp", "config": {"in_channels": NUM_CHANNELS, **sizes}},
                "decoder": {"type": "patch_mlp", "config": {"out_channels": NUM_CHANNELS, **sizes}},
                "bottleneck": {"type": "softnorm", "config": {"dim": 4}},
                "pretransform": {"type": "oscillator_bank", "config": {"frames_per_latent": 8}},
                "latent_dim": 4,
                "downsampling_ratio": 8 * FRAME_SAMPLES,
            }
        )
    ).requires_grad_(False)


def test_compress_and_expand_are_inverse() -> None:
    amplitude = torch.tensor([0.0, 0.001, 0.3, 1.0])
    torch.testing.assert_close(expand(compress(amplitude)), amplitude)
    assert compress(torch.tensor(1.0)) == pytest.approx(1.0)


@pytest.mark.parametrize("index", [10, 33, 58, A4_INDEX, 127, 150])
def test_an_oscillator_sounds_at_its_frequency_and_level(index: int) -> None:
    audio = render(make_frames(96, tones={index: 0.25}))[0].numpy()[4096:]
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio)))) * 4 / len(audio)
    assert abs(spectrum.argmax() * SAMPLE_RATE_HZ / len(audio) - OSCILLATOR_HZ[index]) < 1.2
    assert spectrum.max() == pytest.approx(0.25, rel=0.16)  # a Hann window loses up to 1.4 dB between bins


def test_every_frequency_is_within_a_quarter_of_a_semitone_of_an_oscillator() -> None:
    for hertz in range(80, 2001):
        cents = 1200 * math.log2(OSCILLATOR_HZ[nearest_oscillator(hertz)] / hertz)
        assert abs(cents) <= 25.01


def test_an_onset_is_sharp_and_does_not_sound_before_its_frame() -> None:
    frames = make_frames(32, tones={A4_INDEX: 0.5})
    frames[:, :16] = 0
    audio = render(frames)[0]
    onset = 16 * FRAME_SAMPLES
    assert audio[: onset - 1].abs().max() == 0
    assert audio[onset + FRAME_SAMPLES // 4 : onset + FRAME_SAMPLES].abs().max() > 0.45


def test_noise_bands_have_the_level_they_ask_for() -> None:
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


def test_decoding_in_windows_equals_decoding_at_once() -> None:
    autoencoder = make_autoencoder()
    halo, hop = autoencoder.decoder_halo_latents, autoencoder.hop
    latents = torch.randn(1, 4, 50, generator=torch.Generator().manual_seed(2))
    noise = SeededNoise(7)
    whole = autoencoder.decode(latents, [WindowNoise(noise, "decode", 0)])
    for start, stop in ((0, 21), (17, 40), (33, 50)):
        part = autoencoder.decode(latents[..., start:stop], [WindowNoise(noise, "decode", start)])
        first = 0 if start == 0 else halo * hop
        last = part.shape[-1] - (0 if stop == 50 else halo * hop)
        expected = whole[..., start * hop + first : start * hop + last]
        torch.testing.assert_close(part[..., first:last], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tones", [{A4_INDEX: 0.3}, {24: 0.4}, {64: 0.2, 72: 0.2, 78: 0.2}, {140: 0.1}])
def test_analysis_finds_the_tones_that_were_rendered(tones: dict[int, float]) -> None:
    found = analyse(render(make_frames(64, tones=tones)))[:NUM_OSCILLATORS, 8:56].mean(dim=1)
    assert set(found.topk(len(tones)).indices.tolist()) == set(tones)
    for index, amplitude in tones.items():
        assert expand(found[index]) == pytest.approx(amplitude, rel=0.15)


def test_analysis_keeps_the_level_of_noise_and_finds_no_tones_in_it() -> None:
    noise = torch.randn(2, 64 * FRAME_SAMPLES, generator=torch.Generator().manual_seed(1))
    found = analyse(0.1 * noise)[:, 8:56]
    bands = expand(found[NUM_OSCILLATORS:-2])
    assert bands.square().sum(dim=0).mean().sqrt() == pytest.approx(0.1, rel=0.15)
    assert expand(found[:NUM_OSCILLATORS]).square().sum(dim=0).mean() < 0.05 * bands.square().sum(dim=0).mean()


def test_analysis_of_silence_is_silence() -> None:
    assert analyse(torch.zeros(2, 20000)).abs().max() == 0
