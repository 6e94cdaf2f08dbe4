"""File names as they may stand in headers."""

from __future__ import annotations


def content_disposition(file_name: str) -> str:
    """The value that names a download. Names may hold what clients sent: only plain ASCII reaches the header."""
    plain = "".join(char if char.isascii() and char.isprintable() and char not in '"\\' else "_" for char in file_name)
    return f'attachment; filename="{plain}"'
