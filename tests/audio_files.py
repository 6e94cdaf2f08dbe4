"""Audio files for upload tests, generated in memory."""

from __future__ import annotations

import io
import wave

import numpy as np
import soundfile


def pcm_of(wav: bytes) -> bytes:
    """Returns the bytes of the WAV file's `data` chunk, which has the samples."""
    with wave.open(io.BytesIO(wav)) as reader:
        return reader.readframes(reader.getnframes())


def make_audio_file(
    *,
    duration_s: float = 1.0,
    rate_hz: int = 44100,
    channels: int = 2,
    container: str = "WAV",
    subtype: str | None = None,
    hz: float = 440.0,
) -> bytes:
    t = np.arange(int(duration_s * rate_hz)) / rate_hz
    audio = np.tile(0.5 * np.sin(2 * np.pi * hz * t)[:, None], (1, channels))
    stream = io.BytesIO()
    with soundfile.SoundFile(stream, "w", rate_hz, channels, format=container, subtype=subtype) as file:
        for start in range(0, len(audio), 65536):
            file.write(audio[start : start + 65536])
    return stream.getvalue()
