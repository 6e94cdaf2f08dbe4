"""Compares whole cases, run through the real engine: draws, lengths, schedules, latents and audio."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stable_audio_serve.models.protocol import RowPlan
from stable_audio_serve.verification.bounds import Component
from stable_audio_serve.verification.cases import Case, parse_case, skip_reason
from stable_audio_serve.verification.goldens import Goldens
from stable_audio_serve.verification.observed import RowResult, Runner
from stable_audio_serve.verification.report import Report

_KEY_MASKED, _SILENT = "_keymask", "_ae_noise_off"
_OUTPUTS: Mapping[Component, str] = {"end-to-end latents": "latents", "end-to-end audio": "audio"}


@dataclass(frozen=True, slots=True)
class _Target:
    """Stored output of a run (B, ...) and the rows of it that are compared."""

    component: Component
    key: str
    expected: Tensor
    rows: Sequence[int]


def compare_end_to_end(report: Report, goldens: Goldens, *, runner: Runner, chunked: bool) -> None:
    """Compare every case below gen/: with the reference's noise, and without the autoencoder's where that is stored.

    `chunked` says whether the model's config asks for windows.
    """
    asyncio.run(_compare_cases(report, goldens, runner=runner, chunked=chunked))


async def _compare_cases(report: Report, goldens: Goldens, *, runner: Runner, chunked: bool) -> None:
    skipped: Counter[str] = Counter()
    try:
        for name, facts in goldens.cases().items():
            for key in goldens.names(f"{name}/"):
                goldens.mark(f"{name}/{key}")
            if reason := skip_reason(facts["args"]):
                report.skip("end-to-end", f"{name}: {reason}")
                continue
            with report.guard("end-to-end", name):
                case = parse_case(name, facts, goldens=goldens, chunked=chunked)
                _compare_plans(report, runner, case=case, facts=facts)
                if targets := _find_targets(goldens, case, plans=runner.plan(case), suffix="", skipped=skipped):
                    _compare_rows(report, await runner.run(case), targets=targets)
                if targets := _find_targets(goldens, case, plans=runner.plan(case), suffix=_SILENT, skipped=skipped):
                    _compare_rows(report, await runner.run_silent(case), targets=targets)
                if (local := goldens.find(key := f"{name}/local_add_cond{_SILENT}")) is not None:
                    report.compare("autoencoder", key, actual=runner.silent_inpaint_conditioning(case), expected=local)
    finally:
        await runner.close()
    for reason, count in (+skipped).items():
        report.skip("end-to-end", f"{count} {reason}")


def _compare_plans(report: Report, runner: Runner, *, case: Case, facts: Mapping[str, Any]) -> None:
    """Compare lengths, noise levels and the order of the random draws, where the case states them."""
    plans = runner.plan(case)
    for plan, valid in zip(plans, facts.get("valid_latents", ()), strict=False):
        report.note("lengths", f"{case.name}/valid_latents", difference=abs(plan.valid_frames - int(valid)))
    if shape := facts.get("latent_shape"):
        report.note("lengths", f"{case.name}/latent_shape", difference=abs(plans[0].frames - int(shape[-1])))
    if stated := facts.get("sigmas"):
        expected = torch.tensor(stated, dtype=torch.float32).reshape(-1, len(plans[0].sampler.step_ends) + 1)
        for plan, sigmas in zip(plans, expected.expand(len(plans), -1), strict=True):
            starts = [0, *plan.sampler.step_ends[:-1]]
            actual = torch.tensor([*(plan.sampler.evaluations[start].sigma for start in starts), 0.0])
            report.compare("schedules", f"{case.name}/sigmas", actual=actual, expected=sigmas)
    if case.draws:
        agrees = tuple(draw.shape for draw in runner.script(case)) == case.draws
        report.note("draws", f"{case.name} number and shapes", difference=0.0 if agrees else math.inf)


def _find_targets(
    goldens: Goldens, case: Case, *, plans: Sequence[RowPlan], suffix: str, skipped: Counter[str]
) -> list[_Target]:
    """Returns what of a run is compared: the key-masked numbers, or without those the rows that have no padding."""
    targets = []
    for component, name in _OUTPUTS.items():
        key, plain = f"{case.name}/{name}{_KEY_MASKED}{suffix}", f"{case.name}/{name}{suffix}"
        if (expected := goldens.find(key)) is not None:
            skipped["value-zeroed numbers: their key-masked twins are compared"] += goldens.find(plain) is not None
            targets.append(_Target(component, key, expected, range(len(plans))))
        elif (expected := goldens.find(plain)) is not None:
            unpadded = [row for row, plan in enumerate(plans) if plan.valid_frames == plan.frames]
            skipped["padded rows of value-zeroed numbers: no key-masked twin"] += len(plans) - len(unpadded)
            targets += [_Target(component, plain, expected, unpadded)] if unpadded else []
    return targets


def _compare_rows(report: Report, results: Sequence[RowResult], *, targets: Sequence[_Target]) -> None:
    """Compare latents inside each row's valid frames and audio over its own length.

    The audio of a batch of different durations is stored as long as the longest.
    """
    unlike = len({result.plan.output_samples for result in results}) > 1
    for target in targets:
        for row in target.rows:
            result, expected, key = results[row], target.expected[row], f"{target.key}[{row}]"
            if target.component == "end-to-end latents":
                valid = torch.arange(result.plan.frames) < result.plan.valid_frames
                report.compare(target.component, key, actual=result.latents, expected=expected, only=valid)
            else:
                stored = expected[:, : result.audio.shape[1]] if unlike else expected
                heard = result.audio.clip(-1.0, 1.0)  # as the reference delivers it
                report.compare(target.component, key, actual=heard, expected=stored)
