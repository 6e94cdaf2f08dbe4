"""Computes which latent frames of the source audio an edit keeps, for every model family."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stable_audio_serve.audio.keep import is_continuation
from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.generation import GenerationRequest


def plan_keep_mask(request: GenerationRequest, *, frames: int, hop: int, sample_rate_hz: int) -> Tensor | None:
    """Returns a mask (frames,) float32: 1 where the source's latent is kept, 0 where a latent is generated.

    A frame is kept if its first sample is at or after the start of the source, before the end of the clip, and outside
    every inpainting region. Without regions nothing is kept, as in the reference implementations. Returns None for a
    request without source audio to inpaint. `hop` is the number of samples per frame. Raises InvalidRequestError naming
    the field.

    With `keep="source"`, a region that continues the source begins at the frame in which the source ends. The latent of
    that frame also encodes silence after the source. If it were kept, the clip could have up to a frame of silence.
    """
    field = "inpaint_start_seconds"
    if request.inpaint_audio is None:
        if request.inpaint_regions_s:
            raise InvalidRequestError("inpaint regions need audio to keep", field="audio")
        return None
    if not request.inpaint_regions_s:
        return torch.zeros(frames)
    first_samples = torch.arange(frames) * hop
    source = request.inpaint_audio
    source_start = int(request.source_start_s * sample_rate_hz)
    source_end = source_start + source.resampled_length(to_hz=sample_rate_hz)
    keep = (first_samples >= source_start) & (first_samples < int(request.duration_s * sample_rate_hz))
    for start_s, end_s in request.inpaint_regions_s:
        if not (math.isfinite(start_s) and math.isfinite(end_s) and 0 <= start_s < end_s):
            raise InvalidRequestError(f"inpaint region {start_s}..{end_s} must have 0 <= start < end", field=field)
        start, end = int(start_s * sample_rate_hz), int(end_s * sample_rate_hz)
        continues = is_continuation(start, end, source_end=source_end, sample_rate_hz=sample_rate_hz)
        if request.keep == "source" and continues:
            start = min(start, source_end - source_end % hop)
        keep &= (first_samples < start) | (first_samples >= end)
    return keep.float()
