"""The operator's riff library: read its folder, choose a riff for a request, and stretch the riff to a tempo."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from stable_audio_serve.api.compat.stable_audio_open_small.errors import NoRiffsError
from stable_audio_serve.api.service import Service
from stable_audio_serve.audio.stretch import time_stretch
from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.generation import SourceAudio

log = structlog.get_logger("stable_audio_serve.api")

_NAME = re.compile(r"([a-g](?:sharp)?)_([0-9]{1,6})_?bpm(?:_[0-9]+)?\.wav", re.IGNORECASE)
_STARTER_FOLDER = Path(__file__).parent / "starter_riffs"  # created by `examples/demo_model/riffs.py`
_USED_S = 12.0
_MAX_STRETCH = 16.0  # a riff that is stretched by a larger factor is not recognizable
_MARGIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Riff:
    """One file of the library."""

    path: Path
    key: str
    tempo_bpm: int

    def describe(self) -> dict[str, Any]:
        return {
            "filename": self.path.name,
            "original_bpm": self.tempo_bpm,
            "description": f"{self.key} riff at {self.tempo_bpm} BPM",
        }


def find_folder(chosen: str | None) -> Path:
    """Return the folder `chosen`. By default, return the folder `riffs` if it exists, otherwise the packaged riffs."""
    own = Path(chosen or "riffs")
    return own if chosen or own.is_dir() else _STARTER_FOLDER


class RiffLibrary:
    """The riffs (short WAV files) in one folder, sorted by musical key, then tempo. The folder is listed only once."""

    def __init__(self, folder: Path) -> None:
        """List the folder. Files that are not named like gsharp_80bpm_4.wav are skipped with a warning."""
        riffs = sorted(_scan(folder), key=lambda riff: (riff.key, riff.tempo_bpm, riff.path.name))
        self._riffs: dict[str, list[Riff]] = {}
        for riff in riffs:
            self._riffs.setdefault(riff.key, []).append(riff)

    def choose(self, key: str, *, seed: int) -> Riff:
        """Return a riff in a musical key; case does not matter. Successive seeds select successive riffs.

        Raises NoRiffsError.
        """
        riffs = self._riffs.get(key.lower())
        if not riffs:
            raise NoRiffsError(f"No riffs available for key '{key[:50]}'", available_keys=list(self._riffs))
        return riffs[seed % len(riffs)]

    def describe(self) -> dict[str, Any]:
        return {
            "available_keys": list(self._riffs),
            "total_keys": len(self._riffs),
            "riff_details": {key: [riff.describe() for riff in riffs] for key, riffs in self._riffs.items()},
        }


async def read_riff(service: Service, riff: Riff, *, tempo_bpm: int) -> SourceAudio:
    """Return the first 12 seconds of a riff in mono, stretched to a tempo at the same pitch.

    Raises InvalidRequestError if the tempos differ too much, GenerationError if the file cannot be read.
    """
    speed = tempo_bpm / riff.tempo_bpm
    if not 1 / _MAX_STRETCH <= speed <= _MAX_STRETCH:
        slowest, fastest = riff.tempo_bpm / _MAX_STRETCH, riff.tempo_bpm * _MAX_STRETCH
        message = f"prompt: a riff of {riff.tempo_bpm}bpm can be played at {slowest:g} to {fastest:g}bpm"
        raise InvalidRequestError(f"{message}, not {tempo_bpm}", field="prompt")
    audio = await service.decode_path(riff.path, max_s=_USED_S * speed + _MARGIN_S)
    return await service.compute(lambda: _stretch(audio.to_mono(), speed))


def _stretch(audio: SourceAudio, speed: float) -> SourceAudio:
    samples = time_stretch(audio.samples, audio.sample_rate_hz, speed=speed)
    return SourceAudio(samples[:, : int(_USED_S * audio.sample_rate_hz)], audio.sample_rate_hz)


def _scan(folder: Path) -> list[Riff]:
    try:
        files = [path for path in folder.iterdir() if path.suffix.casefold() == ".wav" and path.is_file()]
    except FileNotFoundError:
        return []
    except OSError as error:
        log.warning("riff_dir cannot be read", folder=str(folder), error=str(error))
        return []
    riffs = []
    for path in files:
        name = _NAME.fullmatch(path.name)
        if name and int(name[2]):
            riffs.append(Riff(path, name[1].lower(), int(name[2])))
        else:
            log.warning("riff skipped; rename it in the form gsharp_80bpm_4.wav", file=path.name)
    return riffs
