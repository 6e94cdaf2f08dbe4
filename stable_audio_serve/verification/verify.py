"""Verify a folder: load its checkpoint and its reference numbers, then run every check that applies to both."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from stable_audio_serve.core.errors import StableAudioError
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.protocol import DiffusionModel
from stable_audio_serve.models.registry import resolve_entry
from stable_audio_serve.models.sao.model import SaoModel
from stable_audio_serve.verification import report as reports
from stable_audio_serve.verification.checks import Subject
from stable_audio_serve.verification.goldens import Goldens
from stable_audio_serve.verification.networks import NETWORKS
from stable_audio_serve.verification.report import Report
from stable_audio_serve.verification.runs import RUNS
from stable_audio_serve.verification.samplers import FORMULAS_KEY, SAMPLERS

# Verification without a model fails if one of these components had no comparison.
REQUIRED_WITHOUT_MODEL = {
    check.component: (check.component,)
    for check in SAMPLERS
    if check.family is object and check.component in reports.BOUNDS
}

# Component -> text in a load error that belongs to it. The first match applies.
_OWNERS = {
    "autoencoder": r"pretransform",
    "denoiser": r"model\.(model\.|diffusion)",
    "text": r"text encoder|conditioners\.prompt",
    "number": r"conditioner\.",
}


def verify(folder: Path, say: Callable[[str], None]) -> Report:
    """Compare the model in `folder` with the reference numbers in the same folder.

    Passes one line per component to `say`. Runs in float32 on the CPU, because the bounds are set for that. If the
    reference data define the networks as formulas, no model is loaded. An unusable file raises no exception: the report
    says that its component failed.
    """
    report, goldens, model = Report(say), None, None
    with report.guard("goldens"):
        goldens = Goldens.load(folder)
    needs_model = goldens is None or FORMULAS_KEY not in goldens.facts
    if needs_model:
        try:
            model = load_model(resolve_entry("verified", path=str(folder)), device="cpu")
        except (StableAudioError, *reports.DATA_ERRORS) as error:
            message = reports.describe_error(error)
            owners = (component for component, text in _OWNERS.items() if re.search(text, message))
            report.fail(next(owners, "checkpoint"), message)
    if goldens is not None and (model is not None or not needs_model):
        logging.disable(logging.CRITICAL)  # the report names failures; the engine would log their stack traces too
        try:
            with report.guard("goldens"):
                _set_bounds(report, goldens, model=model)
                compare(report, goldens, model=model)
                for group, keys in goldens.unused().items():
                    names = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
                    report.skip(group, f"{len(keys)} tensors nothing is known about: {names}")
        finally:
            logging.disable(logging.NOTSET)
        report.require_groups(reports.REQUIRED if needs_model else REQUIRED_WITHOUT_MODEL)
    report.finish()
    return report


def compare(
    report: Report, goldens: Goldens, *, model: DiffusionModel | None, only: Collection[str] | None = None
) -> None:
    """Run the checks that apply to the model, or only the checks of the components in `only`.

    An error counts as a miss of its component; the other checks run.
    """
    it = Subject(goldens, model)
    for check in (*SAMPLERS, *NETWORKS, *RUNS):
        if not isinstance(model, check.family) or (only is not None and check.component not in only):
            continue
        skipped: Counter[str] = Counter()
        with report.guard(check.component), torch.no_grad():
            for match in check.items(goldens):
                with report.guard(check.component, match[0]):
                    for found in check.findings(it, match):
                        if isinstance(found, str):
                            skipped[found] += 1
                        else:
                            report.compare(check.component, found)
        for reason, count in skipped.items():
            report.skip(check.component, f"{count} {reason}" if count > 1 else reason)


def _set_bounds(report: Report, goldens: Goldens, *, model: DiffusionModel | None) -> None:
    if isinstance(model, SaoModel):
        report.bounds["number"] = reports.OPEN_NUMBER_BOUND
    if goldens.section("components", "rounding"):
        report.bounds["autoencoder"] = reports.AUTOENCODER_BOUND_WITH_ROUNDING
    report.rounding = goldens.section("components", "rounding", "max_abs") or goldens.section("rounding", "worst_cases")
