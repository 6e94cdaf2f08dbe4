"""Read and check the file of API keys. The file has one key per line, which `core.keys.parse_key` parses.

Empty lines and `#` comments are allowed. `api.middleware.key_ring` decides when to read the file again. Error messages
never quote a line of the file, because the line may contain a key in plain text by mistake.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

from stable_audio_serve.core.keys import ApiKey, KeyLimits, parse_key

_MAX_BYTES = 16_777_216


def read_key_file(path: str) -> bytes:
    """Return the content of the key file.

    Raises OSError if it cannot be read, and ValueError if it is not a regular file or is too large.
    """
    # O_NONBLOCK: if the path is a named pipe, opening it would otherwise block until another process writes to it.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"it is larger than {_MAX_BYTES} bytes")
    return data


def parse_key_file(data: bytes) -> tuple[ApiKey, ...]:
    """Return the keys in the content of a key file. Raises ValueError, which names the invalid line.

    An empty file is invalid, because most likely another program is about to write the file. A file that has only a
    comment is valid and contains no key.
    """
    if not data:
        raise ValueError("it is empty")
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
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
            raise ValueError(f"lines {first} and {number} set different limits for the same name")
        keys.append(key)
    return tuple(keys)


def merge_keys(configured: Sequence[ApiKey], listed: Sequence[ApiKey]) -> dict[str, ApiKey]:
    """Return the API keys of the settings (`configured`) and of the key file (`listed`), by the keys' digests.

    If the settings and the file contain the same key, the entry of the file applies. The limits that the file sets for
    a client also apply to the client's keys in the settings.
    """
    limits = {key.client: key.limits for key in listed}
    own = [ApiKey(key.client, key.digest, key.scopes, limits.get(key.client, key.limits)) for key in configured]
    return {key.digest: key for key in (*own, *listed)}
