"""File names in HTTP headers."""

from __future__ import annotations


def content_disposition(file_name: str) -> str:
    """Return the Content-Disposition value of a download. Other characters than printable ASCII become underscores."""
    plain = "".join(char if char.isascii() and char.isprintable() and char not in '"\\' else "_" for char in file_name)
    return f'attachment; filename="{plain}"'
