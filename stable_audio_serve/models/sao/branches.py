"""Converts a row's denoiser conditioning to named values that the engine stores, and those of a batch back."""

from __future__ import annotations

from dataclasses import replace

from stable_audio_serve.models.batch_layout import CONTEXT
from stable_audio_serve.models.protocol import BranchConditioning, StepBatch
from stable_audio_serve.models.sao.denoiser import DenoiserConditioning

_GLOBAL = "global"


def to_branch(row: DenoiserConditioning) -> BranchConditioning:
    """Returns a single row's conditioning by name."""
    constants = {_GLOBAL: row.global_embed[0]}
    if row.context is not None:
        constants[CONTEXT] = row.context[0]
    return BranchConditioning(constants)


def without_context(branch: BranchConditioning) -> BranchConditioning:
    """Returns the unconditional branch: the row's global vector, and all context tokens zero."""
    return replace(branch, constants={_GLOBAL: branch.constants[_GLOBAL]})


def with_context(branch: BranchConditioning, other: DenoiserConditioning) -> BranchConditioning:
    """Returns the branch with another row's context."""
    return replace(branch, constants={**branch.constants, CONTEXT: to_branch(other).constants[CONTEXT]})


def from_batch(batch: StepBatch) -> DenoiserConditioning:
    """Returns the conditioning of a batch; with segments, `context` is the memory of all contexts."""
    embed = batch.constants[_GLOBAL]
    if batch.segments is not None:
        embed = embed.index_select(0, batch.slots[_GLOBAL])
    return DenoiserConditioning(embed, batch.constants.get(CONTEXT))
