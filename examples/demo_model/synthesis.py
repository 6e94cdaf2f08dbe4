"""Renders scenes (descriptions of sounds) with NumPy directly as frames of the oscillator bank, not as audio.

The frames from `render_scene` are the training data of the autoencoder and the denoiser.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from examples.demo_model.drums import BAR_PATTERNS, HIT_SOUNDS
from examples.demo_model.scenes import Scene
from stable_audio_serve.models.oscillator.bank import (
    BAND_EDGES_HZ,
    FLOOR,
    FRAME_SAMPLES,
    NUM_BANDS,
    NUM_CHANNELS,
    NUM_OSCILLATORS,
    SAMPLE_RATE_HZ,
)

Array = npt.NDArray[np.float32]
Floats = npt.NDArray[np.floating]

FRAME_S = FRAME_SAMPLES / SAMPLE_RATE_HZ
TONE_RMS = 0.16
_LEVELS = {"": 1.0, "quiet": 0.2, "loud": 2.0}
_FADE_DB = 48.0

# The harmonics of each voice: (harmonic number, amplitude).
_HARMONICS: dict[str, list[tuple[float, float]]] = {
    "sine": [(1, 1.0)],
    "square": [(h, 1 / h) for h in range(1, 16, 2)],
    "saw": [(h, 1 / h) for h in range(1, 15)],
    "triangle": [(h, 1 / h**2) for h in range(1, 10, 2)],
    "organ": [(1, 1.0), (2, 0.7), (3, 0.35), (4, 0.35), (8, 0.12)],
    "pad": [(1, 1.0), (2, 0.4), (3, 0.15)],
    "pluck": [(h, 1 / h) for h in range(1, 7)],
    "flute": [(1, 1.0), (2, 0.2), (3, 0.05)],
    "piano": [(1, 1.0), (2, 0.5), (3, 0.3), (4, 0.15)],
    "bell": [(1, 1.0), (2.76, 0.45), (5.4, 0.2)],
    "bass": [(h, 1 / h**1.3) for h in range(1, 9)],
}
_DECAY_S = {"pluck": 0.35, "piano": 0.9, "bell": 1.3}  # decay times of voices; other voices do not decay
_ATTACK_S = {"pad": 0.35, "flute": 0.08}
_TRIADS = {"major": (0, 8, 14), "minor": (0, 6, 14)}  # the notes of a chord in quarter tones above its root


class _Canvas:
    """The linear amplitudes of a sound: tones (frames, oscillators) and noise bands (frames, bands)."""

    def __init__(self, num_frames: int) -> None:
        self.tones = np.zeros((num_frames, NUM_OSCILLATORS), np.float32)
        self.bands = np.zeros((num_frames, NUM_BANDS), np.float32)

    def stamp(self, onset: int, *, tones: Array, bands: Array) -> None:
        stop = min(len(self.tones), onset + len(tones))
        if onset >= stop:
            return
        span = slice(onset, stop)
        self.tones[span] = np.maximum(self.tones[span], tones[: stop - onset])
        self.bands[span] = np.maximum(self.bands[span], bands[: stop - onset])


def num_sounding_frames(duration_s: float) -> int:
    """Returns the number of frames that cover a clip of `duration_s`."""
    return math.ceil(int(duration_s * SAMPLE_RATE_HZ) / FRAME_SAMPLES)


def render_scene(scene: Scene, rng: np.random.Generator, *, duration_s: float, num_frames: int) -> Array:
    """Returns a scene as an array of `num_frames` frames with 222 float32 values each.

    Frames after `duration_s` are silent.
    """
    sounding = min(num_sounding_frames(duration_s), num_frames)
    part = _render_part(scene, rng, duration_s=duration_s, num_frames=sounding)
    tones, bands = part.tones, part.bands
    if scene.under is not None:
        lower = _render_part(scene.under, rng, duration_s=duration_s, num_frames=sounding)
        tones, bands = 0.7 * (tones + lower.tones), np.hypot(0.7 * bands, 0.7 * lower.bands)
    frames = np.zeros((num_frames, NUM_CHANNELS), np.float32)
    amplitude = np.concatenate([tones, bands], axis=1)
    amplitude *= (_LEVELS[scene.level] * _fade(scene.fade, sounding))[:, None]
    frames[:sounding, :-2] = np.log1p(np.minimum(amplitude, 1.0) / FLOOR) / math.log1p(1 / FLOOR)
    frames[:, -2:] = _balance(scene.pan, num_frames, sounding=sounding)[:, None]
    return frames


def _fade(fade: str, num_frames: int) -> Array:
    progress = (np.arange(num_frames, dtype=np.float32) + 0.5) / max(num_frames, 1)
    match fade:
        case "in":
            return np.asarray(10 ** (-_FADE_DB / 20 * (1 - progress)), np.float32)
        case "out":
            return np.asarray(10 ** (-_FADE_DB / 20 * progress), np.float32)
        case _:
            return np.ones(num_frames, np.float32)


def _balance(pan: str, num_frames: int, *, sounding: int) -> Array:
    across = (np.clip(np.arange(num_frames) / max(sounding, 1), 0, 1) * 2 - 1).astype(np.float32)
    match pan:
        case "left":
            return np.full(num_frames, -1.0, np.float32)
        case "right":
            return np.full(num_frames, 1.0, np.float32)
        case "left to right":
            return across
        case "right to left":
            return -across
        case _:
            return np.zeros(num_frames, np.float32)


def _render_part(scene: Scene, rng: np.random.Generator, *, duration_s: float, num_frames: int) -> _Canvas:
    canvas = _Canvas(num_frames)
    match scene.kind:
        case "tone":
            _draw_note(canvas, scene.voice, pitch=scene.pitch, gain=1.0)
        case "chord":
            for step in _TRIADS[scene.quality]:
                _draw_note(canvas, scene.voice, pitch=scene.pitch + step, gain=0.58)
        case "arpeggio":
            _draw_arpeggio(canvas, scene)
        case "sweep":
            progress = (np.arange(num_frames) + 0.5) / max(num_frames, 1)
            _draw_glide(canvas, scene.voice, pitches=scene.pitch + (scene.target - scene.pitch) * progress)
        case "siren":
            _draw_siren(canvas, scene)
        case "beat":
            _draw_beat(canvas, scene)
        case "hit":
            tones, bands = HIT_SOUNDS[scene.voice]
            canvas.stamp(0, tones=tones, bands=bands)
        case "noise":
            canvas.bands[:] = _noise_bands(scene.voice, rng, num_frames=num_frames)
        case "hush":
            canvas.bands[:] = 0.05 * _noise_bands("pink", rng, num_frames=num_frames)
        case "silence":
            pass
        case other:
            raise ValueError(f"no such kind of scene: {other!r}")
    return canvas


def _partials(voice: str, pitch: int) -> tuple[npt.NDArray[np.int64], Array]:
    """Returns the oscillators and amplitudes of the harmonics of one note, scaled to an RMS of `TONE_RMS`.

    Harmonics above the highest oscillator are dropped.
    """
    harmonics = _HARMONICS[voice]
    index = np.array([pitch + round(24 * math.log2(number)) for number, _ in harmonics])
    amplitude = np.array([amplitude for _, amplitude in harmonics], np.float32)
    inside = (index >= 0) & (index < NUM_OSCILLATORS)
    index, amplitude = index[inside], amplitude[inside]
    return index, amplitude * np.float32(TONE_RMS * math.sqrt(2) / np.sqrt((amplitude**2).sum()))


def _envelope(voice: str, num_frames: int) -> Array:
    time_s = np.arange(num_frames, dtype=np.float32) * FRAME_S
    envelope = np.ones(num_frames, np.float32)
    if voice in _DECAY_S:
        envelope = np.exp(-time_s / _DECAY_S[voice])
    if voice in _ATTACK_S:
        envelope = np.minimum(1.0, (time_s + FRAME_S) / _ATTACK_S[voice])
    return envelope.astype(np.float32)


def _draw_note(canvas: _Canvas, voice: str, *, pitch: int, gain: float) -> None:
    index, amplitude = _partials(voice, pitch)
    envelope = _envelope(voice, len(canvas.tones))
    canvas.tones[:, index] = np.hypot(canvas.tones[:, index], gain * envelope[:, None] * amplitude)
    if voice == "flute":
        canvas.bands[:, 8:13] = np.maximum(canvas.bands[:, 8:13], 0.006 * gain * envelope[:, None])


def _draw_glide(canvas: _Canvas, voice: str, *, pitches: Floats) -> None:
    nearest = np.rint(pitches).astype(int)
    for pitch in np.unique(nearest):
        rows = np.flatnonzero(nearest == pitch)
        index, amplitude = _partials(voice, int(pitch))
        canvas.tones[rows[:, None], index] = amplitude


def _draw_siren(canvas: _Canvas, scene: Scene) -> None:
    beats = np.arange(len(canvas.tones)) * FRAME_S * scene.tempo_bpm / 60
    if scene.voice == "alarm":
        pitches = np.where(beats % 1.0 < 0.5, 106.0, 118.0)
        _draw_glide(canvas, "square", pitches=pitches)
    else:
        _draw_glide(canvas, "sine", pitches=96 + 14 * np.sin(np.pi * beats / 2))


def onset_frames(tempo_bpm: float, num_frames: int, *, per_beat: int = 1) -> list[int]:
    """Returns the frames at which beats begin, from frame 0. Each beat is divided into `per_beat` equal parts."""
    step_s = 60.0 / tempo_bpm / per_beat
    count = math.ceil(num_frames * FRAME_S / step_s)
    return [round(number * step_s / FRAME_S) for number in range(count)]


def _draw_arpeggio(canvas: _Canvas, scene: Scene) -> None:
    """Add an arpeggio to the canvas: root, third, fifth, third, with one note per half beat."""
    low, middle, high = _TRIADS[scene.quality]
    steps = (low, middle, high, middle)
    onsets = onset_frames(scene.tempo_bpm, len(canvas.tones), per_beat=2)
    length = round(0.5 * 60 / scene.tempo_bpm / FRAME_S)
    decay = np.exp(-np.arange(length) * FRAME_S / 0.18).astype(np.float32)[:, None]
    silent = np.zeros((length, NUM_BANDS), np.float32)
    for number, onset in enumerate(onsets):
        index, amplitude = _partials(scene.voice, scene.pitch + steps[number % 4])
        tones = np.zeros((length, NUM_OSCILLATORS), np.float32)
        tones[:, index] = decay * amplitude
        canvas.stamp(onset, tones=tones, bands=silent)


def _draw_beat(canvas: _Canvas, scene: Scene) -> None:
    for hit, per_beat, places in BAR_PATTERNS[scene.voice]:
        tones, bands = HIT_SOUNDS[hit]
        for number, onset in enumerate(onset_frames(scene.tempo_bpm, len(canvas.tones), per_beat=per_beat)):
            if number % (4 * per_beat) in places:
                canvas.stamp(onset, tones=tones, bands=bands)


def _noise_bands(colour: str, rng: np.random.Generator, *, num_frames: int) -> Array:
    """Returns the RMS of coloured noise in each noise band, (frames, bands).

    The power density at frequency f is constant for white noise, 1/f for pink and 1/f^2 for brown noise.
    """
    width = np.diff(BAND_EDGES_HZ)
    centre = np.sqrt(np.maximum(BAND_EDGES_HZ[:-1], 40.0) * BAND_EDGES_HZ[1:])
    time_s = np.arange(num_frames) * FRAME_S
    wobble: Floats = np.ones((num_frames, 1))
    match colour:
        case "white":
            power = width
        case "pink":
            power = width / centre
        case "brown":
            power = width / centre**2
        case "wind":
            power = np.where(centre < 1500, width / centre, 0.0)
            wobble = _wobble(rng, time_s, rate_hz=0.35, depth=0.75)
        case "rain":
            power = np.where(centre > 1500, width, 0.03 * width)
            wobble = 1.0 + 0.25 * rng.standard_normal((num_frames, 1)).clip(-2, 2)
        case "ocean":
            power = np.where(centre < 6000, width / np.sqrt(centre), 0.0)
            wobble = _wobble(rng, time_s, rate_hz=0.16, depth=0.95)
        case other:
            raise ValueError(f"no such noise: {other!r}")
    rms = np.sqrt(power / power.sum())
    return np.asarray(TONE_RMS * rms[None] * wobble, np.float32)


def _wobble(rng: np.random.Generator, time_s: Floats, *, rate_hz: float, depth: float) -> Array:
    phase = rng.uniform(0, 2 * np.pi)
    swell = 0.5 + 0.5 * np.sin(2 * np.pi * rate_hz * time_s + phase)
    return np.asarray((1 - depth) + depth * swell, np.float32)[:, None]
