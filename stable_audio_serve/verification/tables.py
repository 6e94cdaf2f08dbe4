"""Checks that run no network: random draws, schedules, lengths, and the noise level at which an edit starts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

import numpy as np
import torch

from stable_audio_serve.core.generation import EditSchedule, GenerationRequest, SourceAudio
from stable_audio_serve.models.sa3.lengths import plan_length
from stable_audio_serve.sampling import build_sigmas, shift_from_config
from stable_audio_serve.sampling.brownian import MAX_ENTROPY
from stable_audio_serve.verification.checks import Check, Finding, Subject, same

_EDIT_LEVELS = (0.01, 0.02, 0.04, 0.3, 1.0)  # noise levels of an edit, from the lowest that requests may use


def _draws(it: Subject, match: re.Match[str]) -> Iterator[Finding]:
    """Replay a case's draws in order from its seed; compare the stored tensors, first values and integers."""
    case = it.goldens.section("cases", match[0])
    seed = case.get("manual_seed", case.get("args", {}).get("seed"))
    if seed is None or seed < 0:
        return
    generator = torch.Generator().manual_seed(seed)
    for index, draw in enumerate(case.get("draws") or []):
        key = f"{match[0]}/draw_{index:02d}"
        if draw.get("fn") == "randint":
            drawn = torch.randint(0, MAX_ENTROPY, [], generator=generator)
            yield same(f"{key} integer", draw["value"], found=int(drawn))
            continue
        drawn = torch.randn(draw["shape"], generator=generator)
        if "first4" in draw:
            yield Finding(f"{key} first values", drawn.flatten()[:4], torch.tensor(draw["first4"]))
        if (stored := it.goldens.find(key)) is not None:
            yield Finding(key, drawn, stored)


def _schedules(it: Subject, _: object) -> Iterator[Finding]:
    """Build the schedules in the facts, for one length or for one length per row."""
    for case in it.goldens.section("components").get("schedules", []):
        shift = shift_from_config(case["shift"] or {"type": "none"}, key="shift")
        lengths = case["seq_len"] if isinstance(case["seq_len"], list) else [case["seq_len"]]
        expected = torch.tensor(case["values"], dtype=torch.float32)
        for length, values in zip(lengths, expected.expand(len(lengths), -1), strict=True):
            sigmas = build_sigmas(case["steps"], shift, length=length, sigma_max=case["sigma_max"])
            yield Finding(f"schedules/{case.get('name')}", sigmas, values)


def _edit_levels(it: Subject, _: object) -> Iterator[Finding]:
    """Check that an edit starts at the noise level of the request, as in the reference, even at the lowest level."""
    spec = it.model.spec
    silence = SourceAudio(np.zeros((spec.card.channels, spec.hop), np.float32), spec.card.sample_rate_hz)
    request = GenerationRequest(
        prompt="", duration_s=2 * spec.hop / spec.card.sample_rate_hz, seed=0, init_audio=silence
    )
    for level in _EDIT_LEVELS:
        for schedule in get_args(EditSchedule):
            plan = it.model.plan(replace(request, init_noise_level=level, edit_schedule=schedule))[0].sampler
            found = torch.tensor([plan.source_scale, plan.noise_scale, plan.evaluations[0].sigma])
            yield Finding(f"edit at {level:g}, {schedule}", found, torch.tensor([1 - level, level, level]))


def _lengths(it: Subject, _: object) -> Iterator[Finding]:
    """Plan the lengths in the facts, for one duration or a batch of durations."""
    rule = it.model.config.lengths
    for case in it.goldens.section("components").get("lengths", []):
        durations, padding_s = case["durations"], case.get("duration_padding_sec", 6.0)
        capped = replace(rule, max_samples=int(case["sample_size"]))
        frames = plan_length(max(durations), capped, padding_s=padding_s).frames
        rows = [plan_length(duration, capped, padding_s=padding_s, frames=frames) for duration in durations]
        found = {
            "sample_rate": rule.sample_rate_hz,
            "hop": rule.hop,
            "audio_sample_size": frames * rule.hop,
            "latent_length": frames,
            "effective_latents": [row.effective_frames for row in rows],
            "valid_latents": [row.valid_frames for row in rows],
            "output_samples_after_truncation": [row.output_samples for row in rows],
        }
        yield from (
            same(f"lengths/{durations} {name}", case[name], found=found[name]) for name in found.keys() & case.keys()
        )


DRAWS = Check("draws", ".*", _draws, over="cases")
SA3_TABLES = (
    Check("lengths", "lengths", _lengths, over="once"),
    Check("schedules", "schedules", _schedules, over="once"),
    Check("schedules", "edit levels", _edit_levels, over="once"),
)
