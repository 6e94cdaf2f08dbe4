"""Caches that make it faster to build FastAPI applications, for tests that build hundreds of them.

Without the caches, FastAPI reads the signature of each handler and prepares the models of its parameters and responses
again for each application.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from types import CodeType, FunctionType
from typing import Any

from fastapi import routing
from fastapi.dependencies.models import Dependant
from fastapi.params import Depends

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


_populate = routing._populate_api_route_state
# The attributes that a route can share with the same route of another application.
_SHARED = routing._APIRouteLike.__annotations__.keys() - {"endpoint", "dependency_overrides_provider", "dependant"}
_prepared: dict[tuple[str, CodeType], list[tuple[dict[str, Any], dict[str, Any], Dependant]]] = {}


def _populate_once(
    route: Any, path: str, endpoint: Callable[..., Any], *, dependency_overrides_provider: Any = None, **options: Any
) -> None:
    """Replaces FastAPI's `_populate_api_route_state`.

    Copies the attributes of an earlier route with the same options whose handler has the same code and default values.
    """
    if not isinstance(endpoint, FunctionType) or hasattr(endpoint, "__signature__"):
        _populate(route, path, endpoint, dependency_overrides_provider=dependency_overrides_provider, **options)
        return
    known = _prepared.setdefault((path, endpoint.__code__), [])
    compared = {**options, "defaults": _comparable(endpoint)}
    for others, attributes, dependant in known:
        if others == compared:
            vars(route).update(attributes)
            route.endpoint, route.dependency_overrides_provider = endpoint, dependency_overrides_provider
            route.dependant = _with_call(dependant, endpoint)
            return
    _populate(route, path, endpoint, dependency_overrides_provider=dependency_overrides_provider, **options)
    known.append((compared, {name: getattr(route, name) for name in _SHARED}, replace(route.dependant)))


def _defaults(function: Any) -> dict[str, Any]:
    """Return the default values of the function's parameters, by name."""
    if not isinstance(function, FunctionType):
        return {}
    code, values = function.__code__, function.__defaults__ or ()
    positional = code.co_varnames[code.co_argcount - len(values) : code.co_argcount]
    return {**dict(zip(positional, values, strict=True)), **(function.__kwdefaults__ or {})}


def _comparable(function: Any) -> Any:
    """Return a value that is equal for functions with the same code and default values.

    In each application, a default value may be another function with the same code, on which the handler depends.
    """
    defaults = {
        name: _comparable(value.dependency) if isinstance(value, Depends) else value
        for name, value in _defaults(function).items()
    }
    return getattr(function, "__code__", function), defaults


def _with_call(dependant: Dependant, call: Any) -> Dependant:
    """Return `dependant` for the function `call`, which is comparable to the function of `dependant`."""
    defaults = _defaults(call)
    dependencies = [
        _with_call(inner, defaults[inner.name].dependency) if inner.name in defaults else inner
        for inner in dependant.dependencies
    ]
    return replace(dependant, call=call, dependencies=dependencies)


def build_quickly() -> None:
    """Enable the caches for the rest of this process."""
    routing.create_model_field = _create_once
    routing._populate_api_route_state = _populate_once
