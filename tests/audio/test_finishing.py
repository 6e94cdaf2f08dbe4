"""Loudness, true peak and fades of finished clips, judged by ffmpeg's meter where ffmpeg is installed."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import soxr

from stable_audio_serve.audio.finish import FileOrder, finish_clip
from stable_audio_serve.audio.finish import finish as finish_file
from stable_audio_serve.audio.true_peak import measure_true_peak
from stable_audio_serve.core.generation import DeviceUse, GeneratedSpan, GenerationResult, StageTimings
from stable_audio_serve.core.sound import AudioFormat, Encoding, Finishing, Loudness, Peaks
from tests.parameters import some

RATE_HZ = 44_100
FFMPEG = shutil.which("ffmpeg")
Audio = npt.NDArray[np.float32]


def make_clip(kind: str, *, seconds: float = 3.0, rate_hz: int = RATE_HZ) -> Audio:
    """Returns stereo audio: noise below 16 kHz, a chord with a quiet channel, plucks, or a square tone."""
    rng = np.random.default_rng(1)
    t = np.arange(round(seconds * rate_hz)) / rate_hz
    tones = np.sin(2 * np.pi * t * np.array([[220.0], [277.2], [329.6]])).sum(axis=0)
    sounds = {
        "noise": soxr.resample(rng.normal(0, 0.1, (len(t), 2)), 32_000, rate_hz).T[:, : len(t)],
        "chord": np.array([[0.05], [0.2]]) * tones,
        "plucks": 0.7 * np.exp(-3 * (t % 0.5)) * np.stack([tones, np.roll(tones, 40)]),
        "square": np.tile(0.3 * np.sign(np.sin(2 * np.pi * 997 * t)), (2, 1)),
    }
    return sounds[kind].astype(np.float32)


def finish(audio: Audio, finishing: Finishing, *, rate_hz: int = RATE_HZ) -> Audio:
    return finish_clip(audio, rate_hz, seed=0, peaks="limit", finishing=finishing)[0]


def measure(audio: Audio, rate_hz: int) -> tuple[float, float]:
    """Returns loudness in LUFS and true peak in dBTP, measured by pyloudnorm and by soxr's resampler."""
    import pyloudnorm  # imported here, because its scipy loads slowly in each process that collects this test

    loudness = pyloudnorm.Meter(rate_hz, filter_class="DeMan").integrated_loudness(audio.T.astype(np.float64))
    return loudness, 20 * np.log10(np.abs(soxr.resample(audio.T, rate_hz, 4 * rate_hz)).max())


