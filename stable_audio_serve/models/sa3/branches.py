"""The denoiser's conditioning as the engine keeps it: a row's values by name; and back, for rows that step together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stable_audio_serve.models.blocks.packed import join_local
from stable_audio_serve.models.protocol import BranchConditioning, StepBatch
from stable_audio_serve.models.sa3.denoiser import ContextKeys, DenoiserConditioning

_KEYS, _VALUES, _GLOBAL, _LOCAL = "context_keys", "context_values", "global", "local"


def to_branch(row: DenoiserConditioning) -> BranchConditioning:
    """Returns a single row's conditioning by name.

    Local embeddings are a constant where every frame is alike and else by frame: the other of the two stands for zeros,
    so the sum of both is right for every row.
    """
    constants, by_frame = {_GLOBAL: row.global_embed[0]}, {}
    if row.context is not None:
        constants[_KEYS] = torch.stack([layer.key[0] for layer in row.context])
        constants[_VALUES] = torch.stack([layer.value[0] for layer in row.context])
    if row.local is not None:
        local = torch.stack([layer[0] for layer in row.local])  # (layers, F or 1, W)
        if local.shape[1] == 1:
            constants[_LOCAL] = local
        else:
            by_frame[_LOCAL] = local.transpose(1, 2).flatten(0, 1)
    return BranchConditioning(constants, by_frame)


def without_context(branch: BranchConditioning) -> BranchConditioning:
    """Returns the unconditional branch: the same row with all context tokens zero."""
    kept = {name: value for name, value in branch.constants.items() if name not in (_KEYS, _VALUES)}
    return replace(branch, constants=kept)


def with_context(branch: BranchConditioning, other: DenoiserConditioning) -> BranchConditioning:
    """Returns the branch with the context of another row."""
    context = {name: value for name, value in to_branch(other).constants.items() if name in (_KEYS, _VALUES)}
    return replace(branch, constants={**branch.constants, **context})


def from_batch(batch: StepBatch, *, num_prefix: int = 0) -> DenoiserConditioning:
    """Returns the conditioning of rows that step together; packed rows have `num_prefix` tokens before their frames."""
    context = local = None
    if _KEYS in batch.constants:
        keys, values = batch.constants[_KEYS].unbind(1), batch.constants[_VALUES].unbind(1)
        context = tuple(ContextKeys(*layer) for layer in zip(keys, values, strict=True))
    embed = batch.constants[_GLOBAL]
    if _LOCAL in batch.constants:
        local = batch.constants[_LOCAL].unbind(1)
    if _LOCAL in batch.by_frame:
        frames = batch.by_frame[_LOCAL].unflatten(1, (-1, embed.shape[-1])).transpose(2, 3).contiguous().unbind(1)
        local = frames if local is None else tuple(map(torch.add, frames, local))
    if local is not None and batch.frames:
        local = tuple(_pack(layer, batch.frames, num_prefix=num_prefix) for layer in local)
    return DenoiserConditioning(embed, context, local)


def _pack(local: Tensor, frames: Sequence[int], *, num_prefix: int) -> Tensor:
    """(B, F or 1, W) -> the embeddings of all tokens (1, N, W)."""
    rows = [row[None, : own if len(row) > 1 else 1] for row, own in zip(local, frames, strict=True)]
    return join_local(rows, frames=frames, num_prefix=num_prefix)
