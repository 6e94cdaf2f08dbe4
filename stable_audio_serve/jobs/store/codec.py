"""Convert the dataclasses of jobs to JSON text and back.

Older and newer versions of this package may share a database. Therefore reading ignores unknown keys, and uses defaults
for missing keys.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

import pydantic_core
from pydantic import BaseModel, TypeAdapter, create_model

from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.jobs.job import FinishedSection, JobError, JobResult, JobSpec
from stable_audio_serve.jobs.store.tables import storable

T = TypeVar("T")


def _model_of(kind: type, *, without: frozenset[str] = frozenset(), **replaced: Any) -> type[BaseModel]:
    """Return a Pydantic model with the fields of the dataclass `kind`, to check and convert JSON that is read.

    Fields in `without` are left out. `replaced` has the types of fields whose type differs from the dataclass.
    """
    hints = get_type_hints(kind) | replaced
    definitions: dict[str, Any] = {}
    for item in fields(kind):
        if item.name not in without:
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            definitions[item.name] = (hints[item.name], ... if default is MISSING else default)
    return create_model(f"Stored{kind.__name__}", **definitions)


# A job's source audio is not in this JSON: it is a file in the artifact store, which the runner decodes.
_Request = _model_of(GenerationRequest, without=frozenset({"init_audio", "inpaint_audio"}))
_Spec = _model_of(JobSpec, request=_Request)
_ADAPTERS: dict[type, TypeAdapter[Any]] = {
    kind: TypeAdapter(kind) for kind in (JobResult, JobError, StoredFile, FinishedSection)
}


def dump(value: JobSpec | JobResult | JobError | StoredFile | FinishedSection) -> str:
    """Return `value` as JSON text. U+FFFD replaces lone surrogates, which UTF-8 cannot encode."""
    try:
        return pydantic_core.to_json(value).decode()
    except pydantic_core.PydanticSerializationError:
        return storable(json.dumps(value, default=_to_plain, ensure_ascii=False))


def _to_plain(value: Any) -> dict[str, Any]:
    if is_dataclass(value):
        return {item.name: getattr(value, item.name) for item in fields(value)}
    return dict(value)


def load_spec(text: str) -> JobSpec:
    """Parse the JSON text of a job's specification. Raises ValueError."""
    spec = dict(_Spec.model_validate_json(text))
    return JobSpec(**spec | {"request": GenerationRequest(**dict(spec["request"]))})


def load(kind: type[T], text: str) -> T:
    """Parse the JSON text of a result, an error, a stored file or a finished section. Raises ValueError."""
    value: T = _ADAPTERS[kind].validate_json(text)
    return value
