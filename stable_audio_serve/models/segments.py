"""Which tokens of a packed batch (one sequence of tokens without padding) belong to which row, as device tensors.

Because the row lengths are in tensors, a captured CUDA graph can be replayed for rows of other lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Segments:
    """Which of N tokens belong to which of B rows. All integer tensors are int32.

    The tokens of a row are a few prefix tokens and then the row's latent frames. An unused row has no tokens. Tokens
    after the last row belong to no row: they have no effect, and their results are unspecified.
    """

    offsets: Tensor  # (rows + 1,): the index of each row's first token, and the end of the last row
    num_keys: Tensor  # (rows,): how many tokens of each row, from its start, are keys in attention
    rows: Tensor  # (tokens,): the row of each token; arbitrary for tokens that belong to no row
    positions: Tensor  # (tokens,): the position of each token in its row
    is_frame: Tensor  # (tokens,) bool: whether the token is a latent frame, not a prefix token
    longest: int  # upper bound on the number of tokens of a row

    @classmethod
    def of(
        cls, frames: Tensor, valid_frames: Tensor, *, num_prefix: int, num_tokens: int, longest_frames: int
    ) -> Segments:
        """Place rows one after another. `frames` (rows,) has the number of latent frames of each row.

        The first `valid_frames` (rows,) frames of each row are keys in attention. A row with 0 frames is unused. All
        rows must fit into `num_tokens` tokens. `longest_frames` is an upper bound of `frames`.
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
