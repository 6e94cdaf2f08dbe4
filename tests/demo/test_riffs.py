"""The packaged riff files equal the output of the demo model's synthesiser. Their names state their key and tempo."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from examples.demo_model.riffs import RATE_HZ, RIFFS, render_riff
from stable_audio_serve.api.compat.stable_audio_open_small.riffs import RiffLibrary, find_folder

ROOTS_HZ = {"gsharp_80bpm_4.wav": 207.65, "f_110bpm_3.wav": 174.61}


def test_the_packaged_riffs_are_the_default(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(str(tmp_path))
    assert {path.name for path in find_folder(None).glob("*.wav")} == set(RIFFS)
    described = RiffLibrary(find_folder(None)).describe()
    assert described["available_keys"] == ["f", "gsharp"]
    assert RiffLibrary(find_folder("elsewhere")).describe()["total_keys"] == 0


@pytest.mark.parametrize("name", RIFFS)
def test_the_packaged_riff_matches_the_synthesiser(name: str) -> None:
    packaged, rate_hz = soundfile.read(find_folder(None) / name, dtype="float32")
    made = render_riff(RIFFS[name])
    assert rate_hz == RATE_HZ
    assert packaged.shape == made.shape
    assert np.abs(packaged - made).max() < 1e-3  # tolerance for 16 bits and for rounding on other machines


@pytest.mark.parametrize("name", RIFFS)
def test_a_riff_begins_in_its_key_at_its_tempo(name: str) -> None:
    audio, rate_hz = soundfile.read(find_folder(None) / name)
    note = audio[: int(0.25 * rate_hz)]
    spectrum = np.abs(np.fft.rfft(note * np.hanning(len(note)), 1 << 17))
    assert np.fft.rfftfreq(1 << 17, 1 / rate_hz)[spectrum.argmax()] == pytest.approx(ROOTS_HZ[name], rel=0.01)
    assert len(audio) / rate_hz == pytest.approx(16 * 60 / RIFFS[name].tempo_bpm, abs=0.01)  # four bars
    # A note begins at each half beat. The first samples of the note are louder than the samples before it.
    step = round(rate_hz * 30 / RIFFS[name].tempo_bpm)
    for onset in range(step, len(audio) - step, step):
        margin = rate_hz // 50
        before, after = audio[onset - 2 * margin : onset - margin], audio[onset + margin : onset + 2 * margin]
        assert (after**2).sum() > (before**2).sum()
