"""Packed rows have no padding in the network. Its output has zeros in place of the padding."""

from __future__ import annotations

import torch

from stable_audio_serve.engine.calls.packed_step import denoise_joined
from stable_audio_serve.models.protocol import StepBatch


def test_the_network_gets_one_sequence_and_the_row_lengths() -> None:
    seen: list[StepBatch] = []

    def double(batch: StepBatch) -> torch.Tensor:
        seen.append(batch)
        return 2 * batch.x

    nan = float("nan")
    x = torch.tensor([[[1.0, 2.0, nan, nan]], [[3.0, 4.0, 5.0, nan]], [[6.0, nan, nan, nan]]])
    constants = {"tone": torch.tensor([1.0, 2.0, 3.0])}
    batch = StepBatch(x, torch.tensor([0.1, 0.2, 0.3]), torch.ones(3, 4, dtype=torch.bool), constants)
    out = denoise_joined(double, batch, frames=[2, 3, 1], valid_frames=[2, 2, 1])
    assert out.tolist() == [[[2.0, 4.0, 0.0, 0.0]], [[6.0, 8.0, 10.0, 0.0]], [[12.0, 0.0, 0.0, 0.0]]]
    (given,) = seen
    assert given.x.tolist() == [[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]]
    assert (given.frames, given.valid_frames, given.valid, given.constants) == ((2, 3, 1), (2, 2, 1), None, constants)
