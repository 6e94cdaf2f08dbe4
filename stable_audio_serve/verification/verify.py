"""Verifies a folder: loads its checkpoint and its reference numbers and compares everything they have in common."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path

from stable_audio_serve.core.errors import StableAudioError
from stable_audio_serve.models.config_reader import CONFIG_FILE
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.protocol import DiffusionModel
from stable_audio_serve.models.registry import resolve_entry
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.models.sao.model import SaoModel
from stable_audio_serve.verification.autoencoder import OPEN_AUTOENCODER, SA3_AUTOENCODER
from stable_audio_serve.verification.checks import Check, Subject, run_checks
from stable_audio_serve.verification.denoiser import CONDITIONERS, OPEN_DENOISER, SA3_DENOISER
from stable_audio_serve.verification.end_to_end import OPEN_RUNS, RUNS
from stable_audio_serve.verification.goldens import Goldens
from stable_audio_serve.verification.report import (
    AUTOENCODER_BOUND_WITH_ROUNDING,
    BOUNDS,
    DATA_ERRORS,
    OPEN_NUMBER_BOUND,
    REQUIRED,
    Report,
    describe_error,
)
from stable_audio_serve.verification.samplers import COMMON_CHECKS, FORMULAS_KEY
from stable_audio_serve.verification.tables import DRAWS, SA3_TABLES

_SA3_CHECKS = (*SA3_TABLES, DRAWS, *CONDITIONERS, *SA3_DENOISER, *SA3_AUTOENCODER, RUNS)
_OPEN_CHECKS = (*CONDITIONERS, *OPEN_DENOISER, *OPEN_AUTOENCODER, DRAWS, *OPEN_RUNS)
_COMMON_CHECKS = (DRAWS, *COMMON_CHECKS)

# Verification without a model fails when nothing was compared for one of these components.
REQUIRED_WITHOUT_MODEL = {check.component: (check.component,) for check in _COMMON_CHECKS if check.component in BOUNDS}

# Which component a checkpoint's keys and files belong to, first match first.
_OWNERS = (
    ("pretransform.", "autoencoder"),
    ("model.model.", "denoiser"),
    ("text encoder", "text"),
    ("conditioners.prompt", "text"),
    ("conditioner.", "number"),
    ("model.diffusion", "denoiser"),
    ("model.pretransform", "autoencoder"),
)


def verify(folder: Path, say: Callable[[str], None]) -> Report:
    """Compare the model in `folder` with the numbers stored beside it; passes one line per component to `say`.

    A folder whose numbers need no model, because its networks are formulas, is compared without one.

    Runs in float32 on the CPU, where the bounds hold. Unusable files are reported as misses, never raised.
    """
    report, goldens, model = Report(say), None, None
    with report.guard("goldens"):
        goldens = Goldens.load(folder)
    needs_model = goldens is None or FORMULAS_KEY not in goldens.facts or (folder / CONFIG_FILE).exists()
    if needs_model:
        model = _load_model(report, folder)
    if goldens is not None and (model is not None or not needs_model):
        logging.disable(logging.CRITICAL)  # the engine logs failures with their stack: they are reported here
        try:
            with report.guard("goldens"):
                _set_bounds(report, goldens, model=model)
                compare(report, goldens, model=model)
                _report_files(report, goldens)
        finally:
            logging.disable(logging.NOTSET)
        report.require_groups(REQUIRED if needs_model else REQUIRED_WITHOUT_MODEL)
    report.finish()
    return report


def compare(
    report: Report, goldens: Goldens, *, model: DiffusionModel | None, only: Collection[str] | None = None
) -> None:
    """Run every check of the model's family, or `only` the checks of some components.

    Without a model these are the checks of numbers that need none.
    """
    checks: tuple[Check, ...] = _COMMON_CHECKS
    if isinstance(model, Sa3Model):
        checks = _SA3_CHECKS
    elif isinstance(model, SaoModel):
        checks = _OPEN_CHECKS
    elif model is not None:
        report.fail("checkpoint", f"nothing is known to compare for the family {model.spec.card.family}")
        return
    chosen = [check for check in checks if only is None or check.component in only]
    run_checks(report, Subject(goldens, model), checks=chosen)


def _set_bounds(report: Report, goldens: Goldens, *, model: DiffusionModel | None) -> None:
    if isinstance(model, SaoModel):
        report.bounds["number"] = OPEN_NUMBER_BOUND
    if goldens.section("components", "rounding"):
        report.bounds["autoencoder"] = AUTOENCODER_BOUND_WITH_ROUNDING
    report.rounding = goldens.section("components", "rounding", "max_abs") or goldens.section("rounding", "worst_cases")


def _report_files(report: Report, goldens: Goldens) -> None:
    """Report tensors that are listed and absent as a miss, and name those that no check has read."""
    if lacking := goldens.lacking():
        others = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
        report.fail("goldens", f"{lacking[0]}{others} is listed and not in the file")
    for group, keys in goldens.unused().items():
        names = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
        report.skip(group, f"{len(keys)} tensors nothing is known about: {names}")


def _load_model(report: Report, folder: Path) -> DiffusionModel | None:
    try:
        return load_model(resolve_entry("verified", path=str(folder)), device="cpu")
    except (StableAudioError, *DATA_ERRORS) as error:
        message = describe_error(error)
        report.fail(next((component for part, component in _OWNERS if part in message), "checkpoint"), message)
    return None
