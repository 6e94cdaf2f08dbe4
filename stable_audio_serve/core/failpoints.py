"""Named points in the code where tests kill or freeze this process, to prove that no work is lost or done twice.

The environment variable STABLE_AUDIO_FAILPOINTS has comma-separated entries: `name=kill` or `name=stop` (freeze). With
`name=kill@<file>`, only the first process that reaches the point is killed: it creates the file, and processes that
find the file continue. The variable is read when this module is imported. If it is not set, a failpoint costs one
look-up in an empty mapping.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Literal, get_args

Failpoint = Literal[
    "after_lease", "between_steps", "before_decode", "mid_upload", "after_section", "after_upload", "after_commit"
]

VARIABLE = "STABLE_AUDIO_FAILPOINTS"


_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def _parse(text: str) -> dict[str, tuple[signal.Signals, Path | None]]:
    """Return the signal and the file of each failpoint in the variable's value. Raises ValueError."""
    actions: dict[str, tuple[signal.Signals, Path | None]] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, action = item.partition("=")
        kind, _, marker = action.partition("@")
        if name not in get_args(Failpoint) or kind not in _SIGNALS:
            raise ValueError(f"{VARIABLE}: {item!r} is not <name>=kill|stop[@<file>] with one of {get_args(Failpoint)}")
        actions[name] = _SIGNALS[kind], Path(marker) if marker else None
    return actions


_actions = _parse(os.environ.get(VARIABLE, ""))


def activate(text: str) -> None:
    """Replace all actions. `text` has the new actions in the format of STABLE_AUDIO_FAILPOINTS. Raises ValueError."""
    global _actions
    _actions = _parse(text)


def failpoint(name: Failpoint) -> None:
    """Kill or freeze this process if the failpoint `name` has an action. Call this function where the failpoint is."""
    number, marker = _actions.get(name, (None, None))
    if number is not None:
        with suppress(FileExistsError):  # another process was the first
            if marker is not None:
                marker.touch(exist_ok=False)
            os.kill(os.getpid(), number)
