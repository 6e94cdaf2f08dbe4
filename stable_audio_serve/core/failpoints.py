"""Named points in the code where tests kill or freeze this process, to prove that no work is lost or done twice.

The environment variable STABLE_AUDIO_FAILPOINTS has comma-separated entries: `name=kill` or `name=stop` (freeze). With
`name=kill@<file>`, only the first process that reaches the point is killed: it creates the file, and processes that
find the file continue. The variable is read when this module is imported. If it is not set, a failpoint costs one
look-up in an empty mapping.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Failpoint = Literal[
    "after_lease", "between_steps", "before_decode", "mid_upload", "after_section", "after_upload", "after_commit"
]

VARIABLE = "STABLE_AUDIO_FAILPOINTS"


_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


@dataclass(frozen=True, slots=True)
class _Action:
    signal: signal.Signals
    marker: Path | None


def _parse(text: str) -> Mapping[str, _Action]:
    """Parse the value of the variable: return the action of each failpoint. Raises ValueError for an invalid entry."""
    actions: dict[str, _Action] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, action = item.partition("=")
        kind, _, marker = action.partition("@")
        if name not in get_args(Failpoint) or kind not in _SIGNALS:
            raise ValueError(f"{VARIABLE}: {item!r} is not <name>=kill|stop[@<file>] with one of {get_args(Failpoint)}")
        actions[name] = _Action(_SIGNALS[kind], Path(marker) if marker else None)
    return actions


_actions = _parse(os.environ.get(VARIABLE, ""))


def activate(text: str) -> None:
    """Replace all actions. `text` has the new actions in the format of STABLE_AUDIO_FAILPOINTS. Raises ValueError."""
    global _actions
    _actions = _parse(text)


def failpoint(name: Failpoint) -> None:
    """Kill or freeze this process if the failpoint `name` has an action. Call this function where the failpoint is."""
    action = _actions.get(name)
    if action is not None and _is_first(action.marker):
        os.kill(os.getpid(), action.signal)


def _is_first(marker: Path | None) -> bool:
    """Whether this process is the first to reach the failpoint. The first process creates the file `marker`."""
    if marker is None:
        return True
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
