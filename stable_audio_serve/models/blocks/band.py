"""Sliding-window attention: a query sees only nearby keys. Memory use is linear in the number of tokens.

For inference only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stable_audio_serve.models.blocks.attention import attend, empty_mask


class BandAttention:
    """Attention in `batch` sequences of `length` tokens: query i sees keys i - radius to i + radius.

    Queries are cut into blocks of `block` tokens. A block attends to its own keys and to `radius` more keys before and
    after it. A mask hides the keys that are too far from a query. All sequences are stored in one buffer, with zeros
    between them, so that the keys of a block are a view of the buffer. The first call creates the mask and the buffer,
    so the layers of a network should share one instance.
    """

    def __init__(self, batch: int, length: int, *, radius: int, block: int = 64) -> None:
        self._batch, self._length, self._radius, self._block = batch, length, radius, block
        self._blocks_per_row = -(-(length + radius) // block)
        self._buffer: Tensor | None = None
        self._mask: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: PLR0917  # the signature of `Attend`
        """Queries, keys and values -> attention output, each (batch, heads, tokens, head width)."""
        buffer = self._prepare(q)
        rows = buffer[self._radius : len(buffer) - self._radius].unflatten(0, (self._batch, -1))[:, : self._length]
        for part, values in enumerate((q, k, v)):
            rows[:, :, part].copy_(values.transpose(1, 2))
        span = self._block + 2 * self._radius
        queries = buffer[self._radius : len(buffer) - self._radius, 0].unflatten(0, (-1, self._block)).transpose(1, 2)
        keys, values = (buffer[:, part].unfold(0, span, self._block).transpose(2, 3) for part in (1, 2))
        out = attend(queries, keys, values, mask=self._mask).transpose(1, 2)
        return out.reshape(self._batch, -1, *out.shape[2:])[:, : self._length].transpose(1, 2)

    def _prepare(self, q: Tensor) -> Tensor:
        """Returns the buffer (tokens, 3, heads, head width) for queries, keys and values. It is zero between sequences.

        On the first call, creates the buffer and the mask.
        """
        if self._buffer is None:
            tokens = self._batch * self._blocks_per_row * self._block + 2 * self._radius
            self._buffer = q.new_zeros(tokens, 3, q.shape[1], q.shape[3])
            self._mask = self._make_mask(q)
        return self._buffer

    def _make_mask(self, q: Tensor) -> Tensor:
        """Returns the mask (blocks, 1, block, block + 2 radius).

        It hides keys outside the sequence and keys more than `radius` tokens from the query.
        """
        blocks, block, radius, device = self._blocks_per_row, self._block, self._radius, q.device
        query = torch.arange(blocks * block, device=device).view(blocks, 1, block, 1)
        first_key = torch.arange(blocks, device=device).view(blocks, 1, 1, 1) * block - radius
        key = first_key + torch.arange(block + 2 * radius, device=device)
        inside = (key >= 0) & (key < self._length)
        # Queries after the end of the sequence (padding) see keys there: without a visible key, the softmax would be
        # NaN. The output of these queries is dropped.
        hidden = ((key - query).abs() > radius) | ~(inside | (query >= self._length))
        mask = empty_mask((self._batch * blocks, *hidden.shape[1:]), dtype=q.dtype, device=device).zero_()
        mask.unflatten(0, (self._batch, blocks)).masked_fill_(hidden, float("-inf"))
        return mask
