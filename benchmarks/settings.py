"""The settings that every case takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CaseSettings:
    """`model` is a registered name or a checkpoint folder; None means the demo model, or a tiny one without it.
    `threads` are the model's. `mode` is strict, fast or None for the device's default. `full` measures as many requests
    as published figures need, otherwise as many as show the same within minutes.
    """

    model: str | None = None
    device: str = "cpu"
    mode: str | None = None
    threads: int = 1
    rounds: int = 3
    full: bool = False
