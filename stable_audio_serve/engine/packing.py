"""Takes the padding out of one call of the network: rows of different lengths go in one after another, and come back
padded, so that guidance and the registers' update need not know. Knows no rows of the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stable_audio_serve.models.protocol import DiffusionModel, StepBatch


def denoise_packed(
    model: DiffusionModel, batch: StepBatch, *, frames: Sequence[int], valid_frames: Sequence[int]
) -> Tensor:
    """Returns the network output (B, D, F) float32 of a padded batch, which runs packed; 0 behind each row's `frames`.

    Nothing of the padding is read. For a model whose spec says `packs_rows`.
    """
    packed = replace(batch, x=pack(batch.x, frames), valid=None, frames=tuple(frames), valid_frames=tuple(valid_frames))
    return unpack(model.denoise(packed), frames, padded=batch.x.shape[-1])


def pack(x: Tensor, frames: Sequence[int]) -> Tensor:
    """Returns the first `frames` of each row of x (B, D, F), one row after another: (1, D, N)."""
    return torch.cat([row[:, :count] for row, count in zip(x, frames, strict=True)], dim=1)[None]


def unpack(x: Tensor, frames: Sequence[int], *, padded: int) -> Tensor:
    """Returns the rows of x (1, D, N), padded with zeros: (B, D, padded)."""
    rows = x.new_zeros(len(frames), x.shape[1], padded)
    for target, row in zip(rows, x[0].split(list(frames), dim=1), strict=True):
        target[:, : row.shape[1]] = row
    return rows
