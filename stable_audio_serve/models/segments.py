"""Where the rows of a packed batch lie among its tokens, as tensors on their device: so that work that was recorded
once serves other rows. Knows no network.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Segments:
    """B rows among N tokens, one after another. All whole numbers are int32.

    A row's tokens are `num_prefix` of the network's own and then its latent frames; a row that is not there has none.
    Tokens behind the last row are in no row: they do nothing, and what becomes of them is unspecified.
    """

    offsets: Tensor  # (B + 1,): where each row's tokens begin, and where the last one's end
    num_keys: Tensor  # (B,): so many of a row's first tokens are keys
    rows: Tensor  # (N,): each token's row; some row, if it is in none
    positions: Tensor  # (N,): each token's place in its row
    is_frame: Tensor  # (N,) bool: whether the token is a latent frame
    longest: int  # no row has more tokens

    @classmethod
    def of(
        cls, frames: Tensor, valid_frames: Tensor, *, num_prefix: int, num_tokens: int, longest_frames: int
    ) -> Segments:
        """Returns where rows of `frames` (B,) latent frames lie, the first `valid_frames` (B,) of which are keys; rows
        of 0 frames are not there. Together they have at most `num_tokens` tokens."""
        is_there = frames > 0
        offsets = F.pad((frames + num_prefix * is_there).cumsum(0, dtype=torch.int32), (1, 0))
        tokens = torch.arange(num_tokens, device=frames.device, dtype=torch.int32)
        rows = torch.bucketize(tokens, offsets[1:], out_int32=True, right=True).clamp(max=len(frames) - 1)
        positions = tokens - offsets.index_select(0, rows)
        return cls(
            offsets,
            num_keys=(valid_frames + num_prefix * is_there).to(torch.int32),
            rows=rows,
            positions=positions,
            is_frame=(positions >= num_prefix) & (tokens < offsets[-1]),
            longest=longest_frames + num_prefix,
        )
