"""Create the keys (names) of stored files, and recognize keys that other programs created."""

from __future__ import annotations

import re
import secrets
from typing import Literal

from stable_audio_serve.core.ids import ArtifactKey, JobId

# The folders: files of finished jobs are at the top level (""), source files of jobs in "uploads", and files that
# clients get links to in "files". Finished sections of long pieces are in "sections", a folder that sweepers of earlier
# versions do not know. In a known folder, they would delete the sections as orphans.
FOLDERS = ("", "uploads", "files", "sections")

# The folder of quality reports. The sweeper removes only partly written files from it.
QUALITY_FOLDER = "quality"

# The file that contains the name of the store's owner (see `ArtifactStore.claim`).
OWNER_KEY = ArtifactKey(".owner")

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_HEX = "[0-9a-f]{32}"
_UUID = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_OF_JOB = rf"(({_HEX}){{1,2}}|{_UUID}(-stable-audio)?)-[A-Za-z0-9._-]{{1,150}}"  # for the job ids of all dialects
_OURS = re.compile(rf"{_OF_JOB}|(uploads|files|sections|{QUALITY_FOLDER})/{_HEX}")


def artifact_key(job_id: JobId, file_name: str, *, fence: int, id_is_chosen: bool = False) -> ArtifactKey:
    """Return the key of an output file of a job.

    `fence` is the number of the attempt to run the job. Each attempt has its own key, because an earlier attempt may
    still be writing its file. With `id_is_chosen`, the key contains random digits, because the client chose the job id
    and another client may choose the same id.
    """
    attempt = f"{secrets.token_hex(16)}-" if id_is_chosen else f"{fence}-" if fence > 1 else ""
    return ArtifactKey(f"{_UNSAFE.sub('-', job_id)}-{attempt}{_UNSAFE.sub('-', file_name)}")


def new_key(folder: Literal["uploads", "files", "sections"]) -> ArtifactKey:
    """Return a new random key for a file in this folder."""
    return ArtifactKey(f"{folder}/{secrets.token_hex(16)}")


def quality_key(name: str) -> ArtifactKey:
    """Return the key of a quality report. Raises ValueError unless `name` has 32 hexadecimal digits."""
    key = ArtifactKey(f"{QUALITY_FOLDER}/{name}")
    if not is_ours(key):
        raise ValueError(f"not 32 hexadecimal digits: {name[:40]!r}")
    return key


def is_ours(key: str) -> bool:
    """Whether this module could have created the key. Files under other keys belong to other programs."""
    return _OURS.fullmatch(key) is not None
