"""The denoiser's conditioning as the engine keeps it: a row's values by name; and back, for rows that step together."""

from __future__ import annotations

from dataclasses import replace

from stable_audio_serve.models.protocol import BranchConditioning, StepBatch
from stable_audio_serve.models.sao.denoiser import DenoiserConditioning

_CONTEXT, _GLOBAL = "context", "global"


def to_branch(row: DenoiserConditioning) -> BranchConditioning:
    """Returns a single row's conditioning by name."""
    constants = {_GLOBAL: row.global_embed[0]}
    if row.context is not None:
        constants[_CONTEXT] = row.context[0]
    return BranchConditioning(constants)


def without_context(branch: BranchConditioning) -> BranchConditioning:
    """Returns the unconditional branch: the same row with all context tokens zero, and its global vector."""
    return replace(branch, constants={_GLOBAL: branch.constants[_GLOBAL]})


def with_context(branch: BranchConditioning, other: DenoiserConditioning) -> BranchConditioning:
    """Returns the branch with the context of another row."""
    return replace(branch, constants={**branch.constants, _CONTEXT: to_branch(other).constants[_CONTEXT]})


def from_batch(batch: StepBatch) -> DenoiserConditioning:
    """Returns the conditioning of rows that step together."""
    return DenoiserConditioning(batch.constants[_GLOBAL], batch.constants.get(_CONTEXT))
