"""What stands in the headers of the server's answers."""

from __future__ import annotations

import json
import re
from email.message import Message
from pathlib import Path
from typing import Any

_WARNING = re.compile(r'299 \S+ "((?:[^"\\]|\\.)*)"')


def read_values(header: str) -> list[Any]:
    """Returns JSON values that stand in a header with commas between them."""
    return json.loads(f"[{header}]")


def read_recipes(header: str) -> list[Any]:
    """Returns the recipes of a header; None for one that lacks a long prompt and cannot be replayed."""
    return [None if "left_out" in recipe else recipe for recipe in read_values(header)]


def read_warnings(header: str) -> tuple[str, ...]:
    """Returns the sentences of a `Warning` header, `299 - "sentence"` with commas between several."""
    return tuple(re.sub(r"\\(.)", r"\1", text) for text in _WARNING.findall(header))


def read_timings(header: str) -> dict[str, float]:
    """Returns the milliseconds of each stage that a `Server-Timing` header names."""
    stages = (entry.strip().partition(";dur=") for entry in header.split(","))
    return {name: float(duration_ms) for name, _, duration_ms in stages}


def read_file_name(disposition: str) -> str:
    """Returns the last part of the name that a Content-Disposition header gives: never a folder of this machine."""
    message = Message()
    message["content-disposition"] = disposition
    return Path(message.get_filename("audio")).name
