"""A layout defines how the rows of a batch are stored in one tensor of tokens. The operations that depend on the layout
are its methods: attention, positions, per-row modulation and prefix tokens. This module has the padded layout; the
modules `packed` and `packed_segments` have layouts without padding. Layouts have no weights.

Shapes: B rows of F frames, P prefix tokens before a row's frames, W width, H heads, E head width, T context tokens.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from stable_audio_serve.models.blocks.attention import attend, key_mask
from stable_audio_serve.models.blocks.fused import Places


class Layout(Protocol):
    """How rows are stored: padded (rows, prefix + frames, width), or packed (1, tokens of all rows, width)."""

    shares_heads: bool  # `attend_context` accepts fewer key heads than query heads, as in grouped-query attention
    places: Places

    def join(self, prefix: Tensor, frames: Tensor) -> Tensor:
        """Returns tokens: each row's `frames` after its `prefix`.

        `prefix` is (prefix tokens, width) if all rows share it, else (rows, prefix tokens, width).
        """
        ...

    def frames(self, tokens: Tensor) -> Tensor:
        """Returns the tokens without the rows' prefixes."""
        ...

    def positions(self, device: torch.device) -> Tensor:
        """Returns each token's position in its row, float32: (prefix + frames,) if padded, (all tokens,) if packed."""
        ...

    def modulate(self, x: Tensor, *, scale: Tensor, shift: Tensor) -> Tensor:
        """Returns `x * scale + shift`. `scale` and `shift` are (rows, width)."""
        ...

    def add_gated(self, h: Tensor, update: Tensor, *, gate: Tensor) -> Tensor:
        """Returns `h + gate * update`. `gate` is (rows, width); `h` may be overwritten."""
        ...

    def add_local(self, h: Tensor, local: Tensor) -> None:
        """Add the local conditioning `local` to the frames of h, in place.

        Padded, `local` is (rows, frames or 1, width). Packed, it is (1, tokens, width) with zeros at prefix tokens.
        """
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: PLR0917  # the signature of `Attend`
        """Self-attention within each row, over (batch, heads, tokens, head width). Invalid frames are not keys."""
        ...

    def attend_context(self, q: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: PLR0917  # the signature of `Attend`
        """Cross-attention of each row's tokens to the row's context. `key` and `value` are results of `context`."""
        ...

    def context(self, held: Tensor, *, layer: int) -> tuple[Tensor, Tensor]:
        """Returns one layer's cross-attention keys and values, for `attend_context`.

        `held` has the keys and values of all layers: (rows, layers, 2, heads, context tokens, head width).
        """
        ...


class Padded:
    """The layout of rows padded to one length.

    `valid` (rows, frames) bool marks the frames that are keys in attention. If it is None, all frames are. `dtype` is
    the dtype of the queries.
    """

    shares_heads = False

    def __init__(self, num_frames: int, *, num_prefix: int, valid: Tensor | None, dtype: torch.dtype) -> None:
        self._num_tokens = num_prefix + num_frames
        self._num_prefix = num_prefix
        self.places = Places(None, None, num_prefix)
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

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: PLR0917  # the signature of `Attend`
        return attend(q, k, v, mask=self._mask)

    def attend_context(self, q: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: PLR0917  # the signature of `Attend`
        return attend(q, key, value)

    def context(self, held: Tensor, *, layer: int) -> tuple[Tensor, Tensor]:
        return held[:, layer, 0], held[:, layer, 1]
