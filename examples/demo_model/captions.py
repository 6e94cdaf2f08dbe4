"""Writes captions of scenes (training sounds) in many phrasings, like prompts that people type."""

from __future__ import annotations

import math

import numpy as np

from examples.demo_model.scenes import DEFAULT_SWEEP, DEFAULT_TEMPO_BPM, Scene, default_pitch
from stable_audio_serve.models.oscillator.bank import A4_INDEX, NUM_OSCILLATORS, OSCILLATOR_HZ

_NOTES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
_FLATS = {"C#": "Db", "D#": "Eb", "F#": "Gb", "G#": "Ab", "A#": "Bb"}
_FILLERS = ("please make {}", "{} please", "i would like {}", "generate {}", "a recording of {}", "the sound of {}")
_BEAT_NAMES = {
    "metronome": ("metronome", "metronome clicks", "a click track", "a metronome"),
    "drums": ("drum loop", "rock beat", "a drum beat", "drums", "drum pattern", "hip hop beat"),
    "house": ("house beat", "techno beat", "a disco beat", "house drum loop"),
}
_HIT_NAMES = {
    "kick": ("kick", "kick drum", "bass drum"),
    "snare": ("snare", "snare drum"),
    "hat": ("hi-hat", "hihat"),
    "clap": ("clap", "hand clap"),
    "click": ("click", "tick"),
}
_PAN_WORDS = {
    "left": ("panned left", "on the left", "hard left"),
    "right": ("panned right", "on the right", "in the right channel"),
    "left to right": ("moving from left to right", "panning left to right"),
    "right to left": ("moving from right to left", "panning right to left"),
}
_FADE_WORDS = {"in": ("fading in", "fade in", "with a fade in"), "out": ("fading out", "fade out", "that fades out")}


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Returns a random prompt for a scene. Properties with their default value, such as 120 bpm, may be omitted."""
    if scene.kind == "hush":
        return ""
    words = [_subject(scene, rng)]
    if scene.under is not None:
        words.append(f"over {_subject(scene.under, rng)}")
    for value in (
        _one(rng, _PAN_WORDS.get(scene.pan, ("",))),
        scene.level,
        _one(rng, _FADE_WORDS.get(scene.fade, ("",))),
    ):
        if value:
            words.insert(0 if rng.random() < 0.25 else len(words), value)
    text = (", " if rng.random() < 0.4 else " ").join(words)
    if rng.random() < 0.1:
        text = _one(rng, _FILLERS).format(text)
    return text


def pitch_name(index: int, rng: np.random.Generator) -> str:
    """Returns a random spelling of an oscillator's pitch: a note name (if the pitch is a note) or whole hertz."""
    if index % 2 == 0 and rng.random() < 0.5:
        octave, step = divmod(69 + (index - 82) // 2 - 12, 12)
        letter = _note_letter(step, rng)
        return f"{letter}{octave}"
    return hertz_name(index, rng)


def hertz_name(index: int, rng: np.random.Generator) -> str:
    """Returns a random frequency in whole hertz, at most a quarter of a semitone from an oscillator's pitch."""
    exact = float(OSCILLATOR_HZ[index])
    candidates = [
        value for value in range(int(exact * 0.985), int(exact * 1.016) + 1) if nearest_oscillator(value) == index
    ]
    value = int(rng.choice(candidates)) if candidates else round(exact)
    return _one(rng, ("{} Hz", "{}Hz", "{} hertz")).format(value)


def nearest_oscillator(frequency_hz: float) -> int:
    """Returns the index of the oscillator closest to a frequency."""
    index = round(A4_INDEX + 24.0 * math.log2(frequency_hz / 440.0))
    return min(max(index, 0), NUM_OSCILLATORS - 1)


def _note_letter(step: int, rng: np.random.Generator) -> str:
    letter = _NOTES[step]
    return _FLATS[letter] if letter in _FLATS and rng.random() < 0.4 else letter


def _subject(scene: Scene, rng: np.random.Generator) -> str:
    match scene.kind:
        case "tone":
            return _tone(scene, rng)
        case "chord" | "arpeggio":
            return _harmony(scene, rng)
        case "sweep":
            return _sweep(scene, rng)
        case "beat":
            return _beat(scene, rng)
        case "hit":
            name = _one(rng, _HIT_NAMES.get(scene.voice, (scene.voice,)))
            return _one(rng, ("{}", "a single {}", "{} hit", "one shot {}")).format(name)
        case "noise":
            if scene.voice in ("white", "pink", "brown"):
                plain = scene.voice == "white" and rng.random() < 0.15
                return "noise" if plain else f"{scene.voice} noise"
            return scene.voice
        case "siren":
            return scene.voice
        case _:
            return "silence"


def _tone(scene: Scene, rng: np.random.Generator) -> str:
    name = pitch_name(scene.pitch, rng)
    voice = scene.voice
    if voice == "sine" and rng.random() < 0.2:
        return _one(rng, ("a {} tone", "{}", "note {}")).format(name)
    if scene.pitch == default_pitch(voice) and rng.random() < 0.7:
        return _one(rng, ("{} tone", "{} wave", "{}", "a {} note")).format(voice)
    forms = ("{v} {n}", "a {n} {v} wave", "{v} tone at {n}", "{n} {v}", "{v} playing {n}")
    return _one(rng, forms).format(v=voice, n=name)


def _harmony(scene: Scene, rng: np.random.Generator) -> str:
    octave, step = divmod(69 + (scene.pitch - 82) // 2 - 12, 12)
    letter = _note_letter(step, rng)
    root = letter if octave == 4 and rng.random() < 0.7 else f"{letter}{octave}"
    forms = ("{r} {q} {k}", "a {r} {q} {k}", "{k} {r} {q}")
    text = _one(rng, forms).format(r=root, q=scene.quality, k=scene.kind)
    if scene.voice != ("organ" if scene.kind == "chord" else "pluck") or rng.random() < 0.3:
        text = f"{scene.voice} {text}" if rng.random() < 0.5 else f"{text} on {scene.voice}"
    return f"{text} {_tempo(scene, rng)}".strip() if scene.kind == "arpeggio" else text


def _sweep(scene: Scene, rng: np.random.Generator) -> str:
    way = {"up": ("rising", "ascending", "upward"), "down": ("falling", "descending", "downward")}[scene.direction]
    voice = "" if scene.voice == "sine" and rng.random() < 0.5 else f" {scene.voice}"
    noun = _one(rng, ("sweep", "sweep", "frequency sweep", "glide", "tone"))
    usual = {scene.pitch, scene.target} == set(DEFAULT_SWEEP)
    if usual and rng.random() < 0.8:
        return _one(rng, (f"{_one(rng, way)}{voice} {noun}", f"{voice} sweep {scene.direction}")).strip()
    start, end = hertz_name(scene.pitch, rng), hertz_name(scene.target, rng)
    if rng.random() < 0.6:
        return f"{_one(rng, way)}{voice} {noun} from {start} to {end}"
    return f"{voice} sweep from {start} to {end}".strip()


def _beat(scene: Scene, rng: np.random.Generator) -> str:
    tempo = _tempo(scene, rng)
    if scene.voice in _BEAT_NAMES:
        return f"{_one(rng, _BEAT_NAMES[scene.voice])} {tempo}".strip()
    name = _one(rng, _HIT_NAMES.get(scene.voice, (scene.voice,)))
    if not tempo or rng.random() < 0.5:
        name = f"{name} {_one(rng, ('loop', 'pattern', 'on every beat'))}"
    return f"{name} {tempo}".strip()


def _tempo(scene: Scene, rng: np.random.Generator) -> str:
    if scene.tempo_bpm == DEFAULT_TEMPO_BPM and rng.random() < 0.5:
        return ""
    return _one(rng, ("at {:.0f} bpm", "{:.0f} bpm", "{:.0f}bpm", "at {:.0f} beats per minute")).format(scene.tempo_bpm)


def _one(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]
