"""Renders the two example riffs that the server's package contains, with the demo model's synthesiser.

`python -m examples.demo_model.riffs FOLDER` writes them. A test compares them with the packaged files. The riffs have
the licence CC0.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from examples.demo_model.scenes import Scene
from examples.demo_model.synthesis import FRAME_S, render_scene
from stable_audio_serve.models.oscillator.bank import FRAME_SAMPLES, SAMPLE_RATE_HZ, OscillatorBank

RATE_HZ = 22_050  # sufficient for these riffs, whose partials are below 5 kHz; keeps the package small
_BEATS_PER_BAR = 4


@dataclass(frozen=True, slots=True)
class RiffPlan:
    """A riff with one bar per chord. A chord is a pair: the oscillator index of its root, and "major" or "minor"."""

    tempo_bpm: int
    voice: str
    chords: tuple[tuple[int, str], ...]


# Chord progressions: i VI III VII in G sharp minor, and I vi ii V in F. Roots are in quarter tones; 82 is 440 Hz.
RIFFS = {
    "gsharp_80bpm_4.wav": RiffPlan(80, "pluck", ((56, "minor"), (48, "major"), (62, "major"), (52, "major"))),
    "f_110bpm_3.wav": RiffPlan(110, "piano", ((50, "major"), (44, "minor"), (54, "minor"), (64, "major"))),
}


def render_riff(plan: RiffPlan) -> npt.NDArray[np.float32]:
    """Returns the audio of a riff, mono float32 at `RATE_HZ`."""
    import soxr

    rng = np.random.default_rng(0)  # `render_scene` requires it, but does not use it for these scenes
    bar_s = _BEATS_PER_BAR * 60 / plan.tempo_bpm
    edges = [round(bar * bar_s / FRAME_S) for bar in range(len(plan.chords) + 1)]
    frames = np.concatenate(
        [
            render_scene(
                Scene("arpeggio", voice=plan.voice, pitch=root, quality=quality, tempo_bpm=plan.tempo_bpm),
                rng,
                duration_s=(stop - start) * FRAME_S,
                num_frames=stop - start,
            )
            for (root, quality), start, stop in zip(plan.chords, edges, edges[1:], strict=False)
        ]
    )
    silence = torch.zeros(2, len(frames) * FRAME_SAMPLES)
    audio = OscillatorBank().render(torch.from_numpy(frames.T.copy()), silence, start_frame=0).numpy()
    mono = audio.mean(axis=0)[: round(len(plan.chords) * bar_s * SAMPLE_RATE_HZ)]
    return np.asarray(soxr.resample(mono, SAMPLE_RATE_HZ, RATE_HZ), np.float32)


def write_riffs(folder: Path) -> None:
    """Write all riffs to `folder` as 16-bit WAV files."""
    import soundfile

    folder.mkdir(parents=True, exist_ok=True)
    for name, plan in RIFFS.items():
        soundfile.write(folder / name, render_riff(plan), RATE_HZ, subtype="PCM_16")


if __name__ == "__main__":
    write_riffs(Path(sys.argv[1]))
