"""File names in HTTP headers."""

from __future__ import annotations


def content_disposition(file_name: str) -> str:
    """Returns the header that names a download. Names may come from clients, so only printable ASCII is kept."""
    plain = "".join(char if char.isascii() and char.isprintable() and char not in '"\\' else "_" for char in file_name)
    return f'attachment; filename="{plain}"'
