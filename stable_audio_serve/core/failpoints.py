"""Named places where tests may kill this process, to prove that nothing is lost or seen twice when it dies there.

The environment variable STABLE_AUDIO_FAILPOINTS holds `name=kill` or, to die once only, `name=kill@<file to make>`,
separated by commas. Read when this module is imported; without it a failpoint costs one look into an empty mapping.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

Failpoint = Literal["after_lease", "between_steps", "before_decode", "mid_upload", "after_upload", "after_commit"]

VARIABLE = "STABLE_AUDIO_FAILPOINTS"


def parse(text: str) -> Mapping[str, Path | None]:
    """The active failpoints with the file each makes before it kills. Raises ValueError for what it cannot read."""
    active: dict[str, Path | None] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, action = item.partition("=")
        kind, _, marker = action.partition("@")
        if name not in get_args(Failpoint) or kind != "kill":
            raise ValueError(f"{VARIABLE}: {item!r} is not <name>=kill[@<file>] with one of {get_args(Failpoint)}")
        active[name] = Path(marker) if marker else None
    return active


_ACTIVE = parse(os.environ.get(VARIABLE, ""))


def failpoint(name: Failpoint) -> None:
    """End this process by SIGKILL when the environment asks for it here."""
    if name in _ACTIVE and _is_first(_ACTIVE[name]):
        os.kill(os.getpid(), signal.SIGKILL)


def _is_first(marker: Path | None) -> bool:
    """Whether this process, of all that pass here, is the one to make the file."""
    if marker is None:
        return True
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
