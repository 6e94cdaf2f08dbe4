"""Write and read the lossless files of a long piece's sections.

The files are WAV files with 32-bit floats, from which the exact samples can be read. This module does not use
libsndfile, so that it can decode a file while the file arrives from its store.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np

from stable_audio_serve.audio.encode import EncodedFile, encode_wav

if TYPE_CHECKING:
    import numpy.typing as npt

_HEADER_BYTES = 58
_CHANNELS_AT = 22  # byte offset in the header
_SAMPLE_BYTES = 4


def encode_section(audio: npt.NDArray[np.float32], sample_rate_hz: int) -> EncodedFile:
    """Return a WAV file with the samples `audio` (C, S) float32."""
    return encode_wav(np.ascontiguousarray(audio.T), sample_rate_hz)


class SectionDecoder:
    """Decodes a file that `encode_section` wrote. The file may arrive in chunks of any size."""

    def __init__(self) -> None:
        self._rest = b""
        self._channels = 0

    def decode(self, chunk: bytes) -> npt.NDArray[np.float32]:
        """Return the samples (C, S) float32 that `chunk` completes."""
        data = self._rest + chunk
        if not self._channels:
            if len(data) < _HEADER_BYTES:
                self._rest = data
                return np.empty((1, 0), np.float32)
            (self._channels,) = struct.unpack_from("<H", data, _CHANNELS_AT)
            data = data[_HEADER_BYTES:]
        num_whole = len(data) - len(data) % (_SAMPLE_BYTES * self._channels)
        self._rest = data[num_whole:]
        samples = np.frombuffer(data, "<f4", num_whole // _SAMPLE_BYTES).reshape(-1, self._channels)
        return np.ascontiguousarray(samples.T, np.float32)
