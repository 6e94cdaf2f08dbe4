"""Defines scenes, which describe the sounds on which the demo model is trained, and draws random ones.

`captions.py` writes captions of scenes. `synthesis.py` renders scenes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

WAVES = ("sine", "square", "saw", "triangle")
INSTRUMENTS = ("organ", "pad", "pluck", "flute", "piano", "bell", "bass")
CHORD_VOICES = ("organ", "pad", "piano", "pluck", "saw", "sine")
PATTERNS = ("metronome", "kick", "drums", "house", "hat", "clap", "snare", "tom", "cowbell")
HITS = ("kick", "snare", "hat", "clap", "tom", "cowbell", "click", "cymbal", "laser")
NOISES = ("white", "pink", "brown", "wind", "rain", "ocean")

LOWEST_PITCH = 16  # C2, as an index of the oscillator bank (quarter tones)
HIGHEST_PITCH = 135  # slightly above 2000 Hz
DEFAULT_TEMPO_BPM = 120.0


@dataclass(frozen=True, slots=True)
class Scene:
    """The description of one sound. Fields that its kind does not use are empty.

    `kind` is tone, chord, arpeggio, sweep, beat, hit, noise, siren, silence or hush. A hush is near silence and has an
    empty prompt. `pitch` and `target` (the end of a sweep) are indices of oscillators. One step is a quarter tone; 82
    is 440 Hz.
    """

    kind: str
    voice: str = ""
    pitch: int = 0
    target: int = 0
    quality: str = ""  # of a chord or arpeggio: major or minor
    direction: str = ""  # of a sweep: up or down
    tempo_bpm: float = DEFAULT_TEMPO_BPM
    pan: str = ""  # left, right, left to right, right to left
    level: str = ""  # quiet, loud, or empty for the normal level
    fade: str = ""  # in or out
    under: Scene | None = None  # a second scene, which is mixed with this scene, at the same tempo


SHARES: dict[str, float] = {
    "tone": 0.17,
    "chord": 0.06,
    "arpeggio": 0.12,
    "sweep": 0.14,
    "beat": 0.38,
    "hit": 0.03,
    "noise": 0.05,
    "siren": 0.01,
    "silence": 0.01,
    "hush": 0.02,
    "pair": 0.04,
}


def draw_scene(rng: np.random.Generator, *, shares: dict[str, float] | None = None) -> Scene:
    """Draw a random scene. `shares` are the relative frequencies of the kinds of scenes; they need not sum to 1."""
    table = shares or SHARES
    weights = np.array(list(table.values()))
    kind = str(rng.choice(list(table), p=weights / weights.sum()))
    if kind == "pair":
        upper = _draw_single(rng, str(rng.choice(["tone", "chord"])))
        lower = _draw_single(rng, str(rng.choice(["beat", "noise"])))
        return replace(upper, under=lower, tempo_bpm=lower.tempo_bpm)
    scene = _draw_single(rng, kind)
    return scene if kind in ("silence", "hush") else _draw_modifiers(rng, scene)


def _draw_single(rng: np.random.Generator, kind: str) -> Scene:
    match kind:
        case "tone":
            return _draw_tone(rng)
        case "chord":
            voice = str(rng.choice(CHORD_VOICES, p=[0.4, 0.15, 0.15, 0.1, 0.1, 0.1]))
            return Scene("chord", voice=voice, pitch=_root(rng), quality=_mode(rng))
        case "arpeggio":
            voice = str(rng.choice(["pluck", "piano", "saw", "sine"], p=[0.4, 0.2, 0.2, 0.2]))
            return Scene("arpeggio", voice=voice, pitch=_root(rng), quality=_mode(rng), tempo_bpm=_tempo(rng))
        case "sweep":
            return _draw_sweep(rng)
        case "beat":
            weights = np.array([0.17, 0.40, 0.18, 0.13, 0.03, 0.02, 0.03, 0.02, 0.02])
            return Scene("beat", voice=str(rng.choice(PATTERNS, p=weights)), tempo_bpm=_tempo(rng))
        case "hit":
            return Scene("hit", voice=str(rng.choice(HITS)))
        case "noise":
            weights = np.array([0.35, 0.17, 0.12, 0.12, 0.12, 0.12])
            return Scene("noise", voice=str(rng.choice(NOISES, p=weights)))
        case "siren":
            return Scene("siren", voice=str(rng.choice(["siren", "alarm"])))
        case _:
            return Scene(kind)


def _draw_tone(rng: np.random.Generator) -> Scene:
    if rng.random() < 0.68:
        pitch = int(rng.integers(LOWEST_PITCH, HIGHEST_PITCH + 1))
        if rng.random() < 0.06:
            pitch = int(rng.integers(8, 150))
        voice = str(rng.choice(WAVES, p=[0.37, 0.21, 0.21, 0.21]))
    else:
        voice = str(rng.choice(INSTRUMENTS))
        low, high = (16, 64) if voice == "bass" else (34, HIGHEST_PITCH + 1)
        pitch = int(rng.integers(low, high))
    if rng.random() < 0.04:
        pitch = default_pitch(voice)
    return Scene("tone", voice=voice, pitch=pitch)


def default_pitch(voice: str) -> int:
    """Returns the pitch of a voice if the prompt states none: E2 for the bass, 440 Hz for other voices."""
    return 24 if voice == "bass" else 82


def _draw_sweep(rng: np.random.Generator) -> Scene:
    voice = str(rng.choice(WAVES, p=[0.7, 0.05, 0.2, 0.05]))
    direction = str(rng.choice(["up", "down"]))
    if rng.random() < 0.45:
        low, high = DEFAULT_SWEEP
    else:
        low = int(rng.integers(23, 112))
        high = int(rng.integers(low + 22, min(low + 110, 148) + 1))
    start, end = (low, high) if direction == "up" else (high, low)
    return Scene("sweep", voice=voice, pitch=start, target=end, direction=direction)


DEFAULT_SWEEP = (55, 135)  # 202 Hz to 2.03 kHz: the sweep of a prompt without frequencies


def _draw_modifiers(rng: np.random.Generator, scene: Scene) -> Scene:
    if rng.random() < 0.22:
        pan = str(rng.choice(["left", "right", "left to right", "right to left"], p=[0.4, 0.4, 0.1, 0.1]))
        scene = replace(scene, pan=pan)
    if rng.random() < 0.12:
        scene = replace(scene, level=str(rng.choice(["quiet", "loud"])))
    if rng.random() < (0.04 if scene.kind == "hit" else 0.17):
        scene = replace(scene, fade=str(rng.choice(["in", "out"])))
    return scene


def _root(rng: np.random.Generator) -> int:
    """Draw the root of a chord. Most roots are in octave 4, which is the default if a prompt states no octave."""
    return 64 + 2 * int(rng.integers(12)) if rng.random() < 0.65 else 40 + 2 * int(rng.integers(36))


def _mode(rng: np.random.Generator) -> str:
    return str(rng.choice(["major", "minor"]))


def _tempo(rng: np.random.Generator) -> float:
    return DEFAULT_TEMPO_BPM if rng.random() < 0.08 else float(rng.integers(60, 181))
