"""Converts a row's denoiser conditioning to named tensors for the engine, and the named tensors of a batch back."""

from __future__ import annotations

from dataclasses import replace

from stable_audio_serve.models.batch_layout import CONTEXT
from stable_audio_serve.models.protocol import BranchConditioning, StepBatch
from stable_audio_serve.models.sao.denoiser import DenoiserConditioning

_GLOBAL = "global"


def to_branch(row: DenoiserConditioning) -> BranchConditioning:
    """Returns a single row's conditioning as named tensors."""
    constants = {_GLOBAL: row.global_embed[0]}
    if row.context is not None:
        constants[CONTEXT] = row.context[0]
    return BranchConditioning(constants)


def without_context(branch: BranchConditioning) -> BranchConditioning:
    """Returns the unconditional branch: the row's global vector, and all context tokens zero."""
    return replace(branch, constants={_GLOBAL: branch.constants[_GLOBAL]})


def with_context(branch: BranchConditioning, other: DenoiserConditioning) -> BranchConditioning:
    """Returns `branch` with the cross-attention context of `other`."""
    return replace(branch, constants={**branch.constants, CONTEXT: to_branch(other).constants[CONTEXT]})


def from_batch(batch: StepBatch) -> DenoiserConditioning:
    """Returns the denoiser's conditioning for a batch.

    If the batch has `segments`, the result's `context` has the stored contexts of all requests, not one per row.
    """
    embed = batch.constants[_GLOBAL]
    if batch.segments is not None:
        embed = embed.index_select(0, batch.slots[_GLOBAL])
    return DenoiserConditioning(embed, batch.constants.get(CONTEXT))
