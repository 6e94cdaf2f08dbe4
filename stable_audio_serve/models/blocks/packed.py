"""Rows of different lengths as one sequence of tokens without padding: linear layers and norms see all tokens at once,
attention and what a row gives its tokens stay within the row. `packed_layout` chooses how. For inference only.

Shapes as in `layouts`; N is the number of tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from stable_audio_serve.models.blocks.attention import attend

# (queries, keys, values, query offsets, key offsets, longest query, longest key), as torch's function
VarlenAttention = Callable[..., Any]

_HALF = (torch.float16, torch.bfloat16)


@lru_cache(maxsize=64)  # rows step together many times
def packed_layout(
    frames: tuple[int, ...],
    valid_frames: tuple[int, ...],
    *,
    num_prefix: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Packed:
    """Returns the layout of rows of `frames`, of which the first `valid_frames` are keys.

    On a CPU, and in float32 anywhere, rows are visited one after another, neighbours of equal lengths together. On CUDA
    in half precision one kernel takes all rows, where the installed torch has it (2.10). Its longest lengths are
    numbers, so they stay as they are in a captured graph.
    """
    varlen = _find_varlen() if device.type == "cuda" and dtype in _HALF else None
    if varlen is None:
        return Packed(frames, valid_frames, num_prefix=num_prefix)
    return PackedOnDevice(frames, valid_frames, num_prefix=num_prefix, device=device, varlen=varlen)


def _find_varlen() -> VarlenAttention | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


@dataclass(frozen=True, slots=True)
class _Span:
    """Neighbouring rows of equal lengths: rows [row, row + count), tokens [start, start + count * length), of which
    each row's first `num_keys` are keys."""

    row: int
    count: int
    start: int
    length: int
    num_keys: int

    def tokens(self, x: Tensor) -> Tensor:
        """A view (count, length, W) of x (1, N, W)."""
        return x[0, self.start : self.start + self.count * self.length].unflatten(0, (self.count, self.length))

    def heads(self, x: Tensor) -> Tensor:
        """A view (count, H, length, E) of x (1, H, N, E)."""
        own = x[0, :, self.start : self.start + self.count * self.length]
        return own.unflatten(1, (self.count, self.length)).transpose(0, 1)

    def rows(self, values: Tensor) -> Tensor:
        """A view (count, ...) of values (B, ...)."""
        return values[self.row : self.row + self.count]


class Packed:
    """The layout that visits the rows one after another: nothing but views of the tokens, so it suits a CPU, where
    another operation costs little."""

    def __init__(self, frames: Sequence[int], valid_frames: Sequence[int], *, num_prefix: int) -> None:
        self.num_prefix = num_prefix
        self._spans = tuple(_spans(frames, valid_frames, num_prefix=num_prefix))
        self.num_tokens = sum(span.count * span.length for span in self._spans)

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

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: PLR0917  # an `Attend`
        return _join_heads(
            attend(span.heads(q), span.heads(k)[:, :, : span.num_keys], span.heads(v)[:, :, : span.num_keys])
            for span in self._spans
        )

    def attend_context(self, q: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: PLR0917  # an `Attend`
        return _join_heads(attend(span.heads(q), span.rows(key), span.rows(value)) for span in self._spans)


class PackedOnDevice(Packed):
    """The layout whose operations take all rows at once, by tables of indices on the device."""

    def __init__(
        self,
        frames: Sequence[int],
        valid_frames: Sequence[int],
        *,
        num_prefix: int,
        device: torch.device,
        varlen: VarlenAttention,
    ) -> None:
        super().__init__(frames, valid_frames, num_prefix=num_prefix)
        self._varlen = varlen
        lengths = [length + num_prefix for length in frames]
        keys = [length + num_prefix for length in valid_frames]
        starts = list(accumulate(lengths, initial=0))
        self._longest, self._most_keys = max(lengths), max(keys)
        self._row_of = _on(torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)), device)
        self._positions = _on(super().positions(torch.device("cpu")), device)
        self._query_offsets = _on(torch.tensor(starts, dtype=torch.int32), device)
        self._key_offsets = self._query_offsets
        self._keys: Tensor | None = None  # which tokens are keys, None = all
        if keys != lengths:
            self._key_offsets = _on(torch.tensor(list(accumulate(keys, initial=0)), dtype=torch.int32), device)
            ranges = [torch.arange(start, start + count) for start, count in zip(starts, keys, strict=False)]
            self._keys = _on(torch.cat(ranges), device)

    def positions(self, device: torch.device) -> Tensor:
        return self._positions

    def modulate(self, x: Tensor, *, scale: Tensor, shift: Tensor) -> Tensor:
        return torch.addcmul(shift[self._row_of], x, scale[self._row_of])

    def add_gated(self, h: Tensor, update: Tensor, *, gate: Tensor) -> Tensor:
        return h.addcmul_(update, gate[self._row_of])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: PLR0917  # an `Attend`
        keys, values = (_tokens_first(part[0]) for part in (k, v))
        if self._keys is not None:
            keys, values = keys[self._keys], values[self._keys]
        return self._run(q, keys, values, key_offsets=self._key_offsets, most_keys=self._most_keys)

    def attend_context(self, q: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: PLR0917  # an `Attend`
        num_rows, _, num_keys, _ = key.shape
        offsets = num_keys * torch.arange(num_rows + 1, device=key.device, dtype=torch.int32)
        keys, values = (part.transpose(1, 2).flatten(0, 1) for part in (key, value))
        return self._run(q, keys, values, key_offsets=offsets, most_keys=num_keys)

    def _run(  # noqa: PLR0917  # q, k and v in the usual order
        self, q: Tensor, keys: Tensor, values: Tensor, *, key_offsets: Tensor, most_keys: int
    ) -> Tensor:
        """Q (1, H, N, E), keys and values (their tokens, H, E) -> (1, H, N, E)."""
        offsets = self._query_offsets, key_offsets
        out: Tensor = self._varlen(_tokens_first(q[0]), keys, values, *offsets, self._longest, most_keys)
        return out.transpose(0, 1)[None]


def join_local(rows: Sequence[Tensor], *, frames: Sequence[int], num_prefix: int) -> Tensor:
    """Returns local conditioning of packed tokens, (1, layers, N, W), from rows (1, layers, F or 1, W); zero at the
    prefixes."""
    layers, width = rows[0].shape[1], rows[0].shape[3]
    nothing = rows[0].new_zeros(layers, num_prefix, width)
    owns = (row[0].expand(layers, count, width) for row, count in zip(rows, frames, strict=True))
    return torch.cat([part for own in owns for part in (nothing, own)], dim=1)[None]


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
    """Rows' results (count, H, length, E) each -> (1, H, N, E), its tokens in front of its heads in memory."""
    return _joined([out.transpose(1, 2).flatten(0, 1) for out in spans]).transpose(0, 1)[None]


def _tokens_first(x: Tensor) -> Tensor:
    """(H, N, E) -> (N, H, E)."""
    return x.transpose(0, 1)


def _on(table: Tensor, device: torch.device) -> Tensor:
    """Copy a table to a device without waiting for it."""
    pinned = table.pin_memory() if device.type == "cuda" else table
    return pinned.to(device, non_blocking=True)
