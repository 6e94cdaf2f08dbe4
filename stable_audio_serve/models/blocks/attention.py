"""Multi-head attention: plain or differential, self or cross. The caller chooses the keys that each query sees.

Differential attention is `softmax(q k) v - softmax(q' k') v`. Both halves share v and run as one call with twice the
heads. Shapes: N tokens, T context tokens, H heads (2 H if differential), E head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stable_audio_serve.models.blocks.norms import build_head_norm
from stable_audio_serve.models.blocks.rotary import RotaryTable, rotate, without_affine

# queries, keys (B, H, N, E) and values (B, H, N, E) -> (B, H, N, E)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

_MASK_STEP = 16  # values


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:  # noqa: PLR0917
    """Softmax attention with scale 1 / sqrt(E). `mask` is added to the scores, in their dtype, and broadcasts to
    (B, H, N, T): 0 = visible, -inf = hidden.

    Inference uses the fused kernel. Training on a CPU uses the explicit softmax, because the backward pass of the
    fused CPU kernel is twice as slow.
    """
    if q.device.type == "cpu" and q.requires_grad and torch.is_grad_enabled():
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return (scores if mask is None else scores + mask).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def key_mask(valid: Tensor, *, leading: int, dtype: torch.dtype) -> Tensor:
    """Returns a mask for `attend` (B, 1, 1, leading + F) that hides the frames where `valid` (B, F) bool is false."""
    num_keys = leading + valid.shape[1]
    mask = empty_mask((len(valid), 1, 1, num_keys), dtype=dtype, device=valid.device).zero_()
    mask[..., leading:].masked_fill_(~valid[:, None, None], float("-inf"))
    return mask


def empty_mask(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns an uninitialised mask with rows aligned in memory, so that fused kernels can read it without a copy."""
    return torch.empty(*shape[:-1], -(-shape[-1] // _MASK_STEP) * _MASK_STEP, dtype=dtype, device=device)[
        ..., : shape[-1]
    ]


class SelfAttention(nn.Module):
    """Self-attention with one fused projection. Its output is (q, k, v), or (q, k, v, q', k') if differential."""

    def __init__(self, width: int, *, num_heads: int, differential: bool, head_norm: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_width = width // num_heads
        self.differential = differential
        self.to_qkv = nn.Linear(width, (5 if differential else 3) * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.q_norm = build_head_norm(head_norm, self.head_width)
        self.k_norm = build_head_norm(head_norm, self.head_width)

    def forward(self, x: Tensor, *, rotary: RotaryTable, attend_fn: Attend) -> Tensor:
        """(B, N, width) -> (B, N, width). `rotary` is this layer's table, with gain and bias of the head norms."""
        parts = self.to_qkv(x).unflatten(-1, (-1, self.num_heads, self.head_width))
        if not self.differential:
            normed = without_affine(self.q_norm, parts[:, :, :2], rate=rotary.rate)
            q, k = rotate(normed, rotary, dtype=parts.dtype).unbind(2)
            return self.to_out(merge_heads(attend_fn(*map(heads_first, (q, k, parts[:, :, 2])))))
        # From (q, k, v, q', k') select the pairs (q, k) and (q', k'), and order them as (q, q'), (k, k').
        pairs = parts.unfold(2, 2, 3).permute(0, 1, 5, 2, 3, 4)
        normed = without_affine(self.q_norm, pairs, rate=rotary.rate).flatten(3, 4)
        q, k = rotate(normed, rotary, dtype=parts.dtype).unbind(2)
        v = torch.cat([parts[:, :, 2]] * 2, dim=2)
        return self.to_out(merge_heads(subtract(attend_fn(*map(heads_first, (q, k, v))))))


class CrossAttention(nn.Module):
    """Attention to context tokens, which have no positions. Their keys and values can be projected once and reused."""

    def __init__(self, width: int, *, context_width: int, num_heads: int, differential: bool, head_norm: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_width = width // num_heads
        self.differential = differential
        self.to_q = nn.Linear(width, (2 if differential else 1) * width, bias=False)
        self.to_kv = nn.Linear(context_width, (3 if differential else 2) * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.q_norm = build_head_norm(head_norm, self.head_width)
        self.k_norm = build_head_norm(head_norm, self.head_width)

    def project_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Returns normed keys and values (B, H or 2 H, T, E) of a context (B, T, context width).

        For differential attention the values are repeated, once for each half of the keys.
        """
        parts = self.to_kv(context).unflatten(-1, (-1, self.num_heads, self.head_width))
        keys, values = parts[:, :, :-1].flatten(2, 3), parts[:, :, -1]
        if self.differential:
            values = torch.cat([values, values], dim=2)
        return heads_first(self.k_norm(keys)), heads_first(values)

    def forward(self, x: Tensor, *, key: Tensor, value: Tensor, attend_fn: Attend = attend) -> Tensor:
        """(B, N, width) -> (B, N, width); every context token is visible. Zero keys and values give exactly zero."""
        q = self.q_norm(self.to_q(x).unflatten(-1, (-1, self.head_width)))
        out = attend_fn(heads_first(q), key, value)
        return self.to_out(merge_heads(subtract(out) if self.differential else out))


def heads_first(x: Tensor) -> Tensor:
    """(B, N, H, E) -> (B, H, N, E)."""
    return x.transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, E) -> (B, N, H * E)."""
    return x.transpose(1, 2).flatten(2)


def subtract(out: Tensor) -> Tensor:
    """(B, 2 H, N, E), the primed heads last -> (B, H, N, E)."""
    plain, primed = out.chunk(2, dim=1)
    return plain - primed
