"""Verify a folder: load its checkpoint and its reference numbers, then run every check that applies to both."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path

from stable_audio_serve.core.errors import StableAudioError
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.protocol import DiffusionModel
from stable_audio_serve.models.registry import resolve_entry
from stable_audio_serve.models.sao.model import SaoModel
from stable_audio_serve.verification import report as reports
from stable_audio_serve.verification.checks import Check, Subject, run_checks
from stable_audio_serve.verification.end_to_end import RUNS
from stable_audio_serve.verification.goldens import Goldens
from stable_audio_serve.verification.networks import NETWORKS
from stable_audio_serve.verification.report import Report
from stable_audio_serve.verification.samplers import FORMULAS_KEY, SAMPLERS

CHECKS: tuple[Check, ...] = (*SAMPLERS, *NETWORKS, *RUNS)

# Verification without a model fails if one of these components had no comparison.
REQUIRED_WITHOUT_MODEL = {
    check.component: (check.component,)
    for check in SAMPLERS
    if check.family is object and check.component in reports.BOUNDS
}

# Text in a load error -> the component it belongs to. The first match applies.
_OWNERS = {
    "pretransform.": "autoencoder",
    "model.model.": "denoiser",
    "text encoder": "text",
    "conditioners.prompt": "text",
    "conditioner.": "number",
    "model.diffusion": "denoiser",
    "model.pretransform": "autoencoder",
}


def verify(folder: Path, say: Callable[[str], None]) -> Report:
    """Compare the model in `folder` with the reference numbers in the same folder.

    Passes one line per component to `say`. Runs in float32 on the CPU, because the bounds are set for that. If the
    facts define the networks as formulas, no model is loaded. An unusable file is reported as a miss, not raised.
    """
    report, goldens, model = Report(say), None, None
    with report.guard("goldens"):
        goldens = Goldens.load(folder)
    needs_model = goldens is None or FORMULAS_KEY not in goldens.facts
    if needs_model:
        model = _load_model(report, folder)
    if goldens is not None and (model is not None or not needs_model):
        logging.disable(logging.CRITICAL)  # the report names failures; the engine would log their stack traces too
        try:
            with report.guard("goldens"):
                _set_bounds(report, goldens, model=model)
                compare(report, goldens, model=model)
                _report_unknown(report, goldens)
        finally:
            logging.disable(logging.NOTSET)
        report.require_groups(reports.REQUIRED if needs_model else REQUIRED_WITHOUT_MODEL)
    report.finish()
    return report


def compare(
    report: Report, goldens: Goldens, *, model: DiffusionModel | None, only: Collection[str] | None = None
) -> None:
    """Run the checks that apply to the model, or only the checks of the components in `only`."""
    chosen = [check for check in CHECKS if only is None or check.component in only]
    run_checks(report, Subject(goldens, model), checks=chosen)


def _load_model(report: Report, folder: Path) -> DiffusionModel | None:
    try:
        return load_model(resolve_entry("verified", path=str(folder)), device="cpu")
    except (StableAudioError, *reports.DATA_ERRORS) as error:
        message = reports.describe_error(error)
        report.fail(next((owner for text, owner in _OWNERS.items() if text in message), "checkpoint"), message)
    return None


def _set_bounds(report: Report, goldens: Goldens, *, model: DiffusionModel | None) -> None:
    if isinstance(model, SaoModel):
        report.bounds["number"] = reports.OPEN_NUMBER_BOUND
    if goldens.section("components", "rounding"):
        report.bounds["autoencoder"] = reports.AUTOENCODER_BOUND_WITH_ROUNDING
    report.rounding = goldens.section("components", "rounding", "max_abs") or goldens.section("rounding", "worst_cases")


def _report_unknown(report: Report, goldens: Goldens) -> None:
    """Report the tensors that no check has read as skipped."""
    for group, keys in goldens.unused().items():
        names = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
        report.skip(group, f"{len(keys)} tensors nothing is known about: {names}")
