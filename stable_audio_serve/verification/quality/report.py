"""Quality reports and records of last good weights: their values, JSON form and ids.

Files from the store are not trusted, so every field is validated.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from stable_audio_serve.core.errors import QualityReportError
from stable_audio_serve.verification.quality.requests import VERSION
from stable_audio_serve.verification.quality.sound import Clip

MAX_BYTES = 4 * 2**20  # larger reports are not read; a clip has about 45 kB
MOST_CLIPS = 64

_CHECKS = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Name = Annotated[str, Field(min_length=1, max_length=200)]


@dataclass(frozen=True, slots=True)
class Source:
    """Where weights come from: a folder, or a commit of a repository."""

    __pydantic_config__ = _CHECKS

    folder: Annotated[str, Field(pattern=r"^/[^\x00]*$", max_length=4096)] | None = None
    repo_id: _Name | None = None
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None

    def __str__(self) -> str:
        return self.folder or f"{self.repo_id} at {self.commit}"


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything that determines the audio of a golden request, except for the machine. Each setup has its own report.

    `weights` is the hash from `models.weight_hash`, `device` is cuda, cpu or mps, `dtype` is the denoiser's precision.
    """

    __pydantic_config__ = _CHECKS

    model: _Name
    weights: _Hash
    device: _Name
    dtype: _Name
    decode_precision: _Name

    @property
    def report_id(self) -> str:
        """The name of the setup's report, in the store and in the setting that pins a report: 32 hexadecimal digits."""
        return _digest({"version": VERSION, **asdict(self)})


@dataclass(frozen=True, slots=True)
class Report:
    """The descriptions of golden clips, by name of the request, from a model that passed with this setup."""

    setup: Setup
    source: Source
    made_at: float  # Unix time, seconds
    clips: Mapping[str, Clip]


@dataclass(frozen=True, slots=True)
class LastGood:
    """The weights with which a model last passed, and their source."""

    model: str
    weights: str
    source: Source


def last_good_id(model: str) -> str:
    """Return the name of a model's `LastGood` in the store, 32 hexadecimal digits."""
    return _digest({"last_good": model})


def dump_report(report: Report) -> bytes:
    """Return a report as JSON."""
    clips = {name: _dump_clip(clip) for name, clip in report.clips.items()}
    return json.dumps(
        {
            "kind": "report",
            "version": VERSION,
            "setup": asdict(report.setup),
            "source": asdict(report.source),
            "made_at": report.made_at,
            "clips": clips,
        }
    ).encode()


def parse_report(text: bytes, *, name: str) -> Report:
    """Return the report in `text`. Raises QualityReportError that mentions `name` if `text` is not a valid report."""
    wire = _parse(_WireReport, text, name=name)
    clips = {key: _parse_clip(clip, name=f"{name}: clip {key[:40]!r}") for key, clip in wire.clips.items()}
    return Report(wire.setup, wire.source, wire.made_at, clips)


def dump_last_good(good: LastGood) -> bytes:
    """Return a record of last good weights as JSON."""
    return json.dumps({"kind": "last good", "version": VERSION, **asdict(good)}).encode()


def parse_last_good(text: bytes, *, name: str) -> LastGood:
    """Parse the output of `dump_last_good`. Raises QualityReportError that mentions `name` if `text` is invalid."""
    wire = _parse(_WireLastGood, text, name=name)
    return LastGood(wire.model, wire.weights, wire.source)


class _Wire(BaseModel):
    model_config = _CHECKS


_Size = Annotated[int, Field(ge=1, le=2**24)]


class _WireClip(_Wire):
    num_samples: _Size
    level_db: float
    shape: Annotated[list[_Size], Field(min_length=3, max_length=3)]
    spectrum: str


def _bounded(clips: dict[str, _WireClip]) -> dict[str, _WireClip]:
    if not 1 <= len(clips) <= MOST_CLIPS:
        raise ValueError(f"must be 1 to {MOST_CLIPS} clips")
    return clips


class _WireReport(_Wire):
    kind: Annotated[str, Field(pattern="^report$")]
    version: int
    setup: Setup
    source: Source
    made_at: Annotated[float, Field(ge=0, le=4e9)]
    clips: Annotated[dict[str, _WireClip], AfterValidator(_bounded)]


class _WireLastGood(_Wire):
    kind: Annotated[str, Field(pattern="^last good$")]
    version: int
    model: _Name
    weights: _Hash
    source: Source


_Parsed = TypeVar("_Parsed", _WireReport, _WireLastGood)


def _parse(wire: type[_Parsed], text: bytes, *, name: str) -> _Parsed:
    try:
        parsed = wire.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:40] for part in first["loc"][:6]) or "the file"
        raise QualityReportError(f"{name} cannot be used: {where}: {first['msg'][:200]}") from None
    if parsed.version != VERSION:
        raise QualityReportError(f"{name} cannot be used: it has version {parsed.version}, this server makes {VERSION}")
    return parsed


def _dump_clip(clip: Clip) -> dict[str, Any]:
    spectrum = np.ascontiguousarray(clip.spectrum, dtype="<f2")
    return {
        "num_samples": clip.num_samples,
        "level_db": clip.level_db,
        "shape": list(spectrum.shape),
        "spectrum": base64.b64encode(spectrum.tobytes()).decode(),
    }


def _parse_clip(wire: _WireClip, *, name: str) -> Clip:
    try:
        data = base64.b64decode(wire.spectrum, validate=True)
    except ValueError:
        raise QualityReportError(f"{name} cannot be used: its spectrum is not base64") from None
    if len(data) != 2 * math.prod(wire.shape):
        raise QualityReportError(f"{name} cannot be used: its spectrum has {len(data)} bytes, not those of its shape")
    spectrum = np.frombuffer(data, dtype="<f2").reshape(wire.shape)
    if not np.isfinite(spectrum).all():
        raise QualityReportError(f"{name} cannot be used: its spectrum has values that are not finite")
    return Clip(wire.num_samples, wire.level_db, spectrum)


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