def measure_by_ffmpeg(audio: Audio, rate_hz: int, folder: Path) -> tuple[float, float]:
    soundfile.write(folder / "clip.wav", audio.T, rate_hz, subtype="FLOAT")
    command = [str(FFMPEG), "-i", str(folder / "clip.wav"), "-af", "ebur128=peak=true", "-f", "null", "-"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr.rpartition("Summary")[2]
    loudness, peak = re.search(r"I: +(\S+) LUFS", report), re.search(r"Peak: +(\S+) dBFS", report)
    assert loudness is not None
    assert peak is not None
    return float(loudness[1]), float(peak[1])


CASES = [
    ("noise", -40.0, -9.0, 48_000),
    ("noise", -14.0, -1.0, 44_100),
    ("chord", -10.0, -1.0, 48_000),
    ("chord", -23.0, -2.0, 44_100),
    ("plucks", -14.0, -1.0, 44_100),
    ("plucks", -16.0, -3.0, 44_100),
    ("square", -5.0, 0.0, 44_100),
    ("square", -70.0, -1.0, 44_100),
]


@pytest.mark.parametrize(("kind", "target_lufs", "true_peak_dbtp", "rate_hz"), some(CASES, [*CASES[::2], CASES[-1]]))
def test_loudness_and_true_peak_are_reached(kind: str, target_lufs: float, true_peak_dbtp: float, rate_hz: int) -> None:
    wanted = Finishing(Loudness(target_lufs, true_peak_dbtp))
    audio, facts = finish_clip(make_clip(kind, rate_hz=rate_hz), rate_hz, seed=0, peaks="limit", finishing=wanted)
    loudness, peak = measure(audio, rate_hz)
    assert facts.true_peak_dbtp == pytest.approx(peak, abs=0.3)
    assert peak <= true_peak_dbtp + 0.3
    if target_lufs > -70:
        assert loudness == pytest.approx(target_lufs, abs=0.2)
        assert facts.loudness_lufs == pytest.approx(loudness, abs=0.1)


@pytest.mark.parametrize(
    ("file_format", "rate_hz"), [(AudioFormat.WAV, 8000), (AudioFormat.WAV, 22_050), (AudioFormat.ULAW, 8000)]
)
def test_loudness_is_that_of_the_file(file_format: AudioFormat, rate_hz: int) -> None:
    finishing = Finishing(Loudness(-20.0, -3.0))
    order = FileOrder("limit", encoding=Encoding(file_format, sample_rate_hz=rate_hz), finishing=finishing)
    result = GenerationResult((2 * make_clip("noise"),), RATE_HZ, "any", (0,), StageTimings(), DeviceUse())
    finished = finish_file(result, order)
    raw = {"samplerate": rate_hz, "channels": 1, "subtype": "ULAW", "format": "RAW"}
    options = raw if file_format is AudioFormat.ULAW else {}
    samples, _ = soundfile.read(io.BytesIO(finished.file.to_bytes()), always_2d=True, **options)
    loudness, peak = measure(samples.T.astype(np.float32), rate_hz)
    assert loudness == pytest.approx(-20.0, abs=0.2)
    assert peak <= -2.7
    assert finished.clips[0].loudness_lufs == pytest.approx(loudness, abs=0.1)


@pytest.mark.parametrize(("peaks", "most"), [("limit", 0.977), ("scale", 1.0)])
def test_peaks_are_treated_at_the_sample_rate_of_the_file(peaks: Peaks, most: float) -> None:
    order = FileOrder(peaks, encoding=Encoding(bit_depth="float", sample_rate_hz=48_000))
    clip = 4 * make_clip("square", seconds=0.2)
    finished = finish_file(GenerationResult((clip,), RATE_HZ, "any", (0,), StageTimings(), DeviceUse()), order)
    samples, _ = soundfile.read(io.BytesIO(finished.file.to_bytes()), always_2d=True)
    assert np.abs(samples).max() == pytest.approx(finished.clips[0].peak) == pytest.approx(most)
    assert (np.abs(samples[:, 0]) == 1.0).sum() <= 1  # no clipping


@pytest.mark.skipif(FFMPEG is None, reason="ffmpeg is not installed")
@pytest.mark.parametrize(("kind", "target_lufs", "true_peak_dbtp", "rate_hz"), some(CASES[:7], CASES[3:6]))
def test_ffmpeg_measures_the_same(
    tmp_path: Path, kind: str, target_lufs: float, true_peak_dbtp: float, rate_hz: int
) -> None:
    wanted = Finishing(Loudness(target_lufs, true_peak_dbtp))
    audio, facts = finish_clip(make_clip(kind, rate_hz=rate_hz), rate_hz, seed=0, peaks="limit", finishing=wanted)
    loudness, peak = measure_by_ffmpeg(audio, rate_hz, tmp_path)
    assert loudness == pytest.approx(target_lufs, abs=0.2)
    assert peak == pytest.approx(facts.true_peak_dbtp, abs=0.3)
    assert peak <= true_peak_dbtp + 0.3


@pytest.mark.parametrize("rate_hz", [44_100, 48_000])
def test_true_peak_between_samples_is_found(rate_hz: int) -> None:
    t = np.arange(rate_hz) / rate_hz
    tone = np.sin(2 * np.pi * rate_hz / 4 * t + np.pi / 4)[None].astype(np.float32)
    middle = np.hanning(rate_hz).astype(np.float32)
    assert np.abs(tone * middle).max() == pytest.approx(np.sqrt(0.5), abs=0.001)
    assert measure_true_peak(tone * middle) == pytest.approx(1.0, abs=0.005)


def test_a_target_that_peaks_do_not_allow_is_reported() -> None:
    audio = np.zeros((2, 3 * RATE_HZ), np.float32)
    audio[:, ::RATE_HZ] = 0.5
    finished, facts = finish_clip(audio, RATE_HZ, seed=0, peaks="limit", finishing=Finishing(Loudness(-10.0, -1.0)))
    loudness, peak = measure(finished, RATE_HZ)
    assert loudness < -15
    assert facts.loudness_lufs == pytest.approx(loudness, abs=0.1)
    assert peak <= -0.7


@pytest.mark.parametrize("level", [0.0, 1e-5])
def test_silent_clips_stay_silent(level: float) -> None:
    audio = level * make_clip("noise")
    np.testing.assert_array_equal(finish(audio, Finishing(Loudness(-14.0))), audio)


@pytest.mark.parametrize("peaks", ["limit", "scale", "clip"])
def test_every_treatment_of_peaks_reaches_the_loudness(peaks: str) -> None:
    audio = 4 * make_clip("chord")
    wanted = Finishing(Loudness(-18.0))
    finished, _ = finish_clip(audio, RATE_HZ, seed=0, peaks=peaks, finishing=wanted)  # type: ignore[arg-type]
    assert measure(finished, RATE_HZ)[0] == pytest.approx(-18.0, abs=0.2)


def test_loudness_changes_the_samples_of_a_source_too() -> None:
    audio, empty = make_clip("chord"), np.zeros((2, 0), np.float32)
    span = GeneratedSpan(RATE_HZ, 2 * RATE_HZ, empty, empty)
    finished, _ = finish_clip(
        audio, RATE_HZ, seed=0, peaks="limit", finishing=Finishing(Loudness(-30.0)), generated=[span]
    )
    gains = finished[:, RATE_HZ // 2 :: 1000] / audio[:, RATE_HZ // 2 :: 1000]
    np.testing.assert_allclose(gains, gains[0, 0], rtol=1e-3)


@pytest.mark.parametrize(("fade_in_s", "fade_out_s"), [(0.5, 0.0), (0.0, 1.0), (1.0, 2.0), (3.0, 0.0), (1.5, 1.5)])
def test_fades_are_linear(fade_in_s: float, fade_out_s: float) -> None:
    audio = np.full((2, 3 * RATE_HZ), 0.5, np.float32)
    finished = finish(audio, Finishing(None, fade_in_s, fade_out_s))
    t = (np.arange(3 * RATE_HZ) + 0.5) / RATE_HZ
    rise = np.minimum(t / fade_in_s, 1) if fade_in_s else 1
    fall = np.minimum((3 - t) / fade_out_s, 1) if fade_out_s else 1
    np.testing.assert_allclose(finished, np.tile(0.5 * rise * fall, (2, 1)), atol=1e-5)
