"""The settings that every case takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CaseSettings:
    """`model` is a registered name or a checkpoint folder; None selects the demo model, or a tiny one if it is
    missing.

    `threads` is the model's number of CPU threads. `mode` is strict, fast or None for the device's default. `full`
    measures with as many requests as published figures need, instead of a short form of minutes.
    """

    model: str | None = None
    device: str = "cpu"
    mode: str | None = None
    threads: int = 1
    rounds: int = 3
    full: bool = False
