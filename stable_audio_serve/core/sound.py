"""How a clip's file is written: its encoding and the ways to handle peaks. Also the measurements of a finished clip."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

# Ways to handle peaks. limit: a limiter keeps them at or below 0.977. scale: the clip is divided by its peak. clip:
# samples above 1 are set to 1.
Peaks = Literal["limit", "scale", "clip"]
BitDepth = Literal[16, 24, "float"]  # of uncompressed samples; float has 32 bits


class AudioFormat(StrEnum):
    """Formats of output files.

    `ogg` is Vorbis, `opus` is Opus in an Ogg container, `m4a` is AAC in an MP4 container and `aac` is AAC in ADTS
    frames. `pcm` (16 bits, little-endian), `ulaw` and `alaw` (G.711) are samples without a header.
    """

    WAV = "wav"
    FLAC = "flac"
    MP3 = "mp3"
    OGG = "ogg"
    OPUS = "opus"
    PCM = "pcm"
    ULAW = "ulaw"
    ALAW = "alaw"
    M4A = "m4a"
    AAC = "aac"


@dataclass(frozen=True, slots=True)
class Encoding:
    """The encoding of a file. None selects the format's default, and the model's sample rate.

    `audio.formats` has the values that each format allows.
    """

    file_format: AudioFormat = AudioFormat.WAV
    bitrate_kbps: int | None = None
    bit_depth: BitDepth | None = None
    sample_rate_hz: int | None = None


PLAIN_WAV = Encoding()  # 16 bits at the model's sample rate


@dataclass(frozen=True, slots=True)
class ClipFacts:
    """Measurements of one finished variation.

    `peak` is the largest absolute sample, 1 = full scale. `loudness_lufs` is the integrated loudness (ITU-R BS.1770),
    None for clips shorter than 0.4 s and for clips that never exceed -70 LUFS. `is_silent` means that every sample is
    below -70 dBFS.
    """

    seed: int
    peak: float
    loudness_lufs: float | None
    is_silent: bool
