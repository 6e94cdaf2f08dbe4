"""The settings of all benchmark cases."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CaseSettings:
    """The settings of all benchmark cases.

    `model` is a registered name or a checkpoint folder; None selects the demo model. `threads` is the model's number of
    CPU threads. `mode` is the engine's mode (strict or fast; None: the device's default). `full` sends as many requests
    as published figures need; otherwise, a case takes only minutes. `binary` and `weights` are the program of sa3.cpp
    and the folder of weights for the case `ggml`.
    """

    model: str | None = None
    device: str = "cpu"
    mode: str | None = None
    threads: int = 1
    rounds: int = 3
    full: bool = False
    binary: str | None = None
    weights: str | None = None
