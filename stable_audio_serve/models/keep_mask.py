"""Which latent frames of a source an edit keeps, for every family. Knows no model and no sampler."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.generation import GenerationRequest


def plan_keep_mask(request: GenerationRequest, *, frames: int, hop: int, sample_rate_hz: int) -> Tensor | None:
    """Returns (frames,) float32, 1 where the source's latent is kept: the frame's first sample lies in no region.

    Everything after the clip's end is generated; without regions nothing is kept, as in the references. None without a
    source. `hop` is the number of samples per frame. Raises InvalidRequestError naming the field.
    """
    field = "inpaint_start_seconds"
    if request.inpaint_audio is None:
        if request.inpaint_regions_s:
            raise InvalidRequestError("inpaint regions need audio to keep", field="audio")
        return None
    if not request.inpaint_regions_s:
        return torch.zeros(frames)
    first_samples = torch.arange(frames) * hop
    keep = first_samples < int(request.duration_s * sample_rate_hz)
    for start_s, end_s in request.inpaint_regions_s:
        if not (math.isfinite(start_s) and math.isfinite(end_s) and 0 <= start_s < end_s):
            raise InvalidRequestError(f"inpaint region {start_s}..{end_s} must have 0 <= start < end", field=field)
        start, end = int(start_s * sample_rate_hz), int(end_s * sample_rate_hz)
        keep &= (first_samples < start) | (first_samples >= end)
    return keep.float()
