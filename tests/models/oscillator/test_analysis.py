from __future__ import annotations

import pytest
import torch

from stable_audio_serve.models.oscillator.analysis import analyse
from stable_audio_serve.models.oscillator.bank import A4_INDEX, FRAME_SAMPLES, NUM_OSCILLATORS, expand
from tests.models.oscillator.frames import make_frames, render


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
