"""Restore the source's samples outside the regions that an edit regenerated.

A linear crossfade joins generated audio and source. The crossfade is inside the region and lasts 30 ms, or less if the
region is too short. There are two exceptions. A region that extends the source past its end fades in over the last
30 ms of the source. Audio that is generated before the source fades out over the first 30 ms of the source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stable_audio_serve.core.generation import GeneratedSpan

if TYPE_CHECKING:
    import numpy.typing as npt

FADE_S = 0.03
_NEGLIGIBLE = 1e-6  # samples; a length this close below a whole number is that number


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a clip: the samples [start, stop) come from the model.

    The first `fade_in` samples and the last `fade_out` samples of the part are crossfades with the source.
    """

    start: int
    stop: int
    fade_in: int = 0
    fade_out: int = 0


def plan_spans(
    regions_s: Sequence[tuple[float, float]],
    *,
    num_source: int,
    num_samples: int,
    sample_rate_hz: int,
    source_start: int = 0,
) -> tuple[Span, ...]:
    """Return the spans of an edit that come from the model, in order.

    The spans cover the regions `regions_s`, [start, end) in seconds, and everything before and after the source. The
    edit has `num_samples` samples. The source has `num_source` samples, and begins at the sample `source_start` of the
    edit.
    """
    fade, source_end = round(FADE_S * sample_rate_hz), min(source_start + num_source, num_samples)
    starts = [whole_samples(start_s, sample_rate_hz) for start_s, _ in regions_s]
    stops = [whole_samples(end_s, sample_rate_hz) for _, end_s in regions_s]
    regions = [(start, stop if stop < source_end else num_samples) for start, stop in zip(starts, stops, strict=True)]
    merged = _merge([(0, source_start), *regions, (source_end, num_samples)])
    spans = [_fade_inside(*span, fade=fade, source_end=source_end) for span in merged]
    if not spans:
        return ()
    first_stop = spans[0].stop
    if source_start and first_stop < min(source_start + fade, source_end):
        stop = min(source_start + fade, spans[1].start if len(spans) > 1 else source_end)
        spans[0] = Span(0, stop, fade_out=stop - source_start)
    is_continued = any(
        is_continuation(*region, source_end=source_end, sample_rate_hz=sample_rate_hz) for region in regions
    )
    start, stop = merged[-1]
    if is_continued and start >= source_start and start > source_end - fade:
        start = max(source_end - fade, spans[-2].stop if len(spans) > 1 else source_start)
        spans[-1] = Span(start, stop, fade_in=source_end - start)
    return tuple(spans)


def whole_samples(duration_s: float, sample_rate_hz: int) -> int:
    """Return the number of samples in `duration_s`, rounded down. In floats, 0.7 s would have 30,869 at 44.1 kHz."""
    return math.floor(duration_s * sample_rate_hz + _NEGLIGIBLE)


def is_continuation(start: int, stop: int, *, source_end: int, sample_rate_hz: int) -> bool:
    """Whether the region [start, stop), in samples, extends a source past its end.

    The region may begin up to 30 ms after the end of the source, because clients round times.
    """
    return start < source_end + round(FADE_S * sample_rate_hz) and stop > source_end


def _merge(regions: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the union of the regions in order, without empty regions."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(region for region in regions if region[0] < region[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _fade_inside(start: int, stop: int, *, fade: int, source_end: int) -> Span:
    has_edges = start > 0, stop < source_end
    longest = min(fade, (stop - start) // max(sum(has_edges), 1))
    return Span(start, stop, *(longest * has_edge for has_edge in has_edges))


def keep_source(
    audio: npt.NDArray[np.float32], source: npt.NDArray[np.float32], *, spans: Sequence[Span]
) -> tuple[GeneratedSpan, ...]:
    """Replace `audio` (C, S) float32 by `source` in place, except in `spans`, whose ends are crossfaded.

    Returns each span with the generated audio at its ends, as it was before the crossfades.

    `source` must have the same channels and at least S samples. Pad a shorter source with silence.
    """
    generated = []
    for span in spans:
        fading_in = slice(span.start, span.start + span.fade_in)
        fading_out = slice(span.stop - span.fade_out, span.stop)
        generated.append(GeneratedSpan(span.start, span.stop, audio[:, fading_in].copy(), audio[:, fading_out].copy()))
        audio[:, fading_in] += (1 - fade_ramp(span.fade_in)) * (source[:, fading_in] - audio[:, fading_in])
        audio[:, fading_out] += fade_ramp(span.fade_out) * (source[:, fading_out] - audio[:, fading_out])
    edges = [0, *(edge for span in spans for edge in (span.start, span.stop)), audio.shape[1]]
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        audio[:, start:stop] = source[:, start:stop]
    return tuple(generated)


def fade_ramp(num_samples: int, *, first: int = 0, count: int | None = None) -> npt.NDArray[np.float32]:
    """Return the gains of a fade-in of `num_samples` samples, which rise from 0 to 1, or of `count` of them."""
    elapsed = np.arange(first, num_samples if count is None else first + count) + 0.5
    return (elapsed / max(num_samples, 1)).astype(np.float32)
