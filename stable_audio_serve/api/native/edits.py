"""Plan edits of source audio: regions to regenerate, audio that extends the source, and the noise level.

In inpaint forms, the starts and ends of regions are a number or a list, and each field has an alias.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pydantic_core
from fastapi.exceptions import RequestValidationError

from stable_audio_serve.api.native.convert import SAME_S
from stable_audio_serve.api.native.schemas import InpaintForm
from stable_audio_serve.api.refusals import to_fault
from stable_audio_serve.audio.keep import whole_samples
from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.errors import InvalidRequestError
from stable_audio_serve.core.generation import GenerationRequest, SourceAudio
from stable_audio_serve.core.settings import ApiSettings

_START, _END = "inpaint_start_seconds", "inpaint_end_seconds"
_MAX_REGIONS = 100
_MOST_S = 1e9  # in place of longer extensions, whose number of samples may be infinite
TIME_FIELDS = {name for name in InpaintForm.model_fields if name.startswith("inpaint_")}


def check_edit(form: InpaintForm, generation: GenerationRequest) -> None:
    """Check the times of an edit before the source is decoded. Raises InvalidRequestError, RequestValidationError.

    Does nothing if the edit extends the source, because `to_inpainting` checks its times.
    """
    times = form.model_dump(include=TIME_FIELDS)
    if extends(form):
        return
    has_times = any((text or "").strip() for text in times.values())
    if not has_times and (form.extend_before_s, form.extend_after_s) != (None, None):
        names = [name for name in ("extend_before_s", "extend_after_s") if getattr(form, name) is not None]
        message = "{} must be above 0, or inpaint_start_seconds and inpaint_end_seconds be set"
        raise RequestValidationError([to_fault(name, message.format(name), value=0) for name in names])
    parse_regions(times, duration_s=generation.duration_s)


def extends(form: InpaintForm) -> bool:
    """Whether a form extends its source."""
    return bool(form.extend_before_s or form.extend_after_s)


def starts_from_source(form: InpaintForm) -> bool:
    """Whether the regions are generated from the source with added noise, and not from noise alone."""
    return form.init_noise_level is not None and form.init_noise_level < 1


def to_inpainting(
    generation: GenerationRequest, form: InpaintForm, *, source: SourceAudio, card: ModelCard, limits: ApiSettings
) -> GenerationRequest:
    """Return `generation` with the regions of an edit, in seconds from the start of the clip, but without source audio.

    If the form extends the source, the form's times count from the start of the source, and are converted. Raises
    InvalidRequestError, RequestValidationError.
    """
    if starts_from_source(form):
        level = card.noise_level(form.init_noise_level or 0.0, sampler=generation.sampler)
        generation = replace(generation, init_noise_level=level)
    times = form.model_dump(include=TIME_FIELDS)
    if not extends(form):
        regions = parse_regions(times, duration_s=generation.duration_s)
        return replace(generation, inpaint_regions_s=regions, keep=form.keep)
    rate_hz = card.sample_rate_hz
    num_before, num_after = (
        whole_samples(min(extra_s or 0, _MOST_S), rate_hz) for extra_s in (form.extend_before_s, form.extend_after_s)
    )
    end = num_before + source.resampled_length(to_hz=rate_hz)
    before_s, end_s, duration_s = (_seconds(count, rate_hz) for count in (num_before, end, end + num_after))
    _check_duration(form, duration_s, longest_s=min(card.max_duration_s, limits.max_duration_s))
    regions = ()
    if any((text or "").strip() for text in times.values()):
        regions = parse_regions(times, duration_s=duration_s - before_s)
    shifted = tuple((start_s + before_s, stop_s + before_s) for start_s, stop_s in regions)
    added = tuple(region for region in ((0.0, before_s), (end_s, duration_s)) if region[0] < region[1])
    return replace(
        generation,
        duration_s=duration_s,
        inpaint_regions_s=(*added[: num_before > 0], *shifted, *added[num_before > 0 :]),
        source_start_s=before_s,
        keep=form.keep,
    )


def _check_duration(form: InpaintForm, duration_s: float, *, longest_s: float) -> None:
    faults: list[dict[str, Any]] = []
    if duration_s > longest_s:
        message = f"the extended source lasts {duration_s:g} s, and must last at most {longest_s:g} s"
        given = [name for name in ("extend_before_s", "extend_after_s") if getattr(form, name)]
        faults = [to_fault(name, f"{name}: {message}", value=getattr(form, name)) for name in given]
    elif "duration" in form.model_fields_set and abs(form.duration - duration_s) > SAME_S:
        message = f"duration must be unset, or {duration_s:g} as the extended source"
        faults = [to_fault("duration", message, value=form.duration)]
    if faults:
        raise RequestValidationError(faults)


def _seconds(num_samples: int, rate_hz: int) -> float:
    """Return `num_samples` in seconds. `int(seconds * rate_hz)` converts the result back to `num_samples`."""
    seconds = num_samples / rate_hz
    return seconds if int(seconds * rate_hz) == num_samples else math.nextafter(seconds, math.inf)


def parse_regions(values: dict[str, str | None], *, duration_s: float) -> tuple[tuple[float, float], ...]:
    """Return the regions [start, end) in seconds from the four form fields. Raises InvalidRequestError."""
    starts, has_starts = _parse(values, _START, alias="inpaint_mask_start_seconds")
    ends, has_ends = _parse(values, _END, alias="inpaint_mask_end_seconds")
    if has_starts != has_ends:
        raise _error(_START, f"and {_END} must both be numbers or both be lists")
    if len(starts) != len(ends):
        raise _error(_START, f"and {_END} must have the same length, not {len(starts)} and {len(ends)}")
    for start, end in zip(starts, ends, strict=True):
        if start >= end:
            raise _error(_START, f"must be before {_END}, but {start} >= {end}")
        if end > duration_s:
            raise _error(_END, f"must not exceed the duration, but {end} > {duration_s}")
    return tuple(zip(starts, ends, strict=True))


def _parse(values: dict[str, str | None], name: str, *, alias: str) -> tuple[list[float], bool]:
    """Return the times in a form field, and whether the field is a list and not a number."""
    if values[name] is not None and values[alias] is not None:
        raise _error(name, f"and {alias} mean the same: set only one of them")
    text = (values[name] if values[alias] is None else values[alias]) or ""
    text = text.strip()
    if not text:
        raise _error(name, "is required")
    if not text.startswith("[") and "," not in text:
        return [_check(name, text)], False
    items: list[Any] = text.removesuffix(",").split(",")
    if text.startswith("["):
        try:
            items = pydantic_core.from_json(text)
        except ValueError as error:
            raise _error(name, "is not a JSON list of numbers") from error
    if not items:
        raise _error(name, "must not be an empty list")
    if len(items) > _MAX_REGIONS:
        raise _error(name, f"must not have more than {_MAX_REGIONS} entries")
    return [_check(name, item) for item in items], True


def _check(name: str, item: Any) -> float:
    try:
        number = math.nan if isinstance(item, bool | None) or "_" in str(item) else float(item)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise _error(name, f"must be a number of seconds, not {str(item)[:50]!r}")
    if number < 0:
        raise _error(name, "must not be negative")
    return number


def _error(field: str, message: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field} {message}", field=field)
