"""Checks with spectra and onsets whether a clip sounds like the scene that its prompt describes.

The thresholds define correct sounds. They are not tuned to a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from examples.demo_model.scenes import Scene
from stable_audio_serve.models.oscillator.bank import OSCILLATOR_HZ, SAMPLE_RATE_HZ

Audio = npt.NDArray[np.float32]

_ONSET_HOP = 128
_TRIADS = {"major": (0, 4, 7), "minor": (0, 3, 7)}


def check_scene(audio: Audio, scene: Scene) -> dict[str, bool]:
    """Run all checks that apply to the scene on stereo audio. Returns for each check, by name, whether it passed."""
    results = {}
    if scene.kind in _CHECKS:
        results[_check_name(scene)] = _CHECKS[scene.kind](audio, scene)
    if scene.kind == "tone" and scene.voice in ("sine", "square", "saw", "triangle"):
        results["timbre"] = has_timbre(audio, scene.voice, fundamental_hz=float(OSCILLATOR_HZ[scene.pitch]))
    if scene.kind == "chord":
        results["chord mode"] = chord_mode(audio, scene.pitch) == scene.quality
    if scene.pan in ("left", "right"):
        results["panning"] = is_panned(audio, scene.pan)
    if scene.fade:
        results["fade"] = is_faded(audio, scene.fade)
    return results


def _check_name(scene: Scene) -> str:
    if scene.kind == "tone":
        return "pitch"
    if scene.kind == "beat":
        return "tempo strict" if scene.voice in ("metronome", "kick") else "tempo loop"
    names = {"chord": "chord", "arpeggio": "tempo arpeggio", "hit": "one-shot", "hush": "empty prompt"}
    return names.get(scene.kind, scene.kind)


def strongest_hz(audio: Audio) -> float:
    """Returns the frequency of the strongest spectral peak in the loudest 65,536 samples; 0 if there is no peak.

    The frequency is interpolated between spectral bins with a parabola.
    """
    mono = _louder_channel(audio)
    size = min(len(mono), 65536)
    energy = np.cumsum(np.concatenate([[0.0], mono.astype(np.float64) ** 2]))
    starts = np.arange(0, len(mono) - size + 1, 1024)
    start = int(starts[np.argmax(energy[starts + size] - energy[starts])])
    magnitude = np.abs(np.fft.rfft(mono[start : start + size] * np.hanning(size), n=2 * size))
    magnitude[: int(30 * 2 * size / SAMPLE_RATE_HZ)] = 0.0
    peak = int(magnitude.argmax())
    if peak in (0, len(magnitude) - 1) or magnitude[peak] < 1e-9:
        return 0.0
    left, middle, right = np.log(magnitude[peak - 1 : peak + 2] + 1e-12)
    return float((peak + 0.5 * (left - right) / (left - 2 * middle + right)) * SAMPLE_RATE_HZ / (2 * size))


def has_pitch(audio: Audio, wanted_hz: float, *, cents: float = 50.0) -> bool:
    """Whether the frequency of the strongest spectral peak is within `cents` of `wanted_hz`."""
    found = strongest_hz(audio)
    return found > 0 and abs(1200 * math.log2(found / wanted_hz)) <= cents


def harmonic_levels_db(audio: Audio, fundamental_hz: float, *, numbers: tuple[int, ...] = (2, 3)) -> list[float]:
    """Returns the levels of harmonics (`numbers`) relative to the fundamental, in dB.

    The level of a harmonic is its highest peak within 0.6 semitones.
    """
    mono = _louder_channel(audio)
    magnitude = np.abs(np.fft.rfft(mono * np.hanning(len(mono))))
    step = SAMPLE_RATE_HZ / len(mono)

    def around(hertz: float) -> float:
        low = int(hertz * 2 ** (-0.6 / 12) / step)
        return float(magnitude[max(low, 1) : int(hertz * 2 ** (0.6 / 12) / step) + 2].max(initial=1e-9))

    base = around(fundamental_hz)
    return [20 * math.log10(around(number * fundamental_hz) / base) for number in numbers]


def has_timbre(audio: Audio, voice: str, *, fundamental_hz: float) -> bool:
    """Whether the levels of the second and third harmonic match the waveform `voice`.

    | Waveform | Amplitude of harmonics relative to the fundamental |
    |---|---|
    | sine | none |
    | square | third 1/3 |
    | saw | second 1/2, third 1/3 |
    | triangle | third 1/9 |
    """
    second, third = harmonic_levels_db(audio, fundamental_hz)
    match voice:
        case "sine":
            return second < -20 and third < -20
        case "square":
            return second < -20 and -16 < third < -4
        case "saw":
            return -12 < second < -1 and -16 < third < -4
        case _:
            return second < -20 and -27 < third < -12


def chroma(audio: Audio) -> npt.NDArray[np.float64]:
    """Returns the strength (12,) of each pitch class (C, C sharp, ...) in the spectral peaks from 60 Hz to 2.2 kHz."""
    mono = _louder_channel(audio)
    mono = mono[: len(mono) // 8 * 7]
    magnitude = np.abs(np.fft.rfft(mono * np.hanning(len(mono)), n=max(len(mono), 32768)))
    hertz = np.arange(len(magnitude)) * SAMPLE_RATE_HZ / max(len(mono), 32768)
    inside = (hertz > 60) & (hertz < 2200)
    peak = (magnitude > np.roll(magnitude, 1)) & (magnitude >= np.roll(magnitude, -1)) & inside
    peak &= magnitude > 0.05 * magnitude[inside].max(initial=1e-9)
    classes = np.rint(12 * np.log2(hertz[peak] / 440) + 69).astype(int) % 12
    return np.asarray(np.bincount(classes, weights=magnitude[peak], minlength=12), np.float64)


def has_chord(audio: Audio, root: int, *, quality: str) -> bool:
    """Whether the triad with this root and quality consists of the three strongest pitch classes."""
    first = (69 + (root - 82) // 2) % 12
    wanted = {(first + step) % 12 for step in _TRIADS[quality]}
    return set(np.argsort(chroma(audio))[-3:].tolist()) == wanted


def chord_mode(audio: Audio, root: int) -> str:
    """Returns "major" if the major third over `root` is stronger than the minor third, else "minor"."""
    first = (69 + (root - 82) // 2) % 12
    strength = chroma(audio)
    return "major" if strength[(first + 4) % 12] > strength[(first + 3) % 12] else "minor"


def onset_strength(audio: Audio) -> npt.NDArray[np.float64]:
    """Returns for each step of 128 samples how much the log level rises, summed over four frequency ranges."""
    mono = _louder_channel(audio)
    blocks = np.lib.stride_tricks.sliding_window_view(np.pad(mono, (512, 512)), 1024)[::_ONSET_HOP]
    power = np.abs(np.fft.rfft(blocks * np.hanning(1024), axis=1)) ** 2
    ranges = np.add.reduceat(power, [1, 6, 24, 120], axis=1)
    level = np.log10(ranges + 1e-4 * ranges.max() + 1e-9)
    rise = np.maximum(level[4:] - level[:-4], 0.0).sum(axis=1)
    return np.asarray(np.concatenate([np.zeros(2), rise, np.zeros(2)]))


def onset_times_s(audio: Audio) -> npt.NDArray[np.float64]:
    """Returns the times of clear onsets, at least 0.12 s apart."""
    strength = onset_strength(audio)
    floor = 0.35 * np.quantile(strength, 0.995)
    gap = round(0.12 * SAMPLE_RATE_HZ / _ONSET_HOP)
    times, last = [], -gap
    for index in np.flatnonzero(strength > max(floor, 0.3)):
        near = strength[max(0, index - gap) : index + gap + 1]
        if strength[index] >= near.max() and index - last >= gap:
            times.append(index * _ONSET_HOP / SAMPLE_RATE_HZ)
            last = int(index)
    return np.array(times)


def has_strict_tempo(audio: Audio, tempo_bpm: float, *, tolerance: float = 0.04) -> bool:
    """Whether there is one onset per beat, judged by the number of onsets and the median time between them."""
    times = onset_times_s(audio)
    if len(times) < 2:
        return False
    found = 60.0 / float(np.median(np.diff(times)))
    expected = audio.shape[1] / SAMPLE_RATE_HZ * tempo_bpm / 60.0
    return abs(found / tempo_bpm - 1) <= tolerance and abs(len(times) - expected) <= 1 + 0.15 * expected


def has_loose_tempo(audio: Audio, tempo_bpm: float, *, tolerance: float = 0.04) -> bool:
    """Whether the onsets repeat at the tempo, half the tempo or twice the tempo."""
    found = onset_rate_bpm(audio)
    return any(abs(found / (tempo_bpm * factor) - 1) <= tolerance for factor in (0.5, 1.0, 2.0))


def onset_rate_bpm(audio: Audio) -> float:
    """Returns the fastest rate at which onsets repeat, from 28 to 400 per minute; 0 if they do not repeat.

    It is the rate at the shortest lag where the autocorrelation has a peak within 20 % of its highest peak.
    """
    spread = np.exp(-0.5 * (np.arange(-24, 25) / 7.0) ** 2)  # blurs onsets by 20 ms
    strength = np.convolve(onset_strength(audio), spread, mode="same")
    strength = strength - strength.mean()
    size = 1 << (2 * len(strength)).bit_length()
    correlation = np.fft.irfft(np.abs(np.fft.rfft(strength, size)) ** 2)[: len(strength)]
    correlation /= np.arange(len(strength), 0, -1)  # mean instead of sum at each lag
    rate = SAMPLE_RATE_HZ / _ONSET_HOP
    low, high = int(rate * 60 / 400), min(int(rate * 60 / 28), len(strength) * 3 // 5)
    if high <= low + 2:
        return 0.0
    inside = correlation[low:high]
    peaks = low + 1 + np.flatnonzero((inside[1:-1] > inside[:-2]) & (inside[1:-1] >= inside[2:]))
    if not len(peaks):
        return 0.0
    tall = peaks[correlation[peaks] >= 0.8 * correlation[peaks].max()]
    return float(60 * rate / tall[0])


def is_noise(audio: Audio, colour: str) -> bool:
    """Whether the audio is noise: no spectral peak dominates, and the slope of the spectrum matches the colour."""
    mono = _louder_channel(audio)
    size = 2048
    blocks = np.lib.stride_tricks.sliding_window_view(mono, size)[:: size // 2] * np.hanning(size)
    power = (np.abs(np.fft.rfft(blocks, axis=1)) ** 2).mean(axis=0)[1:]
    hertz = np.arange(1, len(power) + 1) * SAMPLE_RATE_HZ / size
    smooth = np.convolve(power, np.ones(41) / 41, mode="same")
    if (power[8:-8] / (smooth[8:-8] + 1e-12)).max() > 12:
        return False

    def density(low: float, high: float) -> float:
        return 10 * math.log10(power[(hertz >= low) & (hertz < high)].mean() + 1e-12)

    fall = density(200, 400) - density(3200, 6400)  # dB in 4 octaves
    treble = density(400, 1500) - density(5000, 15000)
    limits = {"white": (-6, 6), "pink": (7, 18), "brown": (18, 60), "wind": (15, 90), "ocean": (-6, 25)}
    if colour == "rain":
        return treble < -6
    low, high = limits[colour]
    return low <= fall <= high


def has_decayed(audio: Audio) -> bool:
    """Whether the level of the last third is at least 20 dB below the level of the loudest 50 ms."""
    block = 2205
    mono = _louder_channel(audio)
    levels = [_rms(mono[i : i + block]) for i in range(0, len(mono) - block + 1, block)]
    return _db(_rms(mono[len(mono) * 2 // 3 :])) < _db(max(levels)) - 20


def is_silent(audio: Audio, *, below_dbfs: float = -50.0) -> bool:
    """Whether the level of the whole clip is below `below_dbfs`."""
    return _db(_rms(audio)) < below_dbfs


def is_panned(audio: Audio, side: str, *, by_db: float = 10.0) -> bool:
    """Whether the channel `side` is at least `by_db` louder than the other."""
    difference = _db(_rms(audio[0])) - _db(_rms(audio[1]))
    return difference >= by_db if side == "left" else difference <= -by_db


def is_faded(audio: Audio, fade: str, *, by_db: float = 8.0) -> bool:
    """Whether the last quarter is at least `by_db` louder (`fade` "in") or quieter ("out") than the first quarter."""
    quarter = audio.shape[1] // 4
    change = _db(_rms(audio[:, -quarter:])) - _db(_rms(audio[:, :quarter]))
    return change >= by_db if fade == "in" else change <= -by_db


def has_swept(audio: Audio, scene: Scene) -> bool:
    """Whether the strongest frequency moves at least half of the octaves from the sweep's start to its target."""
    part = max(audio.shape[1] // 6, 2048)
    first, last = strongest_hz(audio[:, :part]), strongest_hz(audio[:, -part:])
    if first <= 0 or last <= 0:
        return False
    wanted = (scene.target - scene.pitch) / 24.0
    return math.log2(last / first) / wanted >= 0.5


_CHECKS: dict[str, Callable[[Audio, Scene], bool]] = {
    "tone": lambda audio, scene: has_pitch(audio, float(OSCILLATOR_HZ[scene.pitch])),
    "chord": lambda audio, scene: has_chord(audio, scene.pitch, quality=scene.quality),
    "arpeggio": lambda audio, scene: has_loose_tempo(audio, scene.tempo_bpm),
    "sweep": has_swept,
    "beat": lambda audio, scene: (
        has_strict_tempo(_audible(audio, scene), scene.tempo_bpm)
        if scene.voice in ("metronome", "kick")
        else has_loose_tempo(audio, scene.tempo_bpm)
    ),
    "hit": lambda audio, scene: has_decayed(audio),
    "noise": lambda audio, scene: is_noise(audio, scene.voice),
    "silence": lambda audio, scene: is_silent(audio),
    "hush": lambda audio, scene: is_silent(audio, below_dbfs=-26.0),
}


def _audible(audio: Audio, scene: Scene) -> Audio:
    """Returns the louder 60 % of a clip with a fade, and any other clip unchanged.

    The quietest beats of a fade are at -40 dB. Onset detection misses such beats even in perfect audio.
    """
    part = audio.shape[1] * 3 // 5
    return {"in": audio[:, -part:], "out": audio[:, :part]}.get(scene.fade, audio)


def _louder_channel(audio: Audio) -> npt.NDArray[np.float32]:
    """Returns the louder channel. A mix to mono would weaken panned sounds and cancel opposite phases."""
    return np.asarray(audio[int(_rms(audio[1]) > _rms(audio[0]))])


def _rms(audio: npt.NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(np.square(audio, dtype=np.float64)))) if audio.size else 0.0


def _db(level: float) -> float:
    return 20 * math.log10(max(level, 1e-7))
