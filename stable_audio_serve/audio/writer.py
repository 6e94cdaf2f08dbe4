"""Encode audio that arrives in blocks, so that a long piece is never in memory as a whole.

The files are the same as those of `audio.encode`, except that resampled audio may differ in its last bits. The methods
need much CPU time: call them from worker threads, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from stable_audio_serve.audio.embedded_text import make_wav_chunk
from stable_audio_serve.audio.encode import (
    BLOCK,
    CONTAINERS,
    OPUS_TAIL,
    AudioFormat,
    container_rate,
    rewrite_ogg,
    to_pcm16,
    wav_header,
)

if TYPE_CHECKING:
    import numpy.typing as npt

_LEVEL = 0.445  # libsndfile's compression level of MP3 with 192 kbit/s


class AudioWriter:
    """Writes one audio file block by block."""

    def __init__(
        self,
        file: Writable,
        *,
        file_format: AudioFormat,
        sample_rate_hz: int,
        num_samples: int | None = None,
        text: str | None = None,
    ) -> None:
        """Write to `file`, which must be empty and seekable. It stays open.

        `num_samples` is the length of the audio. If it is None, the header of a WAV file says that the length is
        unknown, and MP3 files have a constant bit rate. `text` is embedded in the file, see `encode_audio`.
        """
        self._open: Callable[[int], _Encoder] = lambda channels: (
            _WavEncoder(file, sample_rate_hz, channels=channels, num_samples=num_samples, text=text)
            if file_format is AudioFormat.WAV
            else _SoundFileEncoder(
                file, sample_rate_hz, channels=channels, file_format=file_format, num_samples=num_samples, text=text
            )
        )
        self._encoder: _Encoder | None = None

    def write(self, block: npt.NDArray[np.float32]) -> None:
        """Encode the next samples (C, S) float32 in -1..1. Raises OSError, RuntimeError if the file has no room."""
        if self._encoder is None:
            self._encoder = self._open(len(block))
        self._encoder.write(block)

    def close(self) -> None:
        """Complete the file. Further calls do nothing. Raises the same errors as `write`."""
        encoder, self._encoder = self._encoder, None
        if encoder is not None:
            encoder.close()


class Writable(Protocol):
    """A file object that libsndfile can write to."""

    def write(self, data: bytes, /) -> int: ...
    def read(self, num_bytes: int = -1, /) -> bytes: ...
    def seek(self, offset: int, whence: int = 0, /) -> int: ...
    def tell(self) -> int: ...


class _Encoder(Protocol):
    def write(self, block: npt.NDArray[np.float32]) -> None: ...
    def close(self) -> None: ...


class _WavEncoder:
    def __init__(
        self, file: Writable, sample_rate_hz: int, *, channels: int, num_samples: int | None, text: str | None
    ) -> None:
        self._file = file
        self._end = b"" if text is None else make_wav_chunk(text)
        num_bytes = None if num_samples is None else 2 * channels * num_samples
        file.write(wav_header(sample_rate_hz, channels=channels, num_bytes=num_bytes, num_more=len(self._end)))

    def write(self, block: npt.NDArray[np.float32]) -> None:
        self._file.write(to_pcm16(block).astype("<i2", copy=False).tobytes())

    def close(self) -> None:
        self._file.write(self._end)


class _SoundFileEncoder:
    def __init__(
        self,
        file: Writable,
        sample_rate_hz: int,
        *,
        channels: int,
        file_format: AudioFormat,
        num_samples: int | None,
        text: str | None,
    ) -> None:
        import soundfile

        self._file, self._format, self._channels = file, file_format, channels
        container, subtype = CONTAINERS[file_format]
        rate_hz = container_rate(sample_rate_hz, file_format)
        self._resampler: Any = None
        if rate_hz != sample_rate_hz:
            import soxr

            self._resampler = soxr.ResampleStream(sample_rate_hz, rate_hz, channels, dtype="float32")
        # Players estimate the length of a growing MP3 file from its bit rate, so that must be constant.
        is_growing = file_format is AudioFormat.MP3 and num_samples is None
        options: dict[str, Any] = {"bitrate_mode": "CONSTANT", "compression_level": _LEVEL} if is_growing else {}
        self._sound = soundfile.SoundFile(file, "w", rate_hz, channels, format=container, subtype=subtype, **options)
        if text is not None:
            self._sound.comment = text

    def write(self, block: npt.NDArray[np.float32]) -> None:
        if self._format is AudioFormat.FLAC:
            self._put(to_pcm16(block))
        elif self._resampler is None:
            self._put(np.clip(block.T, -1.0, 1.0))
        else:
            self._put(np.clip(self._resampler.resample_chunk(np.ascontiguousarray(block.T)), -1.0, 1.0))

    def close(self) -> None:
        if self._resampler is not None:
            rest = np.empty((0, self._channels), np.float32)
            self._put(np.clip(self._resampler.resample_chunk(rest, last=True), -1.0, 1.0))
        is_opus = self._format is AudioFormat.OPUS
        if is_opus:
            self._put(np.zeros((OPUS_TAIL, self._channels), np.float32))
        self._sound.close()
        if self._format in (AudioFormat.OGG, AudioFormat.OPUS):
            rewrite_ogg(self._file, trim_samples=OPUS_TAIL if is_opus else 0)

    def _put(self, samples: npt.NDArray[Any]) -> None:
        for start in range(0, len(samples), BLOCK):
            self._sound.write(samples[start : start + BLOCK])


class StreamFile:
    """A file object whose content is sent while it is written. Changes of what was already taken are lost.

    libsndfile changes the beginning of an MP3 file once at the end, to store the length, which players can do without.
    """

    def __init__(self) -> None:
        self._pending = bytearray()
        self._end = self._position = 0

    def take(self) -> bytes:
        """Return the bytes that were written since the last call."""
        taken = bytes(self._pending)
        self._pending.clear()
        return taken

    def write(self, data: bytes, /) -> int:
        num_known = min(max(self._end - self._position, 0), len(data))
        self._pending += data[num_known:]
        self._position += len(data)
        self._end = max(self._end, self._position)
        return len(data)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._position = offset + (0, self._position, self._end)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, num_bytes: int = -1, /) -> bytes:
        """Return nothing: what was taken cannot be read."""
        return b""
