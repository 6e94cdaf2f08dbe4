"""File names in HTTP headers."""

from __future__ import annotations


def content_disposition(file_name: str) -> str:
    """Return the value of the Content-Disposition header for a download that is saved as `file_name`.

    Underscores replace quotes, backslashes and all characters that are not printable ASCII.
    """
    plain = "".join(char if char.isascii() and char.isprintable() and char not in '"\\' else "_" for char in file_name)
    return f'attachment; filename="{plain}"'
