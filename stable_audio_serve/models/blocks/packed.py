"""The packed layout: rows of different lengths are one sequence of tokens without padding. Linear layers and norms
process all tokens at once. Attention and per-row modulation process each row separately. Here the row lengths are
Python integers; in the module `packed_segments` they are tensors on the device. Inference only.

Shapes as in `layouts`; N is the number of tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from stable_audio_serve.models.blocks.attention import attend
from stable_audio_serve.models.blocks.fused import Places


@dataclass(frozen=True, slots=True)
class _Span:
    """Adjacent rows of equal length: rows [row, row + count), stored in tokens [start, start + count * length).

    The first `num_keys` tokens of each row are keys in attention.
    """

    row: int
    count: int
    start: int
    length: int
    num_keys: int

    def tokens(self, x: Tensor) -> Tensor:
        """Returns these rows' tokens (count, length, width) as a view of all tokens x (1, tokens, width)."""
        return x[0, self.start : self.start + self.count * self.length].unflatten(0, (self.count, self.length))

    def heads(self, x: Tensor) -> Tensor:
        """Returns these rows' tokens (count, heads, length, width) as a view of x (1, heads, tokens, width)."""
        own = x[0, :, self.start : self.start + self.count * self.length]
        return own.unflatten(1, (self.count, self.length)).transpose(0, 1)

    def rows(self, values: Tensor) -> Tensor:
        """Returns these rows' entries (count, ...) as a view of `values`, which has one entry per row of the batch."""
        return values[self.row : self.row + self.count]


class Packed:
    """A packed layout that processes one row after another, or adjacent rows of equal length together. This suits a
    CPU, where many small operations are cheap.

    `frames` has the number of latent frames of each row. Of a row's frames, only the first `valid_frames` are keys in
    attention.
    """

    shares_heads = False

    def __init__(self, frames: Sequence[int], valid_frames: Sequence[int], *, num_prefix: int) -> None:
        self.num_prefix = num_prefix
        self.places = Places(None, None, num_prefix)  # not used: only a GPU has kernels that read it
        self._spans = tuple(_spans(frames, valid_frames, num_prefix=num_prefix))

    def join(self, prefix: Tensor, frames: Tensor) -> Tensor:
        num_rows = sum(span.count for span in self._spans)
        prefixes = prefix.expand(num_rows, -1, -1)
        pieces: list[Tensor] = []
        start = 0
        for span in self._spans:
            stop = start + span.count * (span.length - self.num_prefix)
            own = frames[0, start:stop].unflatten(0, (span.count, -1))
            pieces.append(torch.cat([span.rows(prefixes), own], dim=1).flatten(0, 1))
            start = stop
        return _joined(pieces)[None]

    def frames(self, tokens: Tensor) -> Tensor:
        return _joined([span.tokens(tokens)[:, self.num_prefix :].flatten(0, 1) for span in self._spans])[None]

    def positions(self, device: torch.device) -> Tensor:
        spans = (span for span in self._spans for _ in range(span.count))
        return torch.cat([torch.arange(span.length, device=device, dtype=torch.float32) for span in spans])

    def modulate(self, x: Tensor, *, scale: Tensor, shift: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for span in self._spans:
            rows = span.rows(shift)[:, None], span.tokens(x), span.rows(scale)[:, None]
            torch.addcmul(*rows, out=span.tokens(out))
        return out

    def add_gated(self, h: Tensor, update: Tensor, *, gate: Tensor) -> Tensor:
        for span in self._spans:
            span.tokens(h).addcmul_(span.tokens(update), span.rows(gate)[:, None])
        return h

    def add_local(self, h: Tensor, local: Tensor) -> None:
        h += local

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: PLR0917  # the signature of `Attend`
        return _join_heads(
            attend(span.heads(q), span.heads(k)[:, :, : span.num_keys], span.heads(v)[:, :, : span.num_keys])
            for span in self._spans
        )

    def attend_context(self, q: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: PLR0917  # the signature of `Attend`
        return _join_heads(attend(span.heads(q), span.rows(key), span.rows(value)) for span in self._spans)

    def context(self, held: Tensor, *, layer: int) -> tuple[Tensor, Tensor]:
        return held[:, layer, 0], held[:, layer, 1]


def _spans(frames: Sequence[int], valid_frames: Sequence[int], *, num_prefix: int) -> Iterable[_Span]:
    row = start = 0
    for (length, num_valid), group in groupby(zip(frames, valid_frames, strict=True)):
        count = len(list(group))
        yield _Span(row, count, start=start, length=num_prefix + length, num_keys=num_prefix + num_valid)
        row += count
        start += count * (num_prefix + length)


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def _join_heads(spans: Iterable[Tensor]) -> Tensor:
    """Concatenate attention results of `_Span`s, (count, heads, length, head width), to (1, heads, tokens, head width).

    In memory, the token axis comes before the head axis, so that merging the heads needs no copy.
    """
    return _joined([out.transpose(1, 2).flatten(0, 1) for out in spans]).transpose(0, 1)[None]
