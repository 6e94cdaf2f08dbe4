"""Limit the number of values in a client's JSON, because Pydantic blocks the event loop while it checks them."""

from __future__ import annotations

import re

MAX_MARKS = 10_000  # a job with 1000 sections has 3000
_MARKS = (b"[", b"{", b",")
# A string, up to its closing quotation mark or the end of the text. Possessive, so that the time stays linear.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)


def has_more_marks(text: bytes, most: int = MAX_MARKS, *, counts_strings: bool = False) -> bool:
    """Return whether JSON has more than `most` lists, objects and commas. Those in strings only count on request."""
    return _count(text) > most and (counts_strings or _count(_STRING.sub(b"", text)) > most)


def _count(text: bytes) -> int:
    return sum(map(text.count, _MARKS))
