"""Caches that make it faster to build FastAPI applications, for tests that build hundreds of them.

Without the caches, FastAPI prepares the models of all responses and parameters again for each application, and reads
the signature of each handler twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastapi import routing
from fastapi._compat import v2
from fastapi.dependencies.models import Dependant
from fastapi.utils import get_path_param_names
from pydantic import ConfigDict, TypeAdapter

_create = routing.create_model_field
_made: dict[tuple[Any, str], Any] = {}


def _create_once(name: str, type_: Any, *, mode: str = "validation", **others: Any) -> Any:
    """Replaces FastAPI's `create_model_field`. Creates one field for each type and mode, and returns a named copy."""
    if others:
        return _create(name=name, type_=type_, mode=mode, **others)
    if (key := (type_, mode)) not in _made:
        _made[key] = _create(name=name, type_=type_, mode=mode)
    field = copy.copy(_made[key])
    field.name = name
    return field


_adapters: dict[tuple[Any, str, str], TypeAdapter[Any]] = {}


def _adapt_once(annotated: Any, *, config: ConfigDict | None = None) -> TypeAdapter[Any]:
    """Replaces pydantic's `TypeAdapter`. Creates only one adapter for each type with the same annotations.

    The key contains the addresses of functions in the annotations. The addresses stay unique, because the cached
    adapter keeps the functions alive.
    """
    key = (annotated.__origin__, repr(annotated.__metadata__), repr(config))
    if key not in _adapters:
        _adapters[key] = TypeAdapter(annotated, config=config)
    return _adapters[key]


_get_dependant = routing.get_dependant
_dependants: dict[tuple[Any, frozenset[str], str], Dependant] = {}


def _read_once(*, path: str, call: Callable[..., Any], **options: Any) -> Dependant:
    """Replaces FastAPI's `get_dependant`. Reads a handler's signature only once. A full cache is emptied."""
    key = (call, frozenset(get_path_param_names(path)), repr(options))
    if key not in _dependants:
        if len(_dependants) > 200:
            _dependants.clear()
        _dependants[key] = _get_dependant(path=path, call=call, **options)
    found = _dependants[key]
    return replace(found, path=path, dependencies=list(found.dependencies))


def build_quickly() -> None:
    """Enable the caches for the rest of this process."""
    v2.TypeAdapter = _adapt_once
    routing.get_dependant = _read_once
    routing.create_model_field = _create_once
