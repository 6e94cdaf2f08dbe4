"""Packing removes the padding of rows before the network. Unpacking puts zeros in its place after the network."""

from __future__ import annotations

import torch

from stable_audio_serve.engine.calls.executor import denoise_packed, pack, unpack
from stable_audio_serve.models.protocol import StepBatch


def test_pack_removes_padding_and_unpack_restores_zeros() -> None:
    x = torch.tensor([[[1.0, 2.0, float("nan")]], [[3.0, 4.0, 5.0]], [[6.0, float("nan"), float("nan")]]])
    packed = pack(x, [2, 3, 1])
    assert packed.tolist() == [[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]]
    assert unpack(packed, [2, 3, 1], padded=4).tolist() == [
        [[1.0, 2.0, 0.0, 0.0]],
        [[3.0, 4.0, 5.0, 0.0]],
        [[6.0, 0.0, 0.0, 0.0]],
    ]


def test_the_network_gets_one_sequence_and_the_row_lengths() -> None:
    seen: list[StepBatch] = []

    class Doubling:
        def denoise(self, batch: StepBatch) -> torch.Tensor:
            seen.append(batch)
            return 2 * batch.x

    x = torch.arange(12.0).reshape(2, 2, 3)
    constants = {"tone": torch.tensor([1.0, 2.0])}
    batch = StepBatch(x, torch.tensor([0.1, 0.2]), torch.ones(2, 3, dtype=torch.bool), constants)
    out = denoise_packed(Doubling(), batch, frames=[3, 2], valid_frames=[2, 2])  # type: ignore[arg-type]
    assert torch.equal(out[0], 2 * x[0])
    assert torch.equal(out[1, :, :2], 2 * x[1, :, :2])
    assert not out[1, :, 2].any()
    (given,) = seen
    assert (given.frames, given.valid_frames, given.valid, given.constants) == ((3, 2), (2, 2), None, constants)
    assert given.x.shape == (1, 2, 5)
