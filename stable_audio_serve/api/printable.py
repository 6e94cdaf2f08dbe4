"""Shorten a client's input for error responses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def printable_fault(fault: Mapping[str, Any], *, message: str) -> dict[str, Any]:
    """Return one entry of FastAPI's list of invalid fields as JSON values."""
    return {
        "type": fault["type"],
        "loc": [printable(part) for part in fault["loc"]],
        "msg": printable(message),
        "input": printable(fault.get("input")),
    }


def printable(value: Any, depth: int = 3) -> Any:
    """Return `value` as JSON values, shortened to a readable size. Values nested deeper than `depth` are replaced."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**64 else "a very large integer"
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bytes):
        value = value[:500].decode("utf-8", "replace")
    if isinstance(value, str):
        return value[:500].encode("utf-8", "replace").decode()
    if isinstance(value, Mapping) and depth:
        return {printable(str(key)): printable(item, depth - 1) for key, item in list(value.items())[:50]}
    if isinstance(value, list | tuple) and depth:
        return [printable(item, depth - 1) for item in value[:50]]
    return type(value).__name__
