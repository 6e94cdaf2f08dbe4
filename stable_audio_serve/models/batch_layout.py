"""Chooses the token layout of a denoiser call (padded or packed) from its batch, for every model family."""

from __future__ import annotations

from stable_audio_serve.models.blocks import Layout, Packed, PackedSegments
from stable_audio_serve.models.blocks.varlen import attend_packed
from stable_audio_serve.models.protocol import StepBatch

CONTEXT = "context"  # key in StepBatch.constants: the cross-attention keys and values of every layer


def packed_layout(batch: StepBatch, *, num_prefix: int) -> Layout | None:
    """Returns the layout of a packed batch, in which each row has `num_prefix` tokens before its frames.

    Returns None for a padded batch.
    """
    if batch.segments is not None:
        slots = batch.slots.get(CONTEXT)
        return PackedSegments(batch.segments, num_prefix=num_prefix, slots=slots, varlen=attend_packed)
    return Packed(batch.frames, batch.valid_frames, num_prefix=num_prefix) if batch.frames else None
