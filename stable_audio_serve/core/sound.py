"""How a clip is finished and its file is written: peaks, loudness, fades, encoding. Also a clip's measurements."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from stable_audio_serve.core.errors import InvalidRequestError

# Ways to handle peaks. limit: a limiter keeps them at or below 0.977. scale: the clip is divided by its peak. clip:
# samples above 1 are set to 1.
Peaks = Literal["limit", "scale", "clip"]
BitDepth = Literal[16, 24, "float"]  # bits per sample in WAV and FLAC files; float has 32 bits


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
    """The encoding of a file.

    None selects the format's default. The default of `sample_rate_hz` is the model's sample rate if the format allows
    it, see `audio.formats.file_rate`. `audio.formats` has the values that each format allows.
    """

    file_format: AudioFormat = AudioFormat.WAV
    bitrate_kbps: int | None = None
    bit_depth: BitDepth | None = None
    sample_rate_hz: int | None = None


PLAIN_WAV = Encoding()  # 16 bits at the model's sample rate


LEAST_MEASURED_S = 0.4  # the loudness of a shorter clip is undefined
_NEGLIGIBLE_S = 1e-6  # less than a sample; sums of times have rounding errors


@dataclass(frozen=True, slots=True)
class Loudness:
    """The integrated loudness (ITU-R BS.1770) that a clip gets, and the true peak that it may not exceed."""

    target_lufs: float
    true_peak_dbtp: float = -1.0


@dataclass(frozen=True, slots=True)
class Finishing:
    """What is done to a clip, in this order: its loudness, the limiter, linear fades at its ends."""

    loudness: Loudness | None = None
    fade_in_s: float = 0.0
    fade_out_s: float = 0.0

    def check(self, *, duration_s: float, is_loop: bool) -> None:
        """Raise InvalidRequestError if the clip is too short for this finishing, or if it is a loop and has fades."""
        if self.loudness is not None and duration_s < LEAST_MEASURED_S:
            message = f"loudness: duration must be at least {LEAST_MEASURED_S:g} s to measure the loudness"
            raise InvalidRequestError(message, field="loudness", allowed=f">= {LEAST_MEASURED_S:g} s")
        for name, fade_s in (("fade_in_s", self.fade_in_s), ("fade_out_s", self.fade_out_s)):
            if fade_s and is_loop:
                raise InvalidRequestError(f"{name} must be 0 for a loop", field=name, allowed="0")
        if self.fade_in_s + self.fade_out_s > duration_s + _NEGLIGIBLE_S:
            name = "fade_in_s" if self.fade_in_s > duration_s else "fade_out_s"
            message = f"{name}: the fades must not be longer than the clip, {duration_s:g} s, together"
            raise InvalidRequestError(message, field=name, allowed=f"at most {duration_s:g}")


AS_IS = Finishing()  # no target loudness, no fades


@dataclass(frozen=True, slots=True)
class ClipFacts:
    """Measurements of one finished variation.

    `peak` is the largest absolute sample, 1 = full scale. `loudness_lufs` is the integrated loudness (ITU-R BS.1770),
    None for clips shorter than 0.4 s and for clips that never exceed -70 LUFS. `is_silent` means that every sample is
    below -70 dBFS. `true_peak_dbtp` is only measured if the clip has a target loudness. `centroid_hz`, the spectral
    centroid, is only measured for sections of long pieces.
    """

    seed: int
    peak: float
    loudness_lufs: float | None
    is_silent: bool
    true_peak_dbtp: float | None = None
    centroid_hz: float | None = None
