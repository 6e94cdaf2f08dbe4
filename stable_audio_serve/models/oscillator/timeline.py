"""Features of each latent frame's position in its clip and in the beat, for the denoiser's per-frame conditioning.

The denoiser needs these features because rotary attention sees only distances between frames, while beats and sweeps
depend on absolute positions. A checkpoint's config names the conditioner by its type, `timeline`. The conditioner's
`config` defines how to read a tempo from a prompt.
"""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass

import torch
from torch import Tensor

from stable_audio_serve.models.config_reader import ConfigReader

_PROGRESS_HARMONICS = (1, 2, 3, 4, 5, 6)
_START_S = (0.1, 0.3, 1.0, 3.0)
_END_S = (0.1, 0.3, 1.0)
_BEAT_RATES = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)  # cycles per beat; 0.25 is a bar of four

_MOST_PATTERN_CHARS = 2000
_LONG_S = 12.0  # all clips of at least this duration have the same duration feature

NUM_TIMELINE_FEATURES = 1 + len(_PROGRESS_HARMONICS) + len(_START_S) + len(_END_S) + 1 + 1 + 2 * len(_BEAT_RATES) + 1


@dataclass(frozen=True, slots=True)
class TempoRule:
    """Reads a tempo from a prompt: the first group in the first match of `pattern`, limited to the allowed range.

    If `pattern` does not match, the tempo is `default_bpm`.
    """

    pattern: re.Pattern[str]
    default_bpm: float
    minimum_bpm: float
    maximum_bpm: float

    def read(self, prompt: str) -> float:
        """Returns the tempo of a prompt in beats per minute."""
        # A pattern with several optional spaces takes a time that is quadratic in the length of a row of spaces.
        match = self.pattern.search(" ".join(unicodedata.normalize("NFKC", prompt).casefold().split()))
        number = next((group for group in match.groups() if group), None) if match else None
        return min(max(float(number), self.minimum_bpm), self.maximum_bpm) if number else self.default_bpm


def timeline_features(num_frames: int, *, frame_s: float, seconds_total: float, tempo_bpm: float) -> Tensor:
    """Returns features (NUM_TIMELINE_FEATURES, num_frames) float32, on the CPU. Latent frame i starts at i * `frame_s`.

    The features are progress through `seconds_total` and its cosines, closeness to start and end, the duration, phases
    of the beat at `tempo_bpm` (the first beat is at the clip's start), and the tempo.
    """
    start = torch.arange(num_frames, dtype=torch.float64) * frame_s
    seconds = max(seconds_total, 1e-3)
    progress = ((start + frame_s / 2) / seconds).clamp(max=1.25)
    left = (seconds - start).clamp(min=0.0)
    beat = start * (tempo_bpm / 60.0)
    constant = torch.ones(num_frames, dtype=torch.float64)
    rows = [progress]
    rows += [torch.cos(math.pi * k * progress) for k in _PROGRESS_HARMONICS]
    rows += [torch.exp(-start / tau) for tau in _START_S]
    rows += [torch.exp(-left / tau) for tau in _END_S]
    rows += [(left / frame_s).clamp(max=1.0), constant * math.log2(min(seconds, _LONG_S) / 4.0) / 2.0]
    for rate in _BEAT_RATES:
        angle = 2.0 * math.pi * rate * beat
        rows += [torch.cos(angle), torch.sin(angle)]
    rows.append(constant * math.log2(tempo_bpm / 110.0))
    return torch.stack(rows).float()


def parse_timeline(config: ConfigReader) -> TempoRule:
    """Parse the config section `{tempo: {pattern, default, min_val, max_val}}` of a conditioner `timeline`.

    Raises CheckpointError naming an unusable key.
    """
    tempo = config.section("tempo")
    try:
        pattern = re.compile(tempo.text("pattern", most_chars=_MOST_PATTERN_CHARS))
    except re.error as error:
        raise tempo.unusable("pattern", f"a regular expression ({error})") from error
    minimum, maximum = tempo.number("min_val", at_least=1), tempo.number("max_val", at_least=1)
    return TempoRule(pattern, tempo.number("default", at_least=1), minimum, maximum)
