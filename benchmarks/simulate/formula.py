"""Devices whose steps and decodes cost what the engine's own formula says. Unlike `devices`, imports the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stable_audio_serve.engine.scheduling.cost import CallCost


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
