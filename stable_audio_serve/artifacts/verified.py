"""Reading with proof: a stored file is handed out only as far as it can still be the one that was put."""

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
    """`chunks`, the last one only if all together are the file.

    Raises DamagedFileError otherwise, before all of the promised length has been handed out: whoever reads will notice.
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
