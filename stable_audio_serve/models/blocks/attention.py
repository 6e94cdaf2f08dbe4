"""Multi-head self-attention and cross-attention, plain or differential. Callers choose the keys that each query sees.

Differential attention is `softmax(q k) v - softmax(q' k') v`. Its two terms share v and are computed as one attention
with twice the heads. Shapes: B batch, N tokens, T context tokens, H heads (2 H if differential), E head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stable_audio_serve.models.blocks.fused import FusedModule, Kernels
from stable_audio_serve.models.blocks.norms import RMSNorm, build_head_norm
from stable_audio_serve.models.blocks.rotary import RotaryTable, rotate, without_affine

# (queries, keys, values) -> output, each of shape (batch, heads, tokens, head width)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

_MASK_STEP = 16  # values


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:  # noqa: PLR0917
    """Returns softmax attention with scores scaled by 1 / sqrt(head width).

    `mask` is added to the scores: 0 where a query sees a key, -inf where it does not. The mask has the dtype of the
    scores and broadcasts to (batch, heads, queries, keys).

    Inference uses the fused kernel. Training on a CPU computes the softmax explicitly, which is twice as fast as the
    backward pass of the fused CPU kernel.
    """
    if q.device.type == "cpu" and q.requires_grad and torch.is_grad_enabled():
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return (scores if mask is None else scores + mask).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def name_kernels(device: torch.device, dtype: torch.dtype, *, num_heads: int, head_width: int) -> str:
    """Returns the names of the kernels that torch chooses for `attend` without and with a mask; "" without a GPU."""
    if device.type != "cuda":
        return ""
    q = torch.empty(1, num_heads, _MASK_STEP, head_width, device=device, dtype=dtype)
    mask = empty_mask((1, 1, _MASK_STEP, _MASK_STEP), dtype=dtype, device=device).zero_()
    return f"{_name_kernel(q, None)}, masked {_name_kernel(q, mask)}"


def _name_kernel(q: Tensor, mask: Tensor | None) -> str:
    """Returns the first kernel that is enabled and can run, in the order in which torch tries kernels."""
    backends = torch.backends.cuda
    parameters = backends.SDPAParams(q, q, q, mask, 0.0, False, False)  # dropout, causal, grouped heads
    if backends.cudnn_sdp_enabled() and backends.can_use_cudnn_attention(parameters):
        return "cudnn"
    if backends.flash_sdp_enabled() and backends.can_use_flash_attention(parameters):
        return "flash"
    if backends.mem_efficient_sdp_enabled() and backends.can_use_efficient_attention(parameters):
        return "efficient"
    return "math"


def key_mask(valid: Tensor, *, leading: int, dtype: torch.dtype) -> Tensor:
    """Returns a mask for `attend` that hides every frame whose entry in `valid` (B rows, F frames) is false.

    The mask is (B, 1, 1, leading + F). The `leading` tokens before the frames are visible.
    """
    num_keys = leading + valid.shape[1]
    mask = empty_mask((len(valid), 1, 1, num_keys), dtype=dtype, device=valid.device).zero_()
    mask[..., leading:].masked_fill_(~valid[:, None, None], float("-inf"))
    return mask


def empty_mask(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns an uninitialised mask. Its rows are aligned in memory, because fused kernels would otherwise copy it."""
    return torch.empty(*shape[:-1], -(-shape[-1] // _MASK_STEP) * _MASK_STEP, dtype=dtype, device=device)[
        ..., : shape[-1]
    ]


class SelfAttention(FusedModule):
    """Self-attention. One linear layer computes (q, k, v), or (q, k, v, q', k') for differential attention."""

    def __init__(self, width: int, *, num_heads: int, differential: bool, head_norm: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_width = width // num_heads
        self.differential = differential
        self.to_qkv = nn.Linear(width, (5 if differential else 3) * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.q_norm = build_head_norm(head_norm, self.head_width)
        self.k_norm = build_head_norm(head_norm, self.head_width)

    def forward(self, x: Tensor, *, rotary: RotaryTable, attend_fn: Attend, radius: int | None = None) -> Tensor:
        """(batch, tokens, width) -> (batch, tokens, width).

        `rotary` must contain the gain and bias of `q_norm` and `k_norm`. If `attend_fn` lets query i see exactly keys
        i - radius to i + radius of its sequence, pass `radius`: a fused kernel may then be used instead.
        """
        parts = self.to_qkv(x).unflatten(-1, (-1, self.num_heads, self.head_width))
        if self.kernels is None:
            q, k = self._rotated(parts, rotary)
            v = torch.cat([parts[:, :, 2]] * 2, dim=2) if self.differential else parts[:, :, 2]
        else:
            is_local = radius is not None and self.kernels.has_local_attention(parts)
            q, k, v = self.kernels.rotated_heads(parts, norm=self.q_norm, table=rotary, repeats_values=not is_local)
            if radius is not None and is_local:
                return self.to_out(self.kernels.local_attention(q, k, v, radius=radius).flatten(2))
        out = attend_fn(*map(heads_first, (q, k, v)))
        return self.to_out(_joined(out, differential=self.differential, kernels=self.kernels))

    def _rotated(self, parts: Tensor, rotary: RotaryTable) -> tuple[Tensor, Tensor]:
        """Returns normalised and rotated queries and keys, each (batch, tokens, heads, head width)."""
        if self.differential:
            # Select the queries and keys of (q, k, v, q', k') and order them as (q, q'), (k, k').
            pairs = parts.unfold(2, 2, 3).permute(0, 1, 5, 2, 3, 4)
            normed = without_affine(self.q_norm, pairs, rate=rotary.rate).flatten(3, 4)
        else:
            normed = without_affine(self.q_norm, parts[:, :, :2], rate=rotary.rate)
        q, k = rotate(normed, rotary, dtype=parts.dtype).unbind(2)
        return q, k


class CrossAttention(FusedModule):
    """Cross-attention to context tokens without positions.

    `project_context` computes the context's keys and values once, for reuse in every `forward`. If `num_key_heads` is
    less than `num_heads`, consecutive query heads share a head of keys and values. Padding tokens of the context are
    not masked, as in the reference implementations.
    """

    def __init__(
        self,
        width: int,
        *,
        context_width: int,
        num_heads: int,
        num_key_heads: int,
        differential: bool,
        head_norm: str,
    ) -> None:
        super().__init__()
        self.num_key_heads = num_key_heads
        self.head_width = width // num_heads
        self.differential = differential
        self.to_q = nn.Linear(width, (2 if differential else 1) * width, bias=False)
        key_width = num_key_heads * self.head_width
        self.to_kv = nn.Linear(context_width, (3 if differential else 2) * key_width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.q_norm = build_head_norm(head_norm, self.head_width)
        self.k_norm = build_head_norm(head_norm, self.head_width)

    def project_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the normalised keys and the values of a context (batch, context tokens, context width).

        Both are (batch, key heads, context tokens, head width). Differential attention has twice as many heads: two
        sets of keys, and the values repeated for the second set.
        """
        parts = self.to_kv(context).unflatten(-1, (-1, self.num_key_heads, self.head_width))
        keys, values = parts[:, :, :-1].flatten(2, 3), parts[:, :, -1]
        if self.differential:
            values = torch.cat([values, values], dim=2)
        return heads_first(self.k_norm(keys)), heads_first(values)

    def forward(self, x: Tensor, *, key: Tensor, value: Tensor, attend_fn: Attend = attend) -> Tensor:
        """(batch, tokens, width) -> (batch, tokens, width). Every query sees every context token.

        If keys and values are zero, the result is exactly zero.
        """
        q = self.to_q(x).unflatten(-1, (-1, self.head_width))
        if self.kernels is not None and isinstance(self.q_norm, RMSNorm):
            q = self.kernels.normed_heads(q, gamma=self.q_norm.gamma, eps=self.q_norm.eps)
        else:
            q = self.q_norm(q)
        out = attend_fn(heads_first(q), key, value)
        return self.to_out(_joined(out, differential=self.differential, kernels=self.kernels))


def heads_first(x: Tensor) -> Tensor:
    """(batch, tokens, heads, head width) -> (batch, heads, tokens, head width)."""
    return x.transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(batch, heads, tokens, head width) -> (batch, tokens, heads * head width)."""
    return x.transpose(1, 2).flatten(2)


def _joined(out: Tensor, *, differential: bool, kernels: Kernels | None) -> Tensor:
    """Returns the input of the last linear layer, (batch, tokens, heads * head width).

    `out` (batch, heads, tokens, head width) is the result of the attention. Differential attention has twice as many
    heads, of which the second half is subtracted from the first.
    """
    if not differential:
        return merge_heads(out)
    if kernels is not None:
        return kernels.difference(merge_heads(out))
    plain, primed = out.chunk(2, dim=1)
    return merge_heads(plain - primed)
