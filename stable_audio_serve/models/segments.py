"""The positions of a packed batch's rows among its tokens, as device tensors, so that a captured CUDA graph can be
replayed for other rows. Independent of networks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Segments:
    """B rows among N tokens, one after another. All integers are int32.

    A row's tokens are `num_prefix` prefix tokens and then its latent frames; an unused row has none.
    Tokens after the last row belong to no row: they have no effect, and their results are unspecified.
    """

    offsets: Tensor  # (B + 1,): the start of each row's tokens, and the end of the last row
    num_keys: Tensor  # (B,): the number of each row's leading tokens that are keys
    rows: Tensor  # (N,): each token's row; arbitrary for tokens of no row
    positions: Tensor  # (N,): each token's position in its row
    is_frame: Tensor  # (N,) bool: whether the token is a latent frame
    longest: int  # upper bound on the tokens of a row

    @classmethod
    def of(
        cls, frames: Tensor, valid_frames: Tensor, *, num_prefix: int, num_tokens: int, longest_frames: int
    ) -> Segments:
        """Lay out rows of `frames` (B,) latent frames, of which the first `valid_frames` (B,) are keys.

        Rows of 0 frames are unused. The rows must fit into `num_tokens` tokens.
        """
        is_used = frames > 0
        offsets = F.pad((frames + num_prefix * is_used).cumsum(0, dtype=torch.int32), (1, 0))
        tokens = torch.arange(num_tokens, device=frames.device, dtype=torch.int32)
        rows = torch.bucketize(tokens, offsets[1:], out_int32=True, right=True).clamp(max=len(frames) - 1)
        positions = tokens - offsets.index_select(0, rows)
        return cls(
            offsets,
            num_keys=(valid_frames + num_prefix * is_used).to(torch.int32),
            rows=rows,
            positions=positions,
            is_frame=(positions >= num_prefix) & (tokens < offsets[-1]),
            longest=longest_frames + num_prefix,
        )
