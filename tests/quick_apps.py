"""Makes building an application three times as fast, for tests that build hundreds: FastAPI prepares the model of every
documented answer of every route anew, although it prepares the same ones each time.
"""

from __future__ import annotations

import copy
from typing import Any

from fastapi import routing

_create = routing.create_model_field
_made: dict[tuple[Any, str], Any] = {}


def _create_once(name: str, type_: Any, *, mode: str = "validation", **others: Any) -> Any:
    """One for every type and mode, each time under the name that is asked for."""
    if others:
        return _create(name=name, type_=type_, mode=mode, **others)
    if (key := (type_, mode)) not in _made:
        _made[key] = _create(name=name, type_=type_, mode=mode)
    field = copy.copy(_made[key])
    field.name = name
    return field


def build_quickly() -> None:
    """For the rest of this process."""
    routing.create_model_field = _create_once
