"""What is compared for a model of the Stable Audio 3 family, part by part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from stable_audio_serve.models.sa3.lengths import plan_length
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.verification.autoencoder import compare_autoencoder
from stable_audio_serve.verification.conditioning import compare_number, compare_text
from stable_audio_serve.verification.denoiser import compare_denoiser
from stable_audio_serve.verification.end_to_end import compare_end_to_end
from stable_audio_serve.verification.goldens import Goldens
from stable_audio_serve.verification.observed import Runner
from stable_audio_serve.verification.report import Report
from stable_audio_serve.verification.tables import (
    compare_draws,
    compare_edit_levels,
    compare_lengths,
    compare_schedules,
)


def compare_sa3(report: Report, goldens: Goldens, *, model: Sa3Model) -> None:
    """Compare everything the goldens hold about this model; an error in one part does not stop the others."""
    rule = model.config.lengths
    parts: dict[str, Callable[[], None]] = {
        "lengths": lambda: compare_lengths(report, goldens, rule=rule),
        "schedules": lambda: compare_schedules(report, goldens),
        "edit levels": lambda: compare_edit_levels(report, model=model),
        "draws": lambda: compare_draws(report, goldens),
        "text": lambda: compare_text(report, goldens, model=model),
        "number": lambda: compare_number(report, goldens, model=model),
        "denoiser": lambda: compare_denoiser(report, goldens, net=model.denoiser),
        "autoencoder": lambda: compare_autoencoder(
            report, goldens, net=model.autoencoder, sample_rate_hz=rule.sample_rate_hz
        ),
        "end-to-end": lambda: compare_end_to_end(
            report, goldens, runner=make_runner(model), chunked=model.config.chunked
        ),
    }
    for component, compare in parts.items():
        with report.guard(component), torch.no_grad():
            compare()


def make_runner(model: Sa3Model) -> Runner:
    """Returns a runner that uses this family's length rule."""
    rule = model.config.lengths

    def num_frames(duration_s: float, *, padding_s: float, sample_size: int) -> int:
        return plan_length(duration_s, replace(rule, max_samples=sample_size), padding_s=padding_s).frames

    return Runner(model, num_frames=num_frames)
