"""Multi-head attention, plain and differential, self and cross; the caller chooses which keys a query may see.

Differential attention is `softmax(q k) v - softmax(q' k') v`: both halves share v and run as one call with twice the
heads. Shapes: N tokens, T context tokens, H heads (2 H when differential), E head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stable_audio_serve.models.blocks.norms import build_head_norm
from stable_audio_serve.models.blocks.rotary import RotaryTable, rotate

# queries, keys (B, H, N, E) and values (B, H, N, E) -> (B, H, N, E)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:  # noqa: PLR0917
    """Softmax attention with scale 1 / sqrt(E); `mask` is bool, broadcastable to (B, H, N, T), true = may be seen.

    Inference uses the fused kernel. Training on a CPU uses the explicit softmax, because the backward pass of the
    fused CPU kernel is twice as slow.
    """
    if q.device.type == "cpu" and q.requires_grad and torch.is_grad_enabled():
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend_band(q: Tensor, k: Tensor, v: Tensor, *, radius: int, block: int = 64) -> Tensor:  # noqa: PLR0917
    """Attention in which query i sees keys i - radius ... i + radius, clipped at both ends; memory linear in N.

    Queries are cut into blocks that each see their own keys and a halo of `radius` on both sides under a band mask.
    """
    batch, heads, length, width = q.shape
    block = min(block, length)
    num_blocks = -(-length // block)
    tail = num_blocks * block - length
    span = block + 2 * radius

    def halo(x: Tensor) -> Tensor:  # (B, H, N, E) -> (B * blocks, H, span, E)
        windows = F.pad(x, (0, 0, radius, radius + tail)).unfold(2, span, block)
        return windows.permute(0, 2, 1, 4, 3).reshape(batch * num_blocks, heads, span, width)

    queries = F.pad(q, (0, 0, 0, tail)).unflatten(2, (num_blocks, block)).transpose(1, 2).flatten(0, 1)
    mask = _band_mask(length, num_blocks=num_blocks, block=block, radius=radius, device=q.device)
    out = attend(queries, halo(k), halo(v), mask=mask.repeat(batch, 1, 1, 1))
    return out.unflatten(0, (batch, num_blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def _band_mask(length: int, *, num_blocks: int, block: int, radius: int, device: torch.device) -> Tensor:
    """Returns a mask (blocks, 1, block, block + 2 radius) bool: key inside the band and inside the sequence."""
    query = torch.arange(num_blocks * block, device=device).view(num_blocks, 1, block, 1)
    first_key = torch.arange(num_blocks, device=device).view(num_blocks, 1, 1, 1) * block - radius
    key = first_key + torch.arange(block + 2 * radius, device=device)
    inside = (key >= 0) & (key < length)
    # A query behind the end would see nothing, and softmax over nothing is NaN; its output is dropped anyway.
    return ((key - query).abs() <= radius) & (inside | (query >= length))


class SelfAttention(nn.Module):
    """Self-attention with one fused projection: q, k, v, and q', k' behind them when differential."""

    def __init__(self, width: int, *, num_heads: int, differential: bool, head_norm: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.differential = differential
        self.to_qkv = nn.Linear(width, (5 if differential else 3) * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.q_norm = build_head_norm(head_norm, width // num_heads)
        self.k_norm = build_head_norm(head_norm, width // num_heads)

    def forward(self, x: Tensor, *, rotary: RotaryTable, attend_fn: Attend) -> Tensor:
        """(B, N, width) -> (B, N, width)."""
        parts = self.to_qkv(x).chunk(5 if self.differential else 3, dim=-1)
        q, k, v, *primed = (split_heads(part, self.num_heads) for part in parts)
        if primed:
            q, k = torch.cat([q, primed[0]], dim=1), torch.cat([k, primed[1]], dim=1)
        q, k = rotate(self.q_norm(q), rotary), rotate(self.k_norm(k), rotary)
        out = _subtract(attend_fn(q, k, torch.cat([v, v], dim=1))) if primed else attend_fn(q, k, v)
        return self.to_out(merge_heads(out))


class CrossAttention(nn.Module):
    """Attention to a context that carries no positions; its keys and values can be projected once and kept."""

    def __init__(self, width: int, *, context_width: int, num_heads: int, differential: bool, head_norm: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.differential = differential
        self.to_q = nn.Linear(width, (2 if differential else 1) * width, bias=False)
        self.to_kv = nn.Linear(context_width, (3 if differential else 2) * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.q_norm = build_head_norm(head_norm, width // num_heads)
        self.k_norm = build_head_norm(head_norm, width // num_heads)

    def project_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Returns normed keys (B, H or 2 H, T, E) and values (B, H, T, E) of a context (B, T, context width)."""
        *keys, values = self.to_kv(context).chunk(3 if self.differential else 2, dim=-1)
        key = torch.cat([split_heads(part, self.num_heads) for part in keys], dim=1)
        return self.k_norm(key), split_heads(values, self.num_heads)

    def forward(self, x: Tensor, *, key: Tensor, value: Tensor, attend_fn: Attend = attend) -> Tensor:
        """(B, N, width) -> (B, N, width); every context token is seen. Zero keys and values give exactly zero."""
        queries = self.to_q(x).chunk(2 if self.differential else 1, dim=-1)
        q = self.q_norm(torch.cat([split_heads(part, self.num_heads) for part in queries], dim=1))
        if self.differential:
            out = _subtract(attend_fn(q, key, torch.cat([value, value], dim=1)))
        else:
            out = attend_fn(q, key, value)
        return self.to_out(merge_heads(out))


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, H * E) -> (B, H, N, E)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, E) -> (B, N, H * E)."""
    return x.transpose(1, 2).flatten(2)


def _subtract(out: Tensor) -> Tensor:
    """(B, 2 H, N, E), the primed heads last -> (B, H, N, E)."""
    plain, primed = out.chunk(2, dim=1)
    return plain - primed
