"""How long a device takes for each kind of work, without a device: for the simulator, and for stand-ins that sleep.
Pure arithmetic; imports neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from stable_audio_serve.engine.call_cost import CallCost


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


@dataclass(frozen=True, slots=True)
class FormulaDevice:
    """Steps and decodes cost what the engine's own formula says."""

    step: CallCost
    decode: CallCost
    prompt_ms: float = 1.0

    def text_ms(self, prompts: int) -> float:
        return self.prompt_ms * prompts

    def encode_ms(self, rows: int, frames: int) -> float:
        return self.decode.call_ms(rows, frames)  # encoder and decoder are alike

    def step_ms(self, rows: int, frames: int) -> float:
        return self.step.call_ms(rows, frames)

    def packed_step_ms(self, lanes: Sequence[tuple[int, int]]) -> float:
        """Returns the time of one call over rows of several lengths, (rows, frames) each, without padding."""
        return max(
            self.step.floor_ms, self.step.fixed_ms + sum(rows * self.step.row_ms(frames) for rows, frames in lanes)
        )

    def decode_ms(self, rows: int, frames: int) -> float:
        return self.decode.call_ms(rows, frames)


# The demo on one thread of a two-core machine: a step of 1, 4 and 10 s takes 3.6, 4.9 and 9.0 ms, a decode 3.0, 8.2 and
# 16.6 ms; several rows of 4 s in a call without padding take 1.7 times less each.
DEMO_ON_A_CPU = FormulaDevice(
    step=CallCost(fixed_ms=2.0, per_row_ms=1.14, per_frame_ms=0.025, per_square_ms=2.44e-4),
    decode=CallCost(fixed_ms=0.6, per_frame_ms=0.15),
)
