"""The packed layout (all rows in one sequence, without padding) with row lengths in tensors on the device.

Every operation processes all tokens at once with index tensors, so that a captured CUDA graph can be replayed for rows
of other lengths. Inference on one device. Shapes as in `packed`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stable_audio_serve.models.blocks.fused import Places
from stable_audio_serve.models.blocks.varlen import SegmentAttention, VarlenAttention
from stable_audio_serve.models.segments import Segments


class PackedSegments:
    """The layout of packed rows. `segments` says which tokens belong to which row.

    Tokens that belong to no row are computed too, but affect no row. `slots` (rows,) has the index of each row's
    context in a tensor that holds many contexts; None if no row has a context.
    """

    shares_heads = True

    def __init__(self, segments: Segments, *, num_prefix: int, slots: Tensor | None, varlen: VarlenAttention) -> None:
        self.places = Places(segments.rows, segments.is_frame, num_prefix)
        self._segments = segments
        self._num_prefix = num_prefix
        attention = SegmentAttention(varlen, segments, slots=slots)
        self.attend, self.attend_context, self.context = attention.within, attention.to_context, attention.context

    def join(self, prefix: Tensor, frames: Tensor) -> Tensor:
        places = self._segments.positions.clamp(max=self._num_prefix - 1)
        if prefix.dim() == 3:  # (rows, prefix tokens, width): each row has its own prefix
            places = places + self._segments.rows * self._num_prefix
            prefix = prefix.flatten(0, 1)
        return torch.where(self._segments.is_frame[:, None], frames, prefix.index_select(0, places).to(frames.dtype))

    def frames(self, tokens: Tensor) -> Tensor:
        return tokens

    def positions(self, device: torch.device) -> Tensor:
        return self._segments.positions.float()

    def modulate(self, x: Tensor, *, scale: Tensor, shift: Tensor) -> Tensor:
        return torch.addcmul(self._by_token(shift), x, self._by_token(scale))

    def add_gated(self, h: Tensor, update: Tensor, *, gate: Tensor) -> Tensor:
        return h.addcmul_(update, self._by_token(gate))

    def add_local(self, h: Tensor, local: Tensor) -> None:
        """Add `local` to the frames of h, in place: (rows, 1, width), or (1, tokens, width) with zeros at prefixes."""
        if local.shape[1] > 1:
            h += local
        else:
            h.addcmul_(self._by_token(local[:, 0]), self._segments.is_frame[:, None].to(h.dtype))

    def _by_token(self, values: Tensor) -> Tensor:
        """Repeat each row's values for its tokens: (rows, width) -> (tokens, width)."""
        return values.index_select(0, self._segments.rows)
