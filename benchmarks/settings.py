"""The settings of all benchmark cases."""

from __future__ import annotations

from dataclasses import dataclass

from stable_audio_serve.core.generation import Mode


@dataclass(frozen=True, slots=True)
class CaseSettings:
    """The settings of all benchmark cases.

    `model` is a registered name or a checkpoint folder. None selects the demo model. `threads` is the model's number of
    CPU threads. `mode` is the engine's mode, strict or fast. None selects the device's default. If `full` is true, a
    case sends as many requests as published figures need. Otherwise it takes only minutes. The case `ggml` uses
    `binary`, the program of sa3.cpp, and `weights`, a folder of weights.
    """

    model: str | None = None
    device: str = "cpu"
    mode: Mode | None = None
    threads: int = 1
    rounds: int = 3
    full: bool = False
    binary: str | None = None
    weights: str | None = None
