"""Encode audio that arrives in blocks, so that a long piece is never in memory as a whole.

The files equal the files that `audio.encode` makes, with three exceptions. Resampled audio may differ in its last bits.
The compression level of a Vorbis file depends on the first block only. MP3 files with a low bit rate lack the frame
that states where the audio begins.
The methods need much CPU time: call them from worker threads, one at a time.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from stable_audio_serve.audio.compress import Encoder, Writable, open_encoder
from stable_audio_serve.audio.embedded_text import make_wav_chunk
from stable_audio_serve.audio.formats import file_rate
from stable_audio_serve.audio.pcm import little_endian, to_pcm16, to_samples, wav_header
from stable_audio_serve.core.private_files import needing_room
from stable_audio_serve.core.sound import AudioFormat, BitDepth, Encoding

if TYPE_CHECKING:
    import numpy.typing as npt


_FULL = (OSError, RuntimeError, AssertionError)  # raised if the file has no room, the last two by soundfile


class AudioWriter:
    """Writes one audio file block by block."""

    def __init__(
        self,
        file: Writable,
        sample_rate_hz: int,
        *,
        encoding: Encoding,
        text: str | None = None,
        is_growing: bool = False,
        num_samples: int | None = None,
    ) -> None:
        """Write to `file`, which must be empty and seekable. `close` does not close `file`.

        `is_growing` means that the file is read while it is written. The header of a WAV file then has the length
        `num_samples` (samples per channel), or states that the length is unknown if that is None or if the audio is
        resampled. `text` is embedded in the file, see `encode_audio`.
        """
        self._file = file
        self._rate_hz = sample_rate_hz
        self._file_rate_hz = file_rate(encoding, sample_rate_hz)
        self._encoding = encoding
        self._text = text
        self._is_growing = is_growing
        self._num_samples = num_samples if self._rate_hz == self._file_rate_hz else None
        self._resampler: _Resampler | None = None
        self._encoder: Encoder | None = None

    def write(self, block: npt.NDArray[np.float32]) -> None:
        """Encode the next samples (C, S) float32 in -1..1. Raises StorageFullError if the file has no room."""
        if self._encoding.file_format in (AudioFormat.ULAW, AudioFormat.ALAW):
            block = block.mean(axis=0, keepdims=True, dtype=np.float32)
        if self._rate_hz != self._file_rate_hz:
            self._resampler = self._resampler or _Resampler(self._rate_hz, self._file_rate_hz, channels=len(block))
            block = self._resampler.resample(block)
        with needing_room(_FULL):
            self._put(block)

    def close(self) -> None:
        """Complete the file. Further calls do nothing. Raises StorageFullError."""
        rest = None if self._resampler is None else self._resampler.finish()
        self._resampler = None
        with needing_room(_FULL):
            if rest is not None:
                self._put(rest)
            encoder, self._encoder = self._encoder, None
            if encoder is not None:
                encoder.close()
                self._file.seek(0, 2)  # writes what a buffered file still holds

    def _put(self, block: npt.NDArray[np.float32]) -> None:
        if block.shape[1]:
            self._encoder = self._encoder or self._open(block)
            self._encoder.write(block)

    def _open(self, block: npt.NDArray[np.float32]) -> Encoder:
        """Return the encoder of the file. `block` has the first samples."""
        encoding, rate_hz = self._encoding, self._file_rate_hz
        if encoding.file_format is AudioFormat.WAV:
            depth = encoding.bit_depth or 16
            return _WavEncoder(
                self._file,
                rate_hz,
                channels=len(block),
                bit_depth=depth,
                text=self._text,
                is_growing=self._is_growing,
                num_samples=self._num_samples,
            )
        if encoding.file_format is AudioFormat.PCM:
            return _RawEncoder(self._file)
        return open_encoder(self._file, rate_hz, encoding=encoding, first=block, text=self._text)


class _Resampler:
    def __init__(self, from_hz: int, to_hz: int, *, channels: int) -> None:
        import soxr

        self._stream = soxr.ResampleStream(from_hz, to_hz, channels, dtype="float32")
        self._rest = np.empty((0, channels), np.float32)

    def resample(self, block: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return self._next(np.ascontiguousarray(np.clip(block.T, -1.0, 1.0)))

    def finish(self) -> npt.NDArray[np.float32]:
        return self._next(self._rest, last=True)

    def _next(self, samples: npt.NDArray[np.float32], *, last: bool = False) -> npt.NDArray[np.float32]:
        resampled: npt.NDArray[np.float32] = self._stream.resample_chunk(samples, last=last)
        return np.clip(resampled, -1.0, 1.0).T


class _WavEncoder:
    def __init__(
        self,
        file: Writable,
        sample_rate_hz: int,
        *,
        channels: int,
        bit_depth: BitDepth,
        text: str | None,
        is_growing: bool,
        num_samples: int | None,
    ) -> None:
        self._file = file
        self._depth = bit_depth
        self._frame_bytes = channels * (4 if bit_depth == "float" else bit_depth // 8)
        self._frames = 0
        self._text = text
        self._is_growing = is_growing
        self._make_header = partial(wav_header, sample_rate_hz, channels=channels, bit_depth=bit_depth)
        num_more = 0 if num_samples is None else num_samples * self._frame_bytes % 2
        file.write(self._make_header(frames=num_samples, num_more=num_more))

    def write(self, block: npt.NDArray[np.float32]) -> None:
        self._frames += block.shape[1]
        self._file.write(bytes(little_endian(to_samples(block, self._depth))))

    def close(self) -> None:
        end = bytes(self._frames * self._frame_bytes % 2) + (make_wav_chunk(self._text) if self._text else b"")
        self._file.write(end)
        if not self._is_growing:
            self._file.seek(0)
            self._file.write(self._make_header(frames=self._frames, num_more=len(end)))


class _RawEncoder:
    def __init__(self, file: Writable) -> None:
        self._file = file

    def write(self, block: npt.NDArray[np.float32]) -> None:
        self._file.write(bytes(little_endian(to_pcm16(block))))

    def close(self) -> None:
        """Do nothing: the file has no header."""


class StreamFile:
    """A file object whose content can be sent while it is written. Changes to bytes that were already sent are lost.

    libsndfile makes such a change at the end of an MP3 file: it stores the length at the beginning. Players do not need
    this length.
    """

    def __init__(self) -> None:
        self._pending = bytearray()
        self._end = self._position = 0

    def take(self) -> bytes:
        """Return the bytes that were written since the last call of this method."""
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

    def truncate(self, size: int, /) -> int:
        """Return `size` without effect, because bytes that `take` returned cannot be removed."""
        return size

    def read(self, num_bytes: int = -1, /) -> bytes:
        """Return no bytes, because bytes that `take` returned cannot be read again."""
        return b""
