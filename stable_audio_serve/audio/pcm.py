"""Convert float audio to the samples of uncompressed files, and make the headers of WAV files."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from stable_audio_serve.core.sound import BitDepth

if TYPE_CHECKING:
    import numpy.typing as npt

_BLOCK = 16_384  # samples converted at once: fits the cache
_PCM, _IEEE_FLOAT = 1, 3  # sample formats of WAV files
_UNKNOWN = 0xFFFFFFFF  # the size in the header of a WAV file whose length is unknown


def to_pcm16(audio: npt.NDArray[np.float32]) -> npt.NDArray[np.int16]:
    """Convert `audio` (C, S) float32 to interleaved 16-bit samples (S, C). Values beyond -1..1 are clipped.

    The samples are those that libsndfile writes for PCM_16: floor(x * 32768), at most 32767.
    """
    out = np.empty(audio.shape[::-1], dtype=np.int16)
    high_half = slice(1, None, 2) if sys.byteorder == "little" else slice(0, None, 2)
    for place, fixed in _fixed_blocks(audio):
        out[place] = fixed.view(np.int16)[high_half]
    return out


def to_pcm32(audio: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """Convert `audio` (C, S) float32 to interleaved 32-bit samples (S, C). Values beyond -1..1 are clipped.

    The 24 high bits are the samples that libsndfile writes for PCM_24.
    """
    out = np.empty(audio.shape[::-1], dtype=np.int32)
    for place, fixed in _fixed_blocks(audio):
        out[place] = fixed
    return out


def to_samples(
    audio: npt.NDArray[np.float32], bit_depth: BitDepth
) -> npt.NDArray[np.int16] | npt.NDArray[np.int32] | npt.NDArray[np.float32]:
    """Convert `audio` (C, S) float32 to the interleaved samples (S, C) of a file. Values beyond -1..1 are clipped.

    They are int16 for 16 bits, float32 for "float", and for 24 bits the result of `to_pcm32`.
    """
    if bit_depth == "float":
        return np.ascontiguousarray(np.clip(audio.T, -1.0, 1.0))
    return to_pcm32(audio) if bit_depth == 24 else to_pcm16(audio)


def _fixed_blocks(audio: npt.NDArray[np.float32]) -> Iterator[tuple[tuple[slice, int], npt.NDArray[np.int32]]]:
    """Yield blocks of `audio` (C, S) as 32-bit integers, each with its index in an array (S, C)."""
    channels, samples = audio.shape
    scaled, fixed = np.empty(_BLOCK, dtype=np.float32), np.empty(_BLOCK, dtype=np.int32)
    for channel in range(channels):
        for start in range(0, samples, _BLOCK):
            stop = min(start + _BLOCK, samples)
            x, q = scaled[: stop - start], fixed[: stop - start]
            np.multiply(audio[channel, start:stop], np.float32(2**31), out=x)
            # Clip to the range of int32. 2**31 - 128 is the largest float32 below 2**31.
            np.clip(x, np.float32(-(2**31)), np.float32(2**31 - 128), out=x)
            np.copyto(q, np.rint(x, out=x), casting="unsafe")
            yield (slice(start, stop), channel), q


def to_full_scale_pcm16(audio: npt.NDArray[np.float32]) -> npt.NDArray[np.int16]:
    """Scale `audio` (C, S) float32 to full scale and convert it to interleaved 16-bit samples (S, C).

    Samples are divided by the peak, multiplied by 32767 and truncated towards zero. Silence stays silence.
    """
    peak = np.abs(audio).max(initial=0.0)
    scaled = np.divide(audio.T, peak or 1.0, dtype=np.float32, order="C")
    return np.multiply(scaled, np.float32(32767), out=scaled).astype(np.int16)


def little_endian(
    samples: npt.NDArray[np.int16] | npt.NDArray[np.int32] | npt.NDArray[np.float32],
) -> memoryview:
    """Return the little-endian bytes of interleaved samples (S, C): of int32 samples only the 24 high bits."""
    data = samples.astype(samples.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8)
    if samples.dtype == np.int32:
        data = np.ascontiguousarray(data.reshape(-1, 4)[:, 1:]).reshape(-1)
    return data.data


def wav_header(
    sample_rate_hz: int, *, channels: int, frames: int | None, bit_depth: BitDepth = 16, num_more: int = 0
) -> bytes:
    """Return the header of a WAV file.

    `frames` is the number of samples per channel, or None if it is unknown. `num_more` is the number of bytes that
    follow the samples in the file.
    """
    coding, extra, fact = _PCM, b"", b""
    if bit_depth == "float":
        # Formats other than PCM have a longer layout, and a chunk with the number of samples.
        coding, extra, fact = _IEEE_FLOAT, bytes(2), struct.pack("<4sII", b"fact", 4, frames or 0)
    sample_bytes = 4 if bit_depth == "float" else bit_depth // 8
    frame_bytes = sample_bytes * channels
    rates, widths = (sample_rate_hz, sample_rate_hz * frame_bytes), (frame_bytes, 8 * sample_bytes)
    layout = struct.pack("<4sIHHIIHH", b"fmt ", 16 + len(extra), coding, channels, *rates, *widths) + extra + fact
    data_size = size = _UNKNOWN
    if frames is not None:
        known = 4 + len(layout) + 8 + frames * frame_bytes + num_more
        if known < _UNKNOWN:  # a longer file is read to its end, as one of unknown length
            data_size, size = frames * frame_bytes, known
    return struct.pack("<4sI4s", b"RIFF", size, b"WAVE") + layout + struct.pack("<4sI", b"data", data_size)
