"""Attention for packed rows (sequences of different lengths, without padding) in one kernel, if torch and the device
support it.

`is_varlen_correct` compares the kernel's results with ordinary attention, because torch's documentation does not cover
all cases that this package needs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stable_audio_serve.models.segments import Segments

log = logging.getLogger(__name__)

# (queries, keys, values, query offsets, key offsets, max queries, max keys, seqused_k=...), as `attend_packed`
VarlenAttention = Callable[..., Tensor]

_HALF = (torch.float16, torch.bfloat16)
_TOLERANCE = 0.02  # largest acceptable error of half-precision attention, for inputs drawn from N(0, 1)


def attend_packed(  # noqa: PLR0917  # the signature of torch's operator
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
    """Returns softmax attention within each of several sequences of different lengths, on CUDA in half precision.

    `query` and the result are (query tokens, heads, head width); `key` and `value` are (key tokens, key heads, head
    width), where the number of heads is a multiple of the number of key heads. The tokens of sequence i begin at index
    `cu_seq_q[i]` and `cu_seq_k[i]`, int32, and its queries see its first `seqused_k[i]` keys. `max_q` and `max_k` are
    upper bounds of the lengths.

    This is the operator behind torch's `varlen_attn`, which has no `seqused_k` before torch 2.12.
    """
    attend = torch.ops.aten._flash_attention_forward
    out: Tensor = attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, 0.0, False, False, seqused_k=seqused_k)[0]
    return out


def has_varlen(
    device: torch.device, dtype: torch.dtype, *, num_heads: int, num_key_heads: int, head_width: int
) -> bool:
    """Whether a network with these heads can process packed rows on this device in this dtype.

    Runs the kernel once to check its results. Logs a warning if the kernel fails or its results are wrong. If this
    returns false, rows have to be padded to one length.
    """
    if device.type != "cuda" or dtype not in _HALF:
        return False
    try:
        return is_varlen_correct(
            attend_packed,
            device=device,
            dtype=dtype,
            num_heads=num_heads,
            num_key_heads=num_key_heads,
            head_width=head_width,
        )
    except (RuntimeError, TypeError, ValueError) as error:  # another torch, or an unsupported head width
        log.warning("rows are padded: torch's attention for packed rows does not run here: %s", error)
        return False


@torch.inference_mode()
def is_varlen_correct(
    varlen: VarlenAttention,
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_heads: int,
    num_key_heads: int,
    head_width: int,
) -> bool:
    """Whether `varlen` is correct in the cases that SegmentAttention needs.

    The cases are rows of length 0, rows with fewer keys than queries, and contexts stored in another order than the
    rows.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    lengths, keys = torch.tensor([70, 5, 131, 0, 0]), torch.tensor([70, 3, 100, 0, 0])
    table = [part.to(device, torch.int32) for part in (lengths, keys, torch.tensor([2, 0, 1, 0, 0]))]
    segments = Segments.of(*table[:2], num_prefix=0, num_tokens=256, longest_frames=200)
    attention = SegmentAttention(varlen, segments, slots=table[2])
    q, k, v = (draw(1, num_heads, 256, head_width) for _ in range(3))
    own = attention.within(q, k, v)
    memory = draw(3, 2, 2, num_key_heads, 19, head_width)
    key, value = attention.context(memory, layer=1)
    other = attention.to_context(q, key, value)
    start = 0
    for row, (length, num_keys) in enumerate(zip(lengths.tolist(), keys.tolist(), strict=True)):
        if not length:
            continue
        queries, seen = slice(start, start + length), slice(start, start + num_keys)
        expected = F.scaled_dot_product_attention(q[:, :, queries], k[:, :, seen], v[:, :, seen])
        slot = (2, 0, 1)[row]
        shared = memory[slot, 1].repeat_interleave(num_heads // num_key_heads, dim=1)
        expected_other = F.scaled_dot_product_attention(q[:, :, queries], shared[None, 0], shared[None, 1])
        for got, wanted in ((own, expected), (other, expected_other)):
            error = (got[:, :, queries] - wanted).abs().max()
            if not error <= _TOLERANCE:  # unlike `error > _TOLERANCE`, also true if the error is NaN
                log.warning("rows are padded: torch's attention for packed rows is off by %s", float(error))
                return False
        start += length
    return True


class _Contexts(NamedTuple):
    """Where the context tokens of each row are."""

    starts: Tensor  # (rows + 1,) int32: the index of each row's first context token; the last value is not used
    num_keys: Tensor  # (rows,) int32: the number of context tokens
    longest: int


class SegmentAttention:
    """Self-attention within each packed row, and cross-attention to the row's context.

    One tensor holds the contexts of all requests. Its first axis is indexed by slot.
    """

    def __init__(self, varlen: VarlenAttention, segments: Segments, *, slots: Tensor | None) -> None:
        """`slots` (rows,) has the index of each row's context among all contexts; None if no row has a context."""
        self._varlen = varlen
        self._segments = segments
        self._slots = slots
        self._contexts: _Contexts | None = None

    def within(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: PLR0917  # the signature of `Attend`
        """Self-attention within each row. Arguments and result are (1, heads, tokens of all rows, head width)."""
        segments = self._segments
        out = self._varlen(
            *(part[0].transpose(0, 1) for part in (q, k, v)),
            segments.offsets,
            segments.offsets,
            segments.longest,
            segments.longest,
            seqused_k=segments.num_keys,
        )
        return out.transpose(0, 1)[None]

    def context(self, held: Tensor, *, layer: int) -> tuple[Tensor, Tensor]:
        """Returns one layer's keys and values of all contexts, for `to_context`.

        `held`, the tensor of contexts, is (slots, layers, 2, key heads, context tokens, head width). Keys and values
        are views of it as (tokens, key heads, head width), in which the tokens of slot i begin at index `i * between`.
        """
        num_slots, num_layers, _, num_heads, num_tokens, width = held.shape
        between = num_layers * 2 * num_heads * num_tokens
        size = (num_slots - 1) * between + num_tokens, num_heads, width
        stride = width, num_tokens * width, 1
        if self._contexts is None:  # all layers share it
            assert self._slots is not None
            starts = F.pad((self._slots * between).to(torch.int32), (0, 1))
            self._contexts = _Contexts(starts, torch.full_like(starts[1:], num_tokens), num_tokens)
        first = held.storage_offset() + 2 * layer * num_heads * num_tokens * width
        key, value = (held.as_strided(size, stride, first + part * num_heads * num_tokens * width) for part in range(2))
        return key, value

    def to_context(self, q: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: PLR0917  # the signature of `Attend`
        """Cross-attention of each row to its context, with `key` and `value` from `context`.

        `q` and the result are (1, heads, tokens of all rows, head width).
        """
        segments, contexts = self._segments, self._contexts
        assert contexts is not None
        out = self._varlen(
            q[0].transpose(0, 1),
            key,
            value,
            segments.offsets,
            contexts.starts,
            segments.longest,
            contexts.longest,
            seqused_k=contexts.num_keys,
        )
        return out.transpose(0, 1)[None]
