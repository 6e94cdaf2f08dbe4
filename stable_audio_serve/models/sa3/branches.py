"""Converts a row's denoiser conditioning to named values that the engine stores, and those of a batch back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stable_audio_serve.models.batch_layout import CONTEXT
from stable_audio_serve.models.blocks.packed import join_local
from stable_audio_serve.models.protocol import BranchConditioning, StepBatch
from stable_audio_serve.models.sa3.denoiser import DenoiserConditioning
from stable_audio_serve.models.segments import Segments

_GLOBAL, _LOCAL = "global", "local"


def to_branch(row: DenoiserConditioning) -> BranchConditioning:
    """Returns a single row's conditioning by name.

    Local embeddings are a constant if they are equal in all frames, else a value by frame. A missing name means zeros,
    so `from_batch` can add the constant and the value by frame of every row.
    """
    constants, by_frame = {_GLOBAL: row.global_embed[0]}, {}
    if row.context is not None:
        constants[CONTEXT] = row.context[0]
    if row.local is not None:
        local = row.local[0]  # (layers, F or 1, W)
        if local.shape[1] == 1:
            constants[_LOCAL] = local
        else:
            by_frame[_LOCAL] = local.transpose(1, 2).flatten(0, 1)
    return BranchConditioning(constants, by_frame)


def without_context(branch: BranchConditioning) -> BranchConditioning:
    """Returns the unconditional branch: the same row with all context tokens zero."""
    return replace(branch, constants={name: value for name, value in branch.constants.items() if name != CONTEXT})


def with_context(branch: BranchConditioning, other: DenoiserConditioning) -> BranchConditioning:
    """Returns the branch with another row's context."""
    context = to_branch(other).constants[CONTEXT]
    return replace(branch, constants={**branch.constants, CONTEXT: context})


def from_batch(batch: StepBatch, *, num_prefix: int = 0) -> DenoiserConditioning:
    """Returns the conditioning of a batch; packed rows have `num_prefix` tokens before their frames.

    With segments, `context` is the memory of all contexts.
    """
    if batch.segments is not None:
        return _from_segments(batch, batch.segments)
    embed, local = batch.constants[_GLOBAL], batch.constants.get(_LOCAL)
    if _LOCAL in batch.by_frame:
        frames = batch.by_frame[_LOCAL].unflatten(1, (-1, embed.shape[-1])).transpose(2, 3).contiguous()
        local = frames if local is None else frames + local
    if local is not None and batch.frames:
        local = _pack(local, batch.frames, num_prefix=num_prefix)
    return DenoiserConditioning(embed, batch.constants.get(CONTEXT), local)


def _from_segments(batch: StepBatch, segments: Segments) -> DenoiserConditioning:
    """Returns the memory of all contexts as `context`, and local embeddings with one value per row or per token."""
    own = {
        name: batch.constants[name].index_select(0, batch.slots[name])
        for name in (_GLOBAL, _LOCAL)
        if name in batch.constants
    }
    local = own.get(_LOCAL)  # (B, layers, 1, W)
    if _LOCAL in batch.by_frame:
        frames = batch.by_frame[_LOCAL].unflatten(1, (-1, own[_GLOBAL].shape[-1])).transpose(2, 3)
        if local is not None:
            by_token = local[:, :, 0].index_select(0, segments.rows).transpose(0, 1)
            frames = torch.where(segments.is_frame[:, None], frames + by_token, 0.0)
        local = frames.contiguous()  # (1, layers, N, W)
    return DenoiserConditioning(own[_GLOBAL], batch.constants.get(CONTEXT), local)


def _pack(local: Tensor, frames: Sequence[int], *, num_prefix: int) -> Tensor:
    """Pack (B, layers, F or 1, W) to the embeddings of all tokens (1, layers, N, W)."""
    rows = [row[None, :, :own] for row, own in zip(local, frames, strict=True)]
    return join_local(rows, frames=frames, num_prefix=num_prefix)
