"""Write and read the lossless files of a long piece's sections.

The files are WAV files with 32-bit floats, from which the exact samples can be read. This module does not use
libsndfile, so that it can decode a file while the file arrives from its store.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stable_audio_serve.audio.encode import EncodedFile, encode_wav

if TYPE_CHECKING:
    import numpy.typing as npt

_HEADER_BYTES = 58
_SAMPLE_BYTES = 4


def encode_section(audio: npt.NDArray[np.float32], sample_rate_hz: int) -> EncodedFile:
    """Return a WAV file with the samples `audio` (C, S) float32."""
    return encode_wav(np.ascontiguousarray(audio.T), sample_rate_hz)


class SectionDecoder:
    """Decodes a file that `encode_section` wrote. The file may arrive in chunks of any size.

    Nothing is read from the header, because a damaged file is only detected at its end.
    """

    def __init__(self, *, num_bytes: int, num_samples: int) -> None:
        """Takes the size of the file and the number of its samples."""
        self._rest = b""
        self._channels = (num_bytes - _HEADER_BYTES) // (_SAMPLE_BYTES * num_samples)
        self._header_left = _HEADER_BYTES

    def decode(self, chunk: bytes) -> npt.NDArray[np.float32]:
        """Return the samples (C, S) float32 that `chunk` completes."""
        data = self._rest + chunk[self._header_left :]
        self._header_left = max(self._header_left - len(chunk), 0)
        num_whole = len(data) - len(data) % (_SAMPLE_BYTES * self._channels)
        self._rest = data[num_whole:]
        samples = np.frombuffer(data, "<f4", num_whole // _SAMPLE_BYTES).reshape(-1, self._channels)
        return np.ascontiguousarray(samples.T, np.float32)
