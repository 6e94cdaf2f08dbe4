"""A layout defines how the rows of a call are stored in a tensor of tokens. It implements the operations that depend on
this: attention, positions, per-row modulation and prefix tokens. This module has the padded layout; `packed` and
`packed_segments` have layouts without padding. Independent of weights.

Shapes: B rows of F frames, P prefix tokens before a row's frames, W width, H heads, E head width, T context tokens.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from stable_audio_serve.models.blocks.attention import attend, key_mask


class Layout(Protocol):
    """Padded tokens are (B, P + F, W). Packed tokens are (1, N, W), where N counts the tokens of all rows."""

    shares_heads: bool  # `attend_context` accepts fewer key heads than query heads, as in grouped-query attention

    def join(self, prefix: Tensor, frames: Tensor) -> Tensor:
        """Insert each row's `prefix` (P, W) or (B, P, W) before its `frames`."""
        ...

    def frames(self, tokens: Tensor) -> Tensor:
        """Remove the prefixes."""
        ...

    def positions(self, device: torch.device) -> Tensor:
        """Returns each token's position in its row, (P + F,) or (N,) float32."""
        ...

    def modulate(self, x: Tensor, *, scale: Tensor, shift: Tensor) -> Tensor:
        """Returns `x * scale + shift` with one scale and shift per row, (B, W)."""
        ...

    def add_gated(self, h: Tensor, update: Tensor, *, gate: Tensor) -> Tensor:
        """Returns `h + gate * update` with one gate per row, (B, W); `h` may be overwritten."""
        ...

    def add_local(self, h: Tensor, local: Tensor) -> None:
        """Add `local` to the frames of h in place: (B, F or 1, W); packed (1, N, W), with zeros at prefix tokens."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: PLR0917  # an `Attend`
        """Self-attention within each row, (B, H, P + F, E) or (1, H, N, E); invalid frames are not keys."""
        ...

    def attend_context(self, q: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: PLR0917  # an `Attend`
        """Attention of each row's tokens to the row's context; keys and values come from `context`."""
        ...

    def context(self, held: Tensor, *, layer: int) -> tuple[Tensor, Tensor]:
        """Returns one layer's keys and values (B, H, T, E) from those of all layers (B, layers, 2, H, T, E)."""
        ...


class Padded:
    """Rows padded to one length. `valid` (B, F) bool marks the frames that are keys; None if all are keys.

    `dtype` is the dtype of the queries.
    """

    shares_heads = False

    def __init__(self, num_frames: int, *, num_prefix: int, valid: Tensor | None, dtype: torch.dtype) -> None:
        self._num_tokens = num_prefix + num_frames
        self._num_prefix = num_prefix
        self._mask = None if valid is None else key_mask(valid, leading=num_prefix, dtype=dtype)

    def join(self, prefix: Tensor, frames: Tensor) -> Tensor:
        return torch.cat([prefix.expand(len(frames), -1, -1), frames], dim=1)

    def frames(self, tokens: Tensor) -> Tensor:
        return tokens[:, self._num_prefix :]

    def positions(self, device: torch.device) -> Tensor:
        return torch.arange(self._num_tokens, device=device, dtype=torch.float32)

    def modulate(self, x: Tensor, *, scale: Tensor, shift: Tensor) -> Tensor:
        return torch.addcmul(shift[:, None], x, scale[:, None])

    def add_gated(self, h: Tensor, update: Tensor, *, gate: Tensor) -> Tensor:
        return torch.addcmul(h, gate[:, None], update)

    def add_local(self, h: Tensor, local: Tensor) -> None:
        h[:, self._num_prefix :] += local

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: PLR0917  # an `Attend`
        return attend(q, k, v, mask=self._mask)

    def attend_context(self, q: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: PLR0917  # an `Attend`
        return attend(q, key, value)

    def context(self, held: Tensor, *, layer: int) -> tuple[Tensor, Tensor]:
        return held[:, layer, 0], held[:, layer, 1]
