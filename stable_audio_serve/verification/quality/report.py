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
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, TypeAdapter, ValidationError

from stable_audio_serve.core.errors import QualityReportError
from stable_audio_serve.verification.quality.requests import VERSION
from stable_audio_serve.verification.quality.sound import Clip

MAX_BYTES = 4 * 2**20  # larger reports are not read; a clip has about 45 kB
MOST_CLIPS = 64

_CHECKS = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Name = Annotated[str, Field(min_length=1, max_length=200)]
_Size = Annotated[int, Field(ge=1, le=2**24)]


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


class _StoredClip(BaseModel):
    model_config = _CHECKS

    num_samples: _Size
    level_db: float
    shape: Annotated[list[_Size], Field(min_length=3, max_length=3)]
    spectrum: str


def _read_clip(value: object) -> Clip:
    """Return the clip of a `_StoredClip` in JSON. Raises ValueError."""
    stored = _StoredClip.model_validate(value)
    data = base64.b64decode(stored.spectrum, validate=True)
    if len(data) != 2 * math.prod(stored.shape):
        raise ValueError(f"its spectrum has {len(data)} bytes, not those of its shape")
    spectrum = np.frombuffer(data, dtype="<f2").reshape(stored.shape)
    if not np.isfinite(spectrum).all():
        raise ValueError("its spectrum has values that are not finite")
    return Clip(stored.num_samples, stored.level_db, spectrum)


def _write_clip(clip: Clip) -> dict[str, Any]:
    spectrum = np.ascontiguousarray(clip.spectrum, dtype="<f2")
    return {
        "num_samples": clip.num_samples,
        "level_db": clip.level_db,
        "shape": list(spectrum.shape),
        "spectrum": base64.b64encode(spectrum.tobytes()).decode(),
    }


_Clips = Mapping[str, Annotated[Clip, PlainValidator(_read_clip), PlainSerializer(_write_clip)]]


@dataclass(frozen=True, slots=True)
class Report:
    """The descriptions of golden clips, by name of the request, from a model that passed with this setup."""

    __pydantic_config__ = _CHECKS

    setup: Setup
    source: Source
    made_at: Annotated[float, Field(ge=0, le=4e9)]  # Unix time, seconds
    clips: Annotated[_Clips, Field(min_length=1, max_length=MOST_CLIPS)]
    kind: Literal["report"]
    version: int  # no default, because a file must state it


@dataclass(frozen=True, slots=True)
class LastGood:
    """The weights with which a model last passed, and their source."""

    __pydantic_config__ = _CHECKS

    model: _Name
    weights: _Hash
    source: Source
    kind: Literal["last good"]
    version: int


def last_good_id(model: str) -> str:
    """Return the name of a model's `LastGood` in the store, 32 hexadecimal digits."""
    return _digest({"last_good": model})


_Stored = TypeVar("_Stored", Report, LastGood)


def dump(value: Report | LastGood) -> bytes:
    """Return a report or a record of last good weights as JSON."""
    return TypeAdapter(type(value)).dump_json(value)


def find_kind(text: bytes) -> type[Report] | type[LastGood]:
    """Return the type of the value from which `dump` made `text`, and Report for any other text."""
    try:
        return LastGood if json.loads(text)["kind"] == "last good" else Report
    except (ValueError, KeyError, TypeError):
        return Report


def parse(kind: type[_Stored], text: bytes, *, name: str) -> _Stored:
    """Parse the output of `dump`. Raises QualityReportError that mentions `name` if `text` is invalid."""
    try:
        parsed = TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:40] for part in first["loc"][:6]) or "the file"
        raise QualityReportError(f"{name} cannot be used: {where}: {first['msg'][:200]}") from None
    if parsed.version != VERSION:
        raise QualityReportError(f"{name} cannot be used: it has version {parsed.version}, this server makes {VERSION}")
    return parsed


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
