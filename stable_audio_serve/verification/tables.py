"""Compares what needs no network: stored random draws, schedules and lengths."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import numpy as np
import torch

from stable_audio_serve.core.generation import EditSchedule, GenerationRequest, SourceAudio
from stable_audio_serve.models.protocol import DiffusionModel
from stable_audio_serve.models.sa3.lengths import LengthRule, plan_length
from stable_audio_serve.sampling import build_sigmas, shift_from_config
from stable_audio_serve.sampling.brownian import MAX_ENTROPY
from stable_audio_serve.verification.goldens import Goldens
from stable_audio_serve.verification.report import Report

_LEVELS = (0.01, 0.02, 0.04, 0.3, 1.0)  # noise of an edit, from the lowest that is allowed


def compare_draws(report: Report, goldens: Goldens) -> None:
    """Compare every case's draws, replayed in order from its seed, with the stored tensors, values and integers."""
    for name, case in goldens.section("cases").items():
        with report.guard("draws", name):
            seed, draws = case.get("manual_seed", case.get("args", {}).get("seed")), case.get("draws") or []
            if seed is None or seed < 0:
                continue
            generator = torch.Generator().manual_seed(seed)
            for index, draw in enumerate(draws):
                key = f"{name}/draw_{index:02d}"
                if draw.get("fn") == "randint":
                    same = int(torch.randint(0, MAX_ENTROPY, [], generator=generator)) == draw["value"]
                    report.note("draws", f"{key} integer", difference=0.0 if same else math.inf)
                    continue
                drawn = torch.randn(draw["shape"], generator=generator)
                first = drawn.flatten()[:4]
                if "first4" in draw:
                    report.compare("draws", f"{key} first values", actual=first, expected=torch.tensor(draw["first4"]))
                if (stored := goldens.find(key)) is not None:
                    report.compare("draws", key, actual=drawn, expected=stored)


def compare_schedules(report: Report, goldens: Goldens) -> None:
    """Compare the schedules listed in the facts, for one length or one per row."""
    for case in goldens.listed("schedules"):
        with report.guard("schedules", str(case.get("name"))):
            shift = shift_from_config(case["shift"] or {"type": "none"}, key="shift")
            lengths = case["seq_len"] if isinstance(case["seq_len"], list) else [case["seq_len"]]
            expected = torch.tensor(case["values"], dtype=torch.float32)
            for length, values in zip(lengths, expected.expand(len(lengths), -1), strict=True):
                sigmas = build_sigmas(case["steps"], shift, length=length, sigma_max=case["sigma_max"])
                report.compare("schedules", f"schedules/{case.get('name')}", actual=sigmas, expected=values)


def compare_edit_levels(report: Report, *, model: DiffusionModel) -> None:
    """Compare where an edit starts with what was asked for, down to the lowest level, as the reference takes it."""
    spec = model.spec
    silence = SourceAudio(np.zeros((spec.card.channels, spec.hop), np.float32), spec.card.sample_rate_hz)
    request = GenerationRequest(
        prompt="", duration_s=2 * spec.hop / spec.card.sample_rate_hz, seed=0, init_audio=silence
    )
    for level in _LEVELS:
        for schedule in get_args(EditSchedule):
            plan = model.plan(replace(request, init_noise_level=level, edit_schedule=schedule))[0].sampler
            found = torch.tensor([plan.source_scale, plan.noise_scale, plan.evaluations[0].sigma])
            expected = torch.tensor([1 - level, level, level])
            report.compare("schedules", f"edit at {level:g}, {schedule}", actual=found, expected=expected)


def compare_lengths(report: Report, goldens: Goldens, *, rule: LengthRule) -> None:
    """Compare the lengths listed in the facts, for one duration or a batch of them."""
    for case in goldens.listed("lengths"):
        durations, padding_s = case.get("durations") or [], case.get("duration_padding_sec", 6.0)
        key = f"lengths/{durations}"
        with report.guard("lengths", key):
            if (case.get("sample_rate"), case.get("hop")) != (rule.sample_rate_hz, rule.hop):
                raise ValueError("stored for another sample rate or hop than the model's")
            capped = replace(rule, max_samples=int(case["sample_size"]))
            frames = plan_length(max(durations), capped, padding_s=padding_s).frames
            rows = [plan_length(duration, capped, padding_s=padding_s, frames=frames) for duration in durations]
            found = {
                "audio_sample_size": frames * rule.hop,
                "latent_length": frames,
                "effective_latents": [row.effective_frames for row in rows],
                "valid_latents": [row.valid_frames for row in rows],
                "output_samples_after_truncation": [row.output_samples for row in rows],
            }
            for name, value in found.items():
                if name in case:
                    report.note("lengths", f"{key} {name}", difference=0.0 if value == case[name] else math.inf)
