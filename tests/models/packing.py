"""Run rows of different lengths through a network as one packed sequence without padding.

The network uses either the layout for CPUs (`Packed`), or the layout for CUDA (`PackedSegments`) with a plain
implementation of the CUDA attention kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from stable_audio_serve.models.blocks.layouts import Layout
from stable_audio_serve.models.blocks.packed import Packed
from stable_audio_serve.models.blocks.packed_segments import PackedSegments
from stable_audio_serve.models.native import from_batch, to_branch
from stable_audio_serve.models.native_denoiser import DenoiserConditioning
from stable_audio_serve.models.protocol import StepBatch
from stable_audio_serve.models.sa3.denoiser import Denoiser
from stable_audio_serve.models.segments import Segments

WAYS = ("row by row", "one kernel")
SPARE_TOKENS, SPARE_ROWS, SPARE_LENGTH = 21, 2, 7


def attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    seqused_k: Tensor,
) -> Tensor:
    """A plain implementation of `attend_packed`.

    The result is NaN at tokens that belong to no row.
    """
    return torch.ops.tests.attend_varlen(query, key, value, cu_seq_q, cu_seq_k, seqused_k, longest=[max_q, max_k])


@torch.library.custom_op("tests::attend_varlen", mutates_args={})
def _attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    seqused_k: Tensor,
    longest: list[int],
) -> Tensor:
    assert cu_seq_q.dtype == cu_seq_k.dtype == seqused_k.dtype == torch.int32
    assert len(cu_seq_q) == len(cu_seq_k) == len(seqused_k) + 1
    assert cu_seq_q.diff().max() <= longest[0]
    assert seqused_k.max() <= longest[1]
    assert key.stride(2) == value.stride(2) == query.stride(2) == 1
    out = torch.full(query.shape, float("nan"))
    for row, num_keys in enumerate(seqused_k.tolist()):
        queries = slice(int(cu_seq_q[row]), int(cu_seq_q[row + 1]))
        keys = slice(int(cu_seq_k[row]), int(cu_seq_k[row]) + num_keys)
        q, k, v = (part.transpose(0, 1) for part in (query[queries], key[keys], value[keys]))
        if q.shape[1]:
            out[queries] = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(0, 1)
    return out


@_attend_varlen.register_fake
def _(query: Tensor, *_args: object, **_kwargs: object) -> Tensor:
    return torch.empty(query.shape)


def make_segments(frames: Sequence[int], valid_frames: Sequence[int], *, num_prefix: int) -> Segments:
    """Returns the `Segments` of rows with the given lengths, followed by unused rows and tokens as in a CUDA graph."""
    return Segments.of(
        torch.tensor([*frames, *[0] * SPARE_ROWS], dtype=torch.int32),
        torch.tensor([*valid_frames, *[0] * SPARE_ROWS], dtype=torch.int32),
        num_prefix=num_prefix,
        num_tokens=sum(frames) + num_prefix * len(frames) + SPARE_TOKENS,
        longest_frames=max(frames) + SPARE_LENGTH,
    )


def to_tokens(rows: Sequence[Tensor], segments: Segments) -> Tensor:
    """Join the rows (..., channels, frames) to one sequence (..., channels, tokens), zero at tokens without a frame."""
    joined = torch.cat(list(rows), dim=-1)
    tokens = joined.new_zeros(*joined.shape[:-1], len(segments.rows))
    tokens[..., segments.is_frame] = joined
    return tokens


def run_packed_with(
    run: Callable[[Tensor, Layout | None], Tensor],
    rows: Sequence[Tensor],
    *,
    valid_frames: Sequence[int] | None,
    num_prefix: int,
    way: str,
    slots: Tensor,
) -> list[Tensor]:
    """Call `run` with all rows (1, channels, frames) as one packed sequence. Returns the result for each row.

    If `way` is "row by row", uses the layout for CPUs, else the layout for CUDA. `slots` has the index of each row's
    context in the tensor of contexts.
    """
    frames = [row.shape[-1] for row in rows]
    seen = valid_frames or frames
    if way == "row by row":
        out = run(torch.cat(list(rows), dim=2), Packed(frames, seen, num_prefix=num_prefix))
        return list(out.split(frames, dim=2))
    segments = make_segments(frames, seen, num_prefix=num_prefix)
    spare = F.pad(slots, (0, SPARE_ROWS))
    layout = PackedSegments(segments, num_prefix=num_prefix, slots=spare.to(torch.int32), varlen=attend_varlen)
    out = run(to_tokens(rows, segments), layout)
    return list(out[..., segments.is_frame].split(frames, dim=2))


def run_packed(
    net: Denoiser,
    rows: Sequence[Tensor],
    *,
    times: Tensor,
    conditions: Sequence[DenoiserConditioning],
    valid_frames: Sequence[int] | None = None,
    way: str = "row by row",
) -> list[Tensor]:
    """Run the rows (1, channels, frames) through the denoiser as one packed sequence. Returns each row's output."""
    frames, num_prefix = [row.shape[-1] for row in rows], net.config.num_prefix
    branches = [to_branch(condition) for condition in conditions]
    padded = torch.zeros(len(rows), 1, max(frames))
    batch = StepBatch.of(padded, t=times, valid=padded[:, 0] > 0, branches=branches)
    # Contexts are stored in reverse order of the rows, from index 1.
    memory = len(rows) - torch.arange(len(rows), dtype=torch.int32)
    if way == "row by row":
        packed, t = replace(batch, frames=tuple(frames)), times
    else:
        segments = make_segments(frames, valid_frames or frames, num_prefix=num_prefix)
        slots = F.pad(memory, (0, SPARE_ROWS))
        packed, t = (
            replace(
                batch,
                segments=segments,
                constants={
                    name: torch.cat([torch.full_like(value[:1], 9.0), value.flip(0)])
                    for name, value in batch.constants.items()
                },
                slots=dict.fromkeys(batch.constants, slots),
                by_frame={
                    name: to_tokens([row[None, :, :own] for row, own in zip(value, frames, strict=True)], segments)
                    for name, value in batch.by_frame.items()
                },
            ),
            F.pad(times, (0, SPARE_ROWS)),
        )
    conditioning = from_batch(packed, num_prefix=num_prefix)
    return run_packed_with(
        lambda x, layout: net(x, t, conditioning=conditioning, packed=layout),
        rows,
        valid_frames=valid_frames,
        num_prefix=num_prefix,
        way=way,
        slots=memory,
    )
