"""The recipes of a job's clips: how they can be made again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from stable_audio_serve.audio.recipe import Recipe, add_sections, write_recipes
from stable_audio_serve.core.generation import MadeOn
from stable_audio_serve.jobs.job import FinishedSection, JobSpec


def recipes_of(
    spec: JobSpec, *, seeds: Sequence[int], made_on: MadeOn, different: Sequence[tuple[int, MadeOn]] = ()
) -> tuple[Recipe, ...]:
    """Return the recipe of each clip of a job.

    `different` are the sections that were made differently from `made_on`: their numbers, and how they were made.
    """
    recipes = write_recipes(
        spec.request,
        sources=spec.sources,
        model=spec.model,
        seeds=seeds,
        made_on=made_on,
        encoding=spec.encoding,
        peaks=spec.peaks,
        finishing=spec.finishing,
    )
    if not spec.sections:
        return recipes
    return (add_sections(recipes[0], spec.sections, overlap_s=spec.overlap_s, different=dict(different)),)


def common_maker(sections: Sequence[FinishedSection]) -> MadeOn:
    """Return how the first section was made.

    `prompt_chars` and `negative_prompt_chars` are replaced by the smallest values of all sections.
    """
    made = [_maker(section) for section in sections]
    provenances = [one.provenance for one in made if one.provenance is not None]
    if made[0].provenance is None:
        return made[0]
    provenance = replace(
        made[0].provenance,
        prompt_chars=_least(one.prompt_chars for one in provenances),
        negative_prompt_chars=_least(one.negative_prompt_chars for one in provenances),
    )
    return replace(made[0], provenance=provenance)


def _least(numbers: Iterable[int | None]) -> int | None:
    return min((number for number in numbers if number is not None), default=None)


def find_different(sections: Sequence[FinishedSection]) -> tuple[tuple[int, MadeOn], ...]:
    """Return the numbers of the sections that were made differently from the first, and how they were made."""
    first = _without_chars(_maker(sections[0]))
    made = ((section.number, _without_chars(_maker(section))) for section in sections)
    return tuple((number, made_on) for number, made_on in made if made_on != first)


def _maker(section: FinishedSection) -> MadeOn:
    if section.file.made_on is None:
        raise ValueError(f"it is unknown how section {section.number} was made")
    return section.file.made_on


def _without_chars(made_on: MadeOn) -> MadeOn:
    """Return `made_on` without the prompt lengths, which depend on each section's prompt."""
    if made_on.provenance is None:
        return made_on
    return replace(made_on, provenance=replace(made_on.provenance, prompt_chars=None, negative_prompt_chars=None))
