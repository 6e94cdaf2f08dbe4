"""What a client sent, made fit to be shown in an error answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def printable(value: Any, depth: int = 3) -> Any:
    """`value` cut down to what JSON can hold and a reader can use."""
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
