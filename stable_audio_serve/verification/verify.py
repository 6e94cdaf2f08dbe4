"""Verify a folder: load its checkpoint and its reference numbers, then run every check that applies to both."""

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

# Verification without a model fails if one of these components had no comparison.
REQUIRED_WITHOUT_MODEL = {check.component: (check.component,) for check in _COMMON_CHECKS if check.component in BOUNDS}

# Text in a load error -> the component it belongs to. The first match applies.
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
    """Compare the model in `folder` with the reference numbers in the same folder.

    Passes one line per component to `say`. Runs in float32 on the CPU, because the bounds are set for that. If the
    facts define the networks as formulas, no model is loaded. An unusable file is reported as a miss, not raised.
    """
    report, goldens, model = Report(say), None, None
    with report.guard("goldens"):
        goldens = Goldens.load(folder)
    needs_model = goldens is None or FORMULAS_KEY not in goldens.facts or (folder / CONFIG_FILE).exists()
    if needs_model:
        model = _load_model(report, folder)
    if goldens is not None and (model is not None or not needs_model):
        logging.disable(logging.CRITICAL)  # the report names failures; the engine would log their stack traces too
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
    """Run the checks of the model's family, or only the checks of the components in `only`.

    Without a model, run the checks that need no model.
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
    """Report listed tensors that the file lacks as a miss, and tensors that no check has read as skipped."""
    if missing := goldens.missing():
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        report.fail("goldens", f"{missing[0]}{others} is listed and not in the file")
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
