"""Windows over latent frames, in which an autoencoder encodes and decodes what is long. Pure arithmetic, no tensors."""

from __future__ import annotations

import math

from stable_audio_serve.models.protocol import WindowSpan

WINDOW_FRAMES, OVERLAP_FRAMES = 128, 32  # windows of the references' chunked encoding and decoding


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


def halo_windows(frames: int, *, halo: int, kept: int = WINDOW_FRAMES) -> tuple[WindowSpan, ...]:
    """Returns windows of one length, in which `halo` frames beside those that are written are cut again.

    As few as keep `kept` frames at most each (the outermost ones `halo` more), and no longer than they have to be.
    Exact where a frame's result depends on no more than `halo` frames to each side.
    """
    overlap = 2 * halo
    num_windows = max(math.ceil((frames - overlap) / kept), 1)
    size = math.ceil((frames + overlap * (num_windows - 1)) / num_windows)
    return chunked_windows(frames, size=size, overlap=overlap)
