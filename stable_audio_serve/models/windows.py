"""Computes windows over latent frames, for encoding and decoding long clips in parts. Arithmetic without tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from stable_audio_serve.models.protocol import WindowRule, WindowSpan

WINDOW_FRAMES, OVERLAP_FRAMES = 128, 32  # as in the reference implementations' chunked encoding and decoding
LONGEST_FRAMES = 512  # longest window for decoding with a WindowRule
_REDUNDANT_SHARE = 0.05  # largest number of halo frames (decoded, but not used) per used frame in a window
WINDOW_GRID = 16  # window lengths are rounded up to multiples of it, so that windows of several clips can share a batch


def window_lengths(spans: Sequence[WindowSpan]) -> tuple[int, ...]:
    """Returns the length of each window in latent frames."""
    return tuple(span.stop - span.start for span in spans)


def audible_spans(spans: Sequence[WindowSpan], *, hop: int, end: int) -> list[WindowSpan]:
    """Returns the windows whose audio starts before sample `end`, the end of the clip. Later windows have only
    padding.
    """
    return [span for span in spans if span.keep_start * hop < end]


def whole_window(frames: int) -> tuple[WindowSpan, ...]:
    """Returns one window over all frames."""
    return (WindowSpan(0, frames, 0, frames),)


def chunked_windows(frames: int, *, size: int = WINDOW_FRAMES, overlap: int = OVERLAP_FRAMES) -> tuple[WindowSpan, ...]:
    """Returns windows of `size` frames that start every `size - overlap` frames; the last one ends at the clip's end.

    The kept frames of a window begin half an overlap after its start and end where the kept frames of the next window
    begin. Together, the kept frames cover the clip exactly once. A clip of at most `size` frames has one window.
    """
    if frames <= size:
        return whole_window(frames)
    starts = [*range(0, frames - size, size - overlap), frames - size]
    cuts = [0, *(start + overlap // 2 for start in starts[1:]), frames]
    return tuple(WindowSpan(start, start + size, cuts[i], cuts[i + 1]) for i, start in enumerate(starts))


def halo_windows(frames: int, *, halo: int, kept: int = WINDOW_FRAMES, multiple: int = 1) -> tuple[WindowSpan, ...]:
    """Returns windows of equal length that overlap by at least `2 * halo` frames.

    The joined results are exact if a frame's result depends on at most `halo` frames before it and `halo` after it. The
    number of windows is the smallest with which each keeps at most about `kept` frames. For this number of windows,
    their length is the smallest possible multiple of `multiple`.
    """
    overlap = 2 * halo
    num_windows = max(math.ceil((frames - overlap) / kept), 1)
    size = round_up(math.ceil((frames + overlap * (num_windows - 1)) / num_windows), multiple)
    return chunked_windows(frames, size=size, overlap=overlap)


def are_exact(windows: Sequence[WindowSpan], rule: WindowRule) -> bool:
    """Returns whether decoding these windows gives the same audio as decoding the whole clip."""
    starts = all(span.start % rule.multiple == 0 for span in windows)
    before = all(span.keep_start - span.start >= rule.halo for span in windows[1:])
    after = all(span.stop - span.keep_stop >= rule.halo and span.stop % rule.multiple == 0 for span in windows[:-1])
    return starts and before and after


def audible_windows(frames: int, *, num_audible: int, rule: WindowRule) -> tuple[WindowSpan, ...]:
    """Returns windows of equal length over the first `num_audible` of `frames` frames. Later frames are not audible.

    With a large halo, windows are longer, so that few frames are decoded twice. The lengths of these longer windows are
    multiples of half of WINDOW_GRID, so that clips of similar length use the same CUDA graphs.

    The last window ends at a multiple of `rule.multiple` or at the clip's end: a decoder that works in chunks of frames
    fills a partial chunk with zeros, which would change the audio of the chunk's other frames.
    """
    num_decoded = min(frames, round_up(num_audible + rule.halo, math.lcm(WINDOW_GRID, rule.multiple)))
    kept = round_up(math.ceil(2 * rule.halo / _REDUNDANT_SHARE), rule.multiple)
    kept = min(max(kept, WINDOW_FRAMES), max(LONGEST_FRAMES - 2 * rule.halo, WINDOW_FRAMES))
    grid = WINDOW_GRID // 2 if kept > WINDOW_FRAMES else 1
    spans = halo_windows(num_decoded, halo=rule.halo, kept=kept, multiple=math.lcm(rule.multiple, grid))
    return tuple(_aligned(span, rule) for span in spans)


def cut_windows(frames: int, *, rule: WindowRule, longest: int = LONGEST_FRAMES) -> list[WindowSpan]:
    """Returns windows for decoding a clip of `frames` latent frames.

    All windows but the last have about `longest` frames. The last one may start earlier than necessary, so that its
    length is a multiple of WINDOW_GRID. Few different lengths therefore occur.
    """
    shortest = round_up(max(4 * rule.halo, WINDOW_GRID), rule.multiple)  # with which at most half is halo
    longest = max(shortest, longest // rule.multiple * rule.multiple)
    spans: list[WindowSpan] = []
    first = 0
    while first < frames:
        start = max(first - rule.halo, 0)
        stop, keep_stop = start + longest, start + longest - rule.halo
        if stop >= frames:
            start = max(frames - round_up(frames - start, WINDOW_GRID), 0)
            stop = keep_stop = frames
        spans.append(_aligned(WindowSpan(start, stop, first, keep_stop), rule))
        first = keep_stop
    return spans


def _aligned(span: WindowSpan, rule: WindowRule) -> WindowSpan:
    """Returns the window with its start moved back to a multiple of `rule.multiple`."""
    return replace(span, start=span.start // rule.multiple * rule.multiple)


def round_up(value: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple
