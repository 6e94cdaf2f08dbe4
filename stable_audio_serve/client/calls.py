"""What the server is asked, as values: each function returns the HTTP call of one operation. Sends nothing."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from stable_audio_serve.client.answers import Clip

# Source audio: a file's path or its bytes, an opened file, or a clip that was generated before.
Audio = bytes | str | Path | BinaryIO | Clip
Recipe = Mapping[str, Any]  # of a take, as the server tells it
Regions = Sequence[tuple[float, float]]  # [start, end) in seconds


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request. Sending any of them twice does no harm: submissions carry a key that makes them one job."""

    method: str
    path: str
    params: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    json: Mapping[str, Any] | None = None
    form: Mapping[str, str] | None = None
    files: Sequence[tuple[str, tuple[str, bytes]]] | None = None


def generate(prompt: str, controls: Mapping[str, Any]) -> Call:
    """Text to audio."""
    return Call("POST", "/v1/audio/generations", json=_body(prompt, controls))


def vary(audio: Audio, prompt: str, *, controls: Mapping[str, Any]) -> Call:
    """Audio to audio. Raises OSError if the file cannot be read."""
    return _upload("/v1/audio/variations", audio, fields=_body(prompt, controls))


def inpaint(audio: Audio, prompt: str, *, regions: Regions, controls: Mapping[str, Any]) -> Call:
    """Regenerate regions of the source, and what lies behind its end. Raises OSError."""
    return _upload("/v1/audio/inpaint", audio, fields=_body(prompt, controls) | _times(regions))


def loop(prompt: str, *, audio: Audio | None, controls: Mapping[str, Any]) -> Call:
    """A loop of whole bars at the tempo that the prompt names. Raises OSError."""
    fields = _body(prompt, controls)
    if audio is None:
        return Call("POST", "/saos/generate/loop", json=fields)
    return _upload("/saos/generate/loop", audio, fields=fields, name="audio_file")


def replay(take: Audio | Recipe, *, sources: Sequence[Audio]) -> Call:
    """A take again, by its recipe or by its file, which carries one. Raises OSError."""
    files = [("audio", _read(source)) for source in sources]
    if not isinstance(take, Mapping):
        return Call("POST", "/v1/audio/replay", files=[("file", _read(take)), *files])
    if not files:
        return Call("POST", "/v1/audio/replay", json=take)
    recipe = ("recipe.json", json.dumps(take).encode())  # as a file: fields of forms have at most 512 KiB
    return Call("POST", "/v1/audio/replay", files=[("recipe", recipe), *files])


def submit(prompt: str, controls: Mapping[str, Any], *, key: str | None) -> Call:
    """Text to audio, later."""
    return Call("POST", "/jobs", headers=_idempotency(key), json=_body(prompt, controls))


def submit_variation(audio: Audio, prompt: str, *, controls: Mapping[str, Any], key: str | None) -> Call:
    """Audio to audio, later. Raises OSError."""
    return _upload("/jobs/variations", audio, fields=_body(prompt, controls), headers=_idempotency(key))


def submit_inpaint(
    audio: Audio, prompt: str, *, regions: Regions, controls: Mapping[str, Any], key: str | None
) -> Call:
    """Regenerate regions of the source, later. Raises OSError."""
    fields = _body(prompt, controls) | _times(regions)
    return _upload("/jobs/inpaint", audio, fields=fields, headers=_idempotency(key))


def show_job(job_id: str) -> Call:
    """One job."""
    return Call("GET", job_path(job_id))


def cancel_job(job_id: str) -> Call:
    """Cancel a job."""
    return Call("DELETE", job_path(job_id))


def list_jobs(*, status: str | None, limit: int, cursor: str | None) -> Call:
    """A page of the caller's jobs."""
    params = {"status": status, "limit": str(limit), "cursor": cursor}
    return Call("GET", "/jobs", params={name: value for name, value in params.items() if value is not None})


def models() -> Call:
    """The served models."""
    return Call("GET", "/v1/models")


def job_path(job_id: str, *below: str) -> str:
    """Returns the path of a job, or of something below it. Raises ValueError for what is no id."""
    return "/".join(("/jobs", str(uuid.UUID(hex=job_id).hex), *below))


def _body(prompt: str, controls: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": prompt} | {name: value for name, value in controls.items() if value is not None}


def _times(regions: Regions) -> dict[str, Any]:
    return {
        "inpaint_start_seconds": [start_s for start_s, _ in regions],
        "inpaint_end_seconds": [end_s for _, end_s in regions],
    }


def _upload(
    path: str,
    audio: Audio,
    *,
    fields: Mapping[str, Any],
    headers: Mapping[str, str] | None = None,
    name: str = "audio",
) -> Call:
    form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    return Call("POST", path, headers=headers or {}, form=form, files=[(name, _read(audio))])


def _read(audio: Audio) -> tuple[str, bytes]:
    """Returns the name and content of source audio."""
    match audio:
        case bytes():
            return "audio", audio
        case Clip():
            return audio.file_name, audio.content
        case str() | Path():
            return Path(audio).name, Path(audio).read_bytes()
    return "audio", audio.read()


def _idempotency(key: str | None) -> dict[str, str]:
    """Returns the header that makes sending a submission again find the job of the first time."""
    return {"Idempotency-Key": key or uuid.uuid4().hex}
