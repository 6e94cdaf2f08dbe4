"""Verifies stored files while they are read, so that a damaged file never arrives complete."""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from contextlib import closing

import structlog

from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.core.errors import DamagedFileError
from stable_audio_serve.core.metrics import Metrics

log = structlog.get_logger("stable_audio_serve.artifacts")


def verified(file: StoredFile, chunks: Generator[bytes], *, metrics: Metrics) -> Generator[bytes]:
    """Yields `chunks`. Yields the last one only if the whole matches the size and SHA-256 of `file`.

    Otherwise raises DamagedFileError before the announced length is reached, so that every reader notices.
    """
    digest = hashlib.sha256()
    num_bytes = 0
    held = b""
    with closing(chunks):
        for chunk in chunks:
            digest.update(chunk)
            num_bytes += len(chunk)
            if num_bytes > file.num_bytes:
                break
            if held:
                yield held
            held = chunk
    if num_bytes != file.num_bytes or digest.hexdigest() != file.sha256:
        log.error("a stored file is damaged", key=file.key, num_bytes=num_bytes, expected_num_bytes=file.num_bytes)
        metrics.increment("damaged_files")
        raise DamagedFileError("the stored file is damaged")
    if held:
        yield held


def require_size(data: bytes, max_bytes: int) -> bytes:
    """Returns `data`. Raises DamagedFileError when it is larger."""
    if len(data) > max_bytes:
        raise DamagedFileError(f"the stored file is larger than {max_bytes} bytes, the most allowed")
    return data
