"""The file of API keys: one line of `core.keys` each, empty lines and comments (`#`) between them.

Reads and checks it; when it is read again is `api.middleware.key_ring`. No message repeats what stands in a line.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

from stable_audio_serve.core.keys import ApiKey, KeyLimits, parse_key

_MAX_BYTES = 16_777_216


def load_key_file(path: str) -> tuple[bytes, tuple[ApiKey, ...]]:
    """Returns the file's bytes and its keys, in order. Raises OSError, and ValueError with one sentence."""
    data = read_key_file(path)
    return data, parse_key_file(data)


def read_key_file(path: str) -> bytes:
    """Returns its bytes. Raises OSError, and ValueError for what is no file of keys by its kind or size."""
    # Not blocking: opening a pipe would wait for somebody who writes to it.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no regular file")
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"it is larger than {_MAX_BYTES} bytes")
    return data


def parse_key_file(data: bytes) -> tuple[ApiKey, ...]:
    """Returns the keys of a file with these bytes. Raises ValueError, naming the line.

    A file without a single byte is refused: it is more likely one that is just being written than a decision to shut
    everybody out, for which a comment will do.
    """
    if not data:
        raise ValueError("it is empty")
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError("it is no text in UTF-8") from None
    keys: list[ApiKey] = []
    digests: dict[str, int] = {}
    limits: dict[str, tuple[KeyLimits, int]] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            key = parse_key(text)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        if (first := digests.setdefault(key.digest, number)) != number:
            raise ValueError(f"lines {first} and {number} are the same key")
        known, first = limits.setdefault(key.client, (key.limits, number))
        if known != key.limits:
            raise ValueError(f"lines {first} and {number} give one name different limits")
        keys.append(key)
    return tuple(keys)


def merge_keys(configured: Sequence[ApiKey], listed: Sequence[ApiKey]) -> dict[str, ApiKey]:
    """Returns the keys of the settings and those of a file by their digest; for the same key the file's line counts.

    A configured key of a name that the file limits has that name's limits.
    """
    limits = {key.client: key.limits for key in listed}
    own = [ApiKey(key.client, key.digest, key.scopes, limits.get(key.client, key.limits)) for key in configured]
    return {key.digest: key for key in (*own, *listed)}
