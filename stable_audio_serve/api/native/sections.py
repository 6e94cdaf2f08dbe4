"""Read the sections of a long piece from a job's fields, and check them."""

from __future__ import annotations

import math
from typing import Any

from stable_audio_serve.api.native.schemas import Fields, JobBody
from stable_audio_serve.api.refusals import to_fault
from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.generation import Section
from stable_audio_serve.core.settings import ApiSettings
from stable_audio_serve.jobs.pieces.sections import choose_overlap, find_faults, total_duration_s


def read_sections(fields: Fields) -> tuple[Section, ...]:
    """Return the sections that a job's fields have, or () if they have none."""
    given = fields.sections if isinstance(fields, JobBody) else None
    return tuple(Section(one.duration, one.prompt) for one in given or ())


def section_faults(fields: Fields, *, card: ModelCard, limits: ApiSettings) -> list[dict[str, Any]]:
    """Return an error entry for each field that is wrong or contradicts the sections."""
    if not isinstance(fields, JobBody):
        return []
    sections = read_sections(fields)
    if fields.sections == []:
        return [to_fault("sections", "sections must have at least one entry, or be unset", value=[])]
    if not sections:
        unused = fields.overlap_s is not None
        return [to_fault("overlap_s", "overlap_s needs sections", value=fields.overlap_s)] if unused else []
    total_s = total_duration_s(sections)
    has_other_length = "duration" in fields.model_fields_set and not math.isclose(fields.duration, total_s)
    contradicting = (
        ("duration", fields.duration, has_other_length, f"{total_s:g}"),
        ("batch_size", fields.batch_size, fields.batch_size > 1, "1"),
        ("prompts", fields.prompts, bool(fields.prompts), "empty"),
        ("seeds", fields.seeds, bool(fields.seeds), "empty"),
        ("loop", fields.loop, bool(fields.loop), "false"),
        ("peaks", fields.peaks, fields.peaks == "scale", "limit or clip"),
    )
    faults = [
        to_fault(name, f"{name} must be {allowed} or unset with sections", value=value)
        for name, value, is_wrong, allowed in contradicting
        if is_wrong
    ]
    overlap_s = choose_overlap(fields.overlap_s, card=card, limits=limits)
    for error in find_faults(sections, overlap_s=overlap_s, card=card, limits=limits):
        place = tuple(int(part) if part.isdecimal() else part for part in str(error.field).split("."))
        faults.append(to_fault(place, error.message, value=_value_at(fields, place)))
    return faults


def _value_at(fields: JobBody, place: tuple[str | int, ...]) -> Any:
    """Return the value that the client sent at `place`, such as ("sections", 2, "duration"); None for ("sections",)."""
    match place:
        case ("sections", int(index), "duration"):
            return (fields.sections or ())[index].duration
        case ("overlap_s",):
            return fields.overlap_s
    return None
