"""Converts a row's denoiser conditioning to named tensors for the engine, and the named tensors of a batch back."""

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
    """Returns a single row's conditioning as named tensors.

    Local embeddings are in `constants` if they are equal in all frames, else in `by_frame`. A batch can have both kinds
    of rows, and missing names become zeros. `from_batch` therefore adds the local embeddings in `constants` and in
    `by_frame`.
    """
    constants, by_frame = {_GLOBAL: row.global_embed[0]}, {}
    if row.context is not None:
        constants[CONTEXT] = row.context[0]
    if row.local is not None:
        local = row.local[0]  # (layers, frames or 1, width)
        if local.shape[1] == 1:
            constants[_LOCAL] = local
        else:
            by_frame[_LOCAL] = local.transpose(1, 2).flatten(0, 1)
    return BranchConditioning(constants, by_frame)


def without_context(branch: BranchConditioning) -> BranchConditioning:
    """Returns the unconditional branch: the same row with all context tokens zero."""
    return replace(branch, constants={name: value for name, value in branch.constants.items() if name != CONTEXT})


def with_context(branch: BranchConditioning, other: DenoiserConditioning) -> BranchConditioning:
    """Returns `branch` with the cross-attention context of `other`."""
    context = to_branch(other).constants[CONTEXT]
    return replace(branch, constants={**branch.constants, CONTEXT: context})


def from_batch(batch: StepBatch, *, num_prefix: int = 0) -> DenoiserConditioning:
    """Returns the denoiser's conditioning for a batch. Packed rows have `num_prefix` tokens before their frames.

    If the batch has `segments`, the result's `context` has the stored contexts of all requests, not one per row.
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
    """Returns the conditioning with all stored contexts as `context`, and local embeddings per row or per token."""
    own = {
        name: batch.constants[name].index_select(0, batch.slots[name])
        for name in (_GLOBAL, _LOCAL)
        if name in batch.constants
    }
    local = own.get(_LOCAL)  # (rows, layers, 1, width)
    if _LOCAL in batch.by_frame:
        frames = batch.by_frame[_LOCAL].unflatten(1, (-1, own[_GLOBAL].shape[-1])).transpose(2, 3)
        if local is not None:
            by_token = local[:, :, 0].index_select(0, segments.rows).transpose(0, 1)
            frames = torch.where(segments.is_frame[:, None], frames + by_token, 0.0)
        local = frames.contiguous()  # (1, layers, tokens, width)
    return DenoiserConditioning(own[_GLOBAL], batch.constants.get(CONTEXT), local)


def _pack(local: Tensor, frames: Sequence[int], *, num_prefix: int) -> Tensor:
    """Convert local embeddings of rows (rows, layers, frames or 1, width) to (1, layers, tokens of all rows, width)."""
    rows = [row[None, :, :own] for row, own in zip(local, frames, strict=True)]
    return join_local(rows, frames=frames, num_prefix=num_prefix)
