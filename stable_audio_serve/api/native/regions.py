"""Parse the regions in inpaint forms. Starts and ends are a number or a list, and each field has an alias."""

from __future__ import annotations

import math
from typing import Any

import pydantic_core

from stable_audio_serve.core.errors import InvalidRequestError

_START, _END = "inpaint_start_seconds", "inpaint_end_seconds"
_MAX_REGIONS = 100

Times = float | list[float]


def parse_regions(values: dict[str, str | None], *, duration_s: float) -> tuple[tuple[float, float], ...]:
    """Return the regions [start, end) in seconds from the four form fields. Raises InvalidRequestError."""
    starts = _parse(values, _START, alias="inpaint_mask_start_seconds")
    ends = _parse(values, _END, alias="inpaint_mask_end_seconds")
    if isinstance(starts, list) != isinstance(ends, list):
        raise _error(_START, f"and {_END} must both be numbers or both be lists")
    starts, ends = _as_list(starts), _as_list(ends)
    if len(starts) != len(ends):
        raise _error(_START, f"and {_END} must have the same length, not {len(starts)} and {len(ends)}")
    for start, end in zip(starts, ends, strict=True):
        if start >= end:
            raise _error(_START, f"must be before {_END}, but {start} >= {end}")
        if end > duration_s:
            raise _error(_END, f"must not exceed the duration, but {end} > {duration_s}")
    return tuple(zip(starts, ends, strict=True))


def _parse(values: dict[str, str | None], name: str, *, alias: str) -> Times:
    if values[name] is not None and values[alias] is not None:
        raise _error(name, f"and {alias} mean the same: set only one of them")
    text = (values[name] if values[alias] is None else values[alias]) or ""
    text = text.strip()
    if not text:
        raise _error(name, "is required")
    if text.startswith("["):
        return _check_list(name, _parse_json_list(name, text))
    if "," in text:
        return _check_list(name, text.removesuffix(",").split(","))
    return _check(name, text)


def _parse_json_list(name: str, text: str) -> list[Any]:
    try:
        items: list[Any] = pydantic_core.from_json(text)
    except ValueError as error:
        raise _error(name, "is not a JSON list of numbers") from error
    return items


def _check_list(name: str, items: list[Any]) -> list[float]:
    if not items:
        raise _error(name, "must not be an empty list")
    if len(items) > _MAX_REGIONS:
        raise _error(name, f"must not have more than {_MAX_REGIONS} entries")
    return [_check(name, item) for item in items]


def _check(name: str, item: Any) -> float:
    try:
        number = math.nan if isinstance(item, bool | None) or "_" in str(item) else float(item)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise _error(name, f"must be a number of seconds, not {str(item)[:50]!r}")
    if number < 0:
        raise _error(name, "must not be negative")
    return number


def _as_list(times: Times) -> list[float]:
    return times if isinstance(times, list) else [times]


def _error(field: str, message: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field} {message}", field=field)
