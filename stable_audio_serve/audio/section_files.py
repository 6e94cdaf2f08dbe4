"""The lossless files of finished sections: WAV files with 32-bit floats, which read back exactly as they were written.

They are written and read without libsndfile, so that they can be read while they arrive from their store.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np

from stable_audio_serve.audio.encode import AudioFormat, EncodedFile
from stable_audio_serve.audio.keep import FADE_S

if TYPE_CHECKING:
    import numpy.typing as npt

_FLOATS = 3  # WAVE_FORMAT_IEEE_FLOAT
_HEADER = struct.Struct("<4sI4s4sIHHIIHHH4sII4sI")
_CHANNELS_AT = 22  # byte offset in the header
_SAMPLE_BYTES = 4


def join_samples(sample_rate_hz: int) -> int:
    """Return the length of the crossfade between two sections, in samples."""
    return round(FADE_S * sample_rate_hz)


def encode_section(audio: npt.NDArray[np.float32], sample_rate_hz: int) -> EncodedFile:
    """Return a WAV file with the samples `audio` (C, S) float32."""
    channels, num_samples = audio.shape
    samples = np.ascontiguousarray(audio.T, "<f4")
    frame_bytes = _SAMPLE_BYTES * channels
    rates = (sample_rate_hz, sample_rate_hz * frame_bytes)
    layout = (b"fmt ", 18, _FLOATS, channels, *rates, frame_bytes, 8 * _SAMPLE_BYTES, 0)
    fact = (b"fact", 4, num_samples)
    riff = (b"RIFF", _HEADER.size - 8 + samples.nbytes, b"WAVE")
    header = _HEADER.pack(*riff, *layout, *fact, b"data", samples.nbytes)
    return EncodedFile(AudioFormat.WAV.media_type, (header, samples.reshape(-1).view(np.uint8).data))


class SectionDecoder:
    """Decodes a file of `encode_section` that arrives in chunks of any size."""

    def __init__(self) -> None:
        self._rest = b""
        self._channels = 0

    def decode(self, chunk: bytes) -> npt.NDArray[np.float32]:
        """Return the samples (C, S) float32 that `chunk` completes."""
        data = self._rest + chunk
        if not self._channels:
            if len(data) < _HEADER.size:
                self._rest = data
                return np.empty((1, 0), np.float32)
            (self._channels,) = struct.unpack_from("<H", data, _CHANNELS_AT)
            data = data[_HEADER.size :]
        num_whole = len(data) - len(data) % (_SAMPLE_BYTES * self._channels)
        self._rest = data[num_whole:]
        samples = np.frombuffer(data, "<f4", num_whole // _SAMPLE_BYTES).reshape(-1, self._channels)
        return np.ascontiguousarray(samples.T, np.float32)
