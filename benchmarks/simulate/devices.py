"""How long a device takes for each kind of work, without a device: for the simulator, and for stand-ins that sleep.
Pure arithmetic; imports neither torch nor Ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class DeviceModel(Protocol):
    """Milliseconds of each kind of call. `rows` are network rows (two of a guided request), `frames` latent frames."""

    def text_ms(self, prompts: int) -> float:
        """Returns the time of encoding this many prompts together."""
        ...

    def encode_ms(self, rows: int, frames: int) -> float:
        """Returns the time of encoding source windows of this length together."""
        ...

    def step_ms(self, rows: int, frames: int) -> float:
        """Returns the time of one denoiser call."""
        ...

    def decode_ms(self, rows: int, frames: int) -> float:
        """Returns the time of decoding windows of this length together."""
        ...


@dataclass(frozen=True, slots=True)
class LinearDevice:
    """Every call costs something fixed and something per row and latent frame."""

    text_fixed_ms: float = 1.0
    step_fixed_ms: float = 5.0
    step_per_frame_ms: float = 0.01
    coding_fixed_ms: float = 5.0
    coding_per_frame_ms: float = 0.02

    def text_ms(self, prompts: int) -> float:
        return self.text_fixed_ms

    def encode_ms(self, rows: int, frames: int) -> float:
        return self.coding_fixed_ms + self.coding_per_frame_ms * rows * frames

    def step_ms(self, rows: int, frames: int) -> float:
        return self.step_fixed_ms + self.step_per_frame_ms * rows * frames

    def decode_ms(self, rows: int, frames: int) -> float:
        return self.coding_fixed_ms + self.coding_per_frame_ms * rows * frames
