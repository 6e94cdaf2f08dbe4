"""Where randomness comes from: the protocol. Implementations: SeededNoise (product), ReplayNoise (verification)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class NoiseSource(Protocol):
    """All random draws of one row, per stage, independent of neighbours and windows."""

    def initial(self, shape: tuple[int, ...]) -> Tensor:
        """The initial latent noise, `shape` (D, F), float32 on the CPU, unit normal. Called once, first."""
        ...

    def step(self, shape: tuple[int, ...]) -> Tensor:
        """The next sampler draw, `shape` (D, F), float32 on the CPU; called once per evaluation that draws."""
        ...

    def window(self, stage: str, start: int, shape: tuple[int, ...], frame_axis: int, device: torch.device) -> Tensor:
        """Noise for the latent frames `start ... start + shape[frame_axis] - 1` of a source-encode or decode window.

        `stage` names the draw ("decode/bottleneck", "decode/tokens", "init/tokens", "inpaint/tokens", ...);
        float32 on `device`. The value of a frame depends on (seed, stage, frame) only, never on the window.
        """
        ...
