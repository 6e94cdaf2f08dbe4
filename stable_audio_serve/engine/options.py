"""The options of one engine: a frozen value, checked at construction. Independent of settings files and environment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.generation import Mode


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """All options of one engine. `None` leaves the choice to the model's device.

    In `mode` strict, the default on a CPU, a request's bytes never depend on other requests. In fast mode, the default
    on CUDA, rows of different lengths share device calls, and results differ slightly: by at most 1.2e-5 on the
    reference checkpoints, less than one unit of 16-bit audio (3e-5). Raises ConfigError for an invalid value.
    """

    mode: Mode | None = None
    max_rows: int = 64  # rows that hold device state, at most three quarters of them batch rows; others wait
    max_queue_s: float = 120.0  # predicted work that may wait; above it new requests are refused, batch ones first
    batch_share: float = 0.125  # time for batch rows while interactive ones run, as a share of interactive time
    fixed_share: float = 0.15  # a step takes more rows until its fixed cost is at most this share of its time
    max_step_tokens: int = 16_384  # latent frames of one step, all rows together
    slots: int = 8  # rows of a strict call on CUDA, dummy rows included
    frame_grid: int | None = None  # pad rows to a multiple of it; None: 64 on CUDA, 1 on a CPU (packed in fast mode)
    max_memory_bytes: int | None = None  # for started rows; None: most of the free memory on CUDA, no limit on a CPU
    prompt_cache_bytes: int = 256 * 2**20
    planning_threads: int = 1  # threads that plan requests, per priority
    max_planning: int = 1024  # requests being planned at once, per priority
    torch_threads: int | None = None  # per call on a CPU; None: torch's default; strict results do not depend on it
    captures_off_file: Path | None = None  # exists after a failed capture has ended the process; then none are made
    warmup_budget_s: float = 2.0  # for timed calls; the first, untimed call of each kind is extra; 0 skips the warm-up

    def __post_init__(self) -> None:
        if self.mode not in (None, "strict", "fast"):
            raise ConfigError(f"engine mode {self.mode!r} is unknown", field="mode", allowed="strict, fast")
        least = {"slots": 2, "max_rows": 2}  # a guided row takes two slots; each priority needs a row
        whole = ("max_rows", "max_step_tokens", "slots", "planning_threads", "max_planning")
        for name in (*whole, "frame_grid", "max_memory_bytes", "torch_threads"):
            value = getattr(self, name)
            if value is not None and value < least.get(name, 1):
                allowed = f">= {least.get(name, 1)}"
                raise ConfigError(f"engine {name} must be {allowed}, got {value}", field=name, allowed=allowed)
        for name in ("max_queue_s", "batch_share", "prompt_cache_bytes", "warmup_budget_s"):
            value = getattr(self, name)
            if not value >= 0:
                raise ConfigError(f"engine {name} must not be negative, got {value}", field=name, allowed=">= 0")
        if not 0 < self.fixed_share < 1:
            message = f"engine fixed_share must lie between 0 and 1, got {self.fixed_share}"
            raise ConfigError(message, field="fixed_share", allowed="0 < fixed_share < 1")
