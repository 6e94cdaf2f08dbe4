"""Named places where tests may kill or freeze this process, to prove that nothing is lost or seen twice by that.

The environment variable STABLE_AUDIO_FAILPOINTS holds `name=kill` or `name=stop` or, for the first process only that
gets there, `name=kill@<file to make>`, separated by commas. Read when this module is imported; without it a failpoint
costs one look into an empty mapping.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Failpoint = Literal["after_lease", "between_steps", "before_decode", "mid_upload", "after_upload", "after_commit"]

VARIABLE = "STABLE_AUDIO_FAILPOINTS"


_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


@dataclass(frozen=True, slots=True)
class _Action:
    signal: signal.Signals
    marker: Path | None


def _parse(text: str) -> Mapping[str, _Action]:
    """Raises ValueError for what it cannot read."""
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
    """From here on do what `text` says, in the words of the variable. Raises ValueError."""
    global _actions
    _actions = _parse(text)


def failpoint(name: Failpoint) -> None:
    """Kill or freeze this process when that was asked for here."""
    action = _actions.get(name)
    if action is not None and _is_first(action.marker):
        os.kill(os.getpid(), action.signal)


def _is_first(marker: Path | None) -> bool:
    """Whether this process, of all that pass here, is the one to make the file."""
    if marker is None:
        return True
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
