"""What every case needs to know."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CaseSettings:
    """`model` is a registered name or a checkpoint folder, None the demo model or else a tiny one; `threads` are the
    model's; `mode` strict, fast or None for the device's default. `full`: as many requests as published figures need,
    otherwise as many as show the same in minutes.
    """

    model: str | None = None
    device: str = "cpu"
    mode: str | None = None
    threads: int = 1
    rounds: int = 3
    full: bool = False
