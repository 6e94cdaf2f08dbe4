"""Verifies a folder: loads its checkpoint and its reference numbers and compares everything they have in common."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stable_audio_serve.core.errors import CheckpointError, StableAudioError
from stable_audio_serve.models.config_reader import CONFIG_FILE
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.protocol import DiffusionModel
from stable_audio_serve.models.registry import resolve_entry
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.models.sao.model import SaoModel
from stable_audio_serve.verification.bounds import (
    AUTOENCODER_BOUND_WITH_ROUNDING,
    REQUIRED,
    REQUIRED_WITHOUT_MODEL,
    Component,
)
from stable_audio_serve.verification.goldens import Goldens
from stable_audio_serve.verification.report import DATA_ERRORS, Report
from stable_audio_serve.verification.sa3 import compare_sa3
from stable_audio_serve.verification.sao import compare_sao
from stable_audio_serve.verification.sao_common import FORMULAS_KEY, compare_common

# Which component a checkpoint's keys and files belong to, first match first.
_OWNERS: tuple[tuple[str, Component], ...] = (
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
    report = Report(say)
    goldens = _load_goldens(report, folder)
    if goldens is not None and FORMULAS_KEY in goldens.facts and not (folder / CONFIG_FILE).exists():
        with report.guard("goldens"), _files_accounted(report, goldens):
            compare_common(report, goldens)
        report.require_groups(REQUIRED_WITHOUT_MODEL)
    elif (model := _load_model(report, folder)) is not None and goldens is not None:
        with report.guard("goldens"), _engine_log_silenced(), _files_accounted(report, goldens):
            _compare(report, goldens, model=model)
        report.require_groups(REQUIRED)
    report.finish()
    return report


def _compare(report: Report, goldens: Goldens, *, model: DiffusionModel) -> None:
    if goldens.component("rounding"):
        report.bounds["autoencoder"] = AUTOENCODER_BOUND_WITH_ROUNDING
    report.rounding = goldens.rounding()
    if isinstance(model, Sa3Model):
        compare_sa3(report, goldens, model=model)
    elif isinstance(model, SaoModel):
        compare_sao(report, goldens, model=model)
    else:
        report.fail("checkpoint", f"nothing is known to compare for the family {model.spec.card.family}")


@contextmanager
def _files_accounted(report: Report, goldens: Goldens) -> Iterator[None]:
    """Report tensors that are listed and absent, and after the block those that nothing has read."""
    if lacking := goldens.lacking():
        others = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
        report.fail("goldens", f"{lacking[0]}{others} is listed and not in the file, or has another shape")
    yield
    for group, keys in goldens.unused():
        names = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
        report.skip(group, f"{len(keys)} tensors nothing is known about: {names}")


@contextmanager
def _engine_log_silenced() -> Iterator[None]:
    """Keep the engine from logging failures with their stack: they are reported here."""
    log, silence = logging.getLogger("stable_audio_serve.engine"), logging.NullHandler()
    propagates, log.propagate = log.propagate, False
    log.addHandler(silence)
    try:
        yield
    finally:
        log.removeHandler(silence)
        log.propagate = propagates


def _load_goldens(report: Report, folder: Path) -> Goldens | None:
    try:
        return Goldens.load(folder)
    except CheckpointError as error:
        report.fail("goldens", error.message)
    return None


def _load_model(report: Report, folder: Path) -> DiffusionModel | None:
    try:
        return load_model(resolve_entry("verified", path=str(folder)), device="cpu")
    except DATA_ERRORS as error:
        message = error.message if isinstance(error, StableAudioError) else f"{type(error).__name__}: {error}"
        owner = next((component for part, component in _OWNERS if part in message), "checkpoint")
        report.fail(owner, message)
    return None
