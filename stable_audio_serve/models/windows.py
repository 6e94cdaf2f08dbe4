"""Windows over latent frames, in which an autoencoder encodes and decodes what is long. Pure arithmetic, no tensors."""

from __future__ import annotations

import math
from dataclasses import replace

from stable_audio_serve.models.protocol import WindowRule, WindowSpan

WINDOW_FRAMES, OVERLAP_FRAMES = 128, 32  # windows of the references' chunked encoding and decoding
LONGEST_FRAMES = 512  # of a window that follows a rule
_REDUNDANT_SHARE = 0.05  # what a planned window may decode beside the frames that it keeps, as a share of them
WINDOW_GRID = 16  # clips of nearly one length decode windows of one length, which share calls


def whole_window(frames: int) -> tuple[WindowSpan, ...]:
    """Returns one window over everything."""
    return (WindowSpan(0, frames, 0, frames),)


def chunked_windows(frames: int, *, size: int = WINDOW_FRAMES, overlap: int = OVERLAP_FRAMES) -> tuple[WindowSpan, ...]:
    """Returns windows of `size` frames every `size - overlap`, the last one anchored to the end.

    Joints are hard cuts half an overlap inside a window; where windows overlap further, the later one is kept. The
    kept parts tile the frames exactly. Fewer than `size` frames are one window.
    """
    if frames <= size:
        return whole_window(frames)
    starts = [*range(0, frames - size, size - overlap), frames - size]
    cuts = [0, *(start + overlap // 2 for start in starts[1:]), frames]
    return tuple(WindowSpan(start, start + size, cuts[i], cuts[i + 1]) for i, start in enumerate(starts))


def halo_windows(frames: int, *, halo: int, kept: int = WINDOW_FRAMES, multiple: int = 1) -> tuple[WindowSpan, ...]:
    """Returns windows of one length, in which `halo` frames beside those that are written are cut again.

    Their length is a multiple of `multiple`. As few as keep `kept` frames at most each (the outermost ones `halo`
    more), and no longer than they have to be. Exact where a frame's result depends on no more than `halo` frames to
    each side.
    """
    overlap = 2 * halo
    num_windows = max(math.ceil((frames - overlap) / kept), 1)
    size = _round_up(math.ceil((frames + overlap * (num_windows - 1)) / num_windows), multiple=multiple)
    return chunked_windows(frames, size=size, overlap=overlap)


def audible_windows(frames: int, *, num_audible: int, rule: WindowRule) -> tuple[WindowSpan, ...]:
    """Returns windows over the first `num_audible` of `frames` frames and a halo; nothing behind them can be heard.

    The cut depends on these lengths alone. Few frames are decoded twice, so the windows are longer where halos are.
    All windows of a clip have one length: on a GPU calls of one length share graphs, so long ones are on a fine grid.
    """
    heard = min(frames, _round_up(num_audible + rule.halo, multiple=WINDOW_GRID))
    kept = _round_up(math.ceil(2 * rule.halo / _REDUNDANT_SHARE), multiple=rule.multiple)
    kept = min(max(kept, WINDOW_FRAMES), LONGEST_FRAMES - 2 * rule.halo)
    grid = WINDOW_GRID // 2 if kept > WINDOW_FRAMES else 1
    spans = halo_windows(heard, halo=rule.halo, kept=kept, multiple=math.lcm(rule.multiple, grid))
    return tuple(_aligned(span, rule) for span in spans)


def cut_windows(first: int, *, frames: int, rule: WindowRule, longest: int) -> list[WindowSpan]:
    """Returns windows that keep [first, frames), `longest` frames each but the last; `first` is a multiple or 0.

    Their lengths are few: the last one is on a grid where it can be, by beginning earlier.
    """
    longest = max(shortest_window(rule), longest // rule.multiple * rule.multiple)
    spans: list[WindowSpan] = []
    while first < frames:
        start = max(first - rule.halo, 0)
        stop, keep_stop = start + longest, start + longest - rule.halo
        if stop >= frames:
            start = max(frames - _round_up(frames - start, multiple=WINDOW_GRID), 0)
            stop = keep_stop = frames
        spans.append(_aligned(WindowSpan(start, stop, first, keep_stop), rule))
        first = keep_stop
    return spans


def shortest_window(rule: WindowRule) -> int:
    """Returns the least length of a window that is cut: it keeps half of its frames, or more."""
    return _round_up(max(4 * rule.halo, WINDOW_GRID), multiple=rule.multiple)


def _aligned(span: WindowSpan, rule: WindowRule) -> WindowSpan:
    """Returns the window, begun at a multiple."""
    return replace(span, start=span.start // rule.multiple * rule.multiple)


def _round_up(value: int, *, multiple: int) -> int:
    return -(-value // multiple) * multiple
