"""Packed rows for tests: rows of several lengths through a network as one sequence, on a CPU and as on CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from stable_audio_serve.models.blocks.packed import Packed, PackedOnDevice
from stable_audio_serve.models.protocol import StepBatch
from stable_audio_serve.models.sa3.branches import from_batch, to_branch
from stable_audio_serve.models.sa3.denoiser import Denoiser, DenoiserConditioning

WAYS = ("row by row", "one kernel")


def make_layout(way: str, frames: Sequence[int], valid_frames: Sequence[int], *, num_prefix: int) -> Packed:
    """The layout of a CPU, or CUDA's with its kernel written out."""
    if way == "row by row":
        return Packed(frames, valid_frames, num_prefix=num_prefix)
    device = torch.device("cpu")
    return PackedOnDevice(frames, valid_frames, num_prefix=num_prefix, device=device, varlen=attend_varlen)


def attend_varlen(  # as torch's function
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int
) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` is documented to do: (tokens, H, E) each, offsets int32."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (len(query), len(key), len(value)) == (cu_seq_q[-1], cu_seq_k[-1], cu_seq_k[-1])
    assert (cu_seq_q.diff().max(), cu_seq_k.diff().max()) == (max_q, max_k)
    out = torch.empty_like(query)
    for row in range(len(cu_seq_q) - 1):
        queries = slice(int(cu_seq_q[row]), int(cu_seq_q[row + 1]))
        keys = slice(int(cu_seq_k[row]), int(cu_seq_k[row + 1]))
        q, k, v = (part.transpose(0, 1) for part in (query[queries], key[keys], value[keys]))
        out[queries] = F.scaled_dot_product_attention(q, k, v).transpose(0, 1)
    return out


def run_packed(
    net: Denoiser,
    rows: Sequence[Tensor],
    *,
    times: Tensor,
    conditions: Sequence[DenoiserConditioning],
    valid_frames: Sequence[int] | None = None,
    way: str = "row by row",
) -> list[Tensor]:
    """The network's output (1, D, F) of each of `rows` (1, D, F), which run as one sequence."""
    frames, num_prefix = [row.shape[-1] for row in rows], net.config.num_memory_tokens
    branches = [to_branch(condition) for condition in conditions]
    padded = torch.zeros(len(rows), 1, max(frames))
    batch = StepBatch.of(padded, t=times, valid=padded[:, 0] > 0, branches=branches)
    out = net(
        torch.cat(list(rows), dim=2),
        times,
        conditioning=from_batch(replace(batch, frames=tuple(frames)), num_prefix=num_prefix),
        packed=make_layout(way, frames, valid_frames or frames, num_prefix=num_prefix),
    )
    return list(out.split(frames, dim=2))
