"""Files that are there whole or not at all."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file to write: what it is written gets its name only at the end without an error. Raises OSError."""
    temporary = path.parent / f".{path.name[:40]}.{secrets.token_hex(8)}"
    try:
        # Not by `tempfile`, whose files are the owner's alone: to give them a new file's rights the umask would have to
        # be read, which cannot be done without setting it, for all threads.
        with temporary.open("xb") as file:
            yield file
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
