"""Audio that is finished block by block is compared with the same audio finished as a whole."""

from __future__ import annotations

import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest

from stable_audio_serve.audio.finish import finish_clip
from stable_audio_serve.audio.loudness import ClipMeter
from stable_audio_serve.audio.stream_level import LoudnessSearch, PieceFinisher, TruePeakMeter
from stable_audio_serve.audio.true_peak import measure_true_peak
from stable_audio_serve.core.sound import Finishing, Loudness, Peaks
from tests.parameters import slow

RATE_HZ = 44100
BLOCK = 33_331


def make_audio(duration_s: float = 8.0) -> npt.NDArray[np.float32]:
    """Return noise with some loud samples. The noise and the loud samples become louder with time."""
    rng = np.random.default_rng(3)
    audio = 0.05 * rng.standard_normal((2, int(duration_s * RATE_HZ)))
    audio *= np.linspace(0.5, 1.5, audio.shape[1])
    audio[:, ::9_973] *= 8
    return audio.astype(np.float32)


def blocks_of(audio: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
    return [audio[:, start : start + BLOCK] for start in range(0, audio.shape[1], BLOCK)]


def test_long_fades_take_little_memory() -> None:
    finishing, block = Finishing(fade_in_s=600.0, fade_out_s=600.0), np.ones((2, RATE_HZ), np.float32)
    finisher = PieceFinisher(RATE_HZ, finishing=finishing, num_samples=1200 * RATE_HZ, search=None)
    tracemalloc.start()
    finisher.add(block)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 10 * block.nbytes


@pytest.mark.parametrize(
    "finishing",
    [
        Finishing(Loudness(-14.0)),
        Finishing(Loudness(-30.0, -3.0), fade_in_s=1.5, fade_out_s=2.0),
        Finishing(fade_in_s=0.5, fade_out_s=7.0),
        Finishing(fade_in_s=16.0),
    ],
)
def test_blocks_are_finished_like_the_whole(finishing: Finishing) -> None:
    audio = make_audio() * np.float32(1.0 if finishing.loudness else 0.2)
    search = None
    if finishing.loudness is not None:
        search = LoudnessSearch(RATE_HZ, loudness=finishing.loudness)
        while search.needs_pass:
            for block in blocks_of(audio):
                search.add(block)
            search.end_pass()
    finisher = PieceFinisher(RATE_HZ, finishing=finishing, num_samples=audio.shape[1], search=search)
    parts = [finisher.add(block) for block in blocks_of(audio)]
    if (rest := finisher.end()) is not None:
        parts.append(rest)
    found = np.concatenate(parts, axis=1)
    # Without a target loudness there is no limiter, because the sections of a piece have been limited before.
    peaks: Peaks = "limit" if finishing.loudness else "clip"
    expected, facts = finish_clip(audio, RATE_HZ, seed=1, peaks=peaks, finishing=finishing)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 0.01
    meter = ClipMeter(RATE_HZ)
    meter.add(found)
    assert meter.describe(seed=1).loudness_lufs == pytest.approx(facts.loudness_lufs, abs=0.1)
    if finishing.loudness is not None:
        assert finisher.true_peak_dbtp is not None
        assert finisher.true_peak_dbtp <= finishing.loudness.true_peak_dbtp + 0.05


@pytest.mark.parametrize("target_lufs", [-12.0, slow(-14.0), -16.0])
def test_drums_reach_the_loudness_whole_and_in_blocks(target_lufs: float) -> None:
    """A limiter lowers drums so much that the gain must rise by far more than the loudness that is missing."""
    rng, loudness = np.random.default_rng(1), Loudness(target_lufs)
    beat = np.exp(-np.arange(RATE_HZ * 2 // 5) / (0.05 * RATE_HZ)) + 0.05
    audio = (np.tile(beat, 20) * rng.standard_normal((2, 20 * len(beat)))).astype(np.float32)
    _, facts = finish_clip(audio, RATE_HZ, seed=1, peaks="limit", finishing=Finishing(loudness))
    search = LoudnessSearch(RATE_HZ, loudness=loudness)
    while search.needs_pass:
        for block in blocks_of(audio):
            search.add(block)
        search.end_pass()
    finisher = PieceFinisher(RATE_HZ, finishing=Finishing(loudness), num_samples=audio.shape[1], search=search)
    meter = ClipMeter(RATE_HZ)
    for part in (*map(finisher.add, blocks_of(audio)), finisher.end()):
        assert part is not None
        meter.add(part)
    found = (facts.loudness_lufs, meter.describe(seed=1).loudness_lufs)
    assert found == pytest.approx((target_lufs, target_lufs), abs=0.1)


def test_silence_has_no_gain() -> None:
    search = LoudnessSearch(RATE_HZ, loudness=Loudness(-14.0))
    search.add(np.zeros((2, RATE_HZ), np.float32))
    search.end_pass()
    assert (search.needs_pass, search.gain_db) == (False, None)


def test_true_peak_in_blocks_is_that_of_the_whole() -> None:
    audio = make_audio(3.0)
    meter = TruePeakMeter()
    for block in blocks_of(audio):
        meter.add(block)
    assert meter.finish() == pytest.approx(measure_true_peak(audio), rel=1e-6)
