"""Verify a folder: load its checkpoint and its reference numbers, run every check that applies to both, and report."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stable_audio_serve.core.errors import StableAudioError
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.protocol import DiffusionModel
from stable_audio_serve.models.registry import resolve_entry
from stable_audio_serve.models.sao.model import SaoModel
from stable_audio_serve.verification.checks import ADAPTERS, Finding, Goldens, Subject
from stable_audio_serve.verification.networks import NETWORKS
from stable_audio_serve.verification.runs import RUNS
from stable_audio_serve.verification.samplers import FORMULAS_KEY, SAMPLERS

# Largest absolute difference from the reference, float32 on a CPU. 0 means equal. The report keeps this order.
# The reference ran on an AMD processor with AVX-512. Other vector widths and libraries add in another order. The bounds
# for the text encoder and the denoiser are the largest differences on such a processor, an AMD without AVX-512, and a
# Xeon with AMX, rounded up.
BOUNDS: dict[str, float] = {
    "lengths": 0.0,
    "schedules": 1e-6,
    "draws": 0.0,
    "text tokens": 0.0,
    "text": 3e-5,
    "text in float16": 4e-3,
    "number": 1e-4,  # Fourier arguments reach 6e4 rad
    "denoiser time features": 2.5e-4,
    "denoiser": 3e-5,
    "denoiser guidance": 5e-5,
    "denoiser padding": 2e-5,
    "adapters": 5e-5,
    "autoencoder": 2e-5,
    "decoder halo": 2e-5,
    "end-to-end steps": 1e-4,  # relative to the largest |x|
    "end-to-end latents": 1e-4,
    "end-to-end audio": 1e-4,
    "Brownian paths": 1e-5,
    "samplers over sigma": 1e-5,  # relative to the largest |x|, up to 1000
    "Heun over sigma": 2e-4,  # relative to the largest |x|; two steps from sigma = 500 to 0.3 multiply rounding by 800
    "samplers over time": 1e-6,
    "source preparation": 1e-5,
}

# A folder may state how far float32 rounding of the weights alone moves a tensor. The bound for such a tensor is this
# factor times the stated distance.
TIMES_ROUNDING = 10.0

# Verification fails if no component of a group was compared. These are the groups for a folder with a model, by name.
REQUIRED: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "number": ("number",),
    "denoiser": ("denoiser", "denoiser guidance", "denoiser padding"),
    "autoencoder": ("autoencoder",),
    "end-to-end": ("end-to-end latents", "end-to-end audio"),
}
REQUIRED_WITHOUT_MODEL = {row.component: (row.component,) for row in SAMPLERS if row.component in BOUNDS}

# Component -> pattern that finds an error in loading this component by its message. The first match applies.
_OWNERS = {
    "autoencoder": r"pretransform",
    "text": r"text encoder|conditioners\.prompt",
    "number": r"conditioner\.",
    "denoiser": r"model\.(model\.|diffusion)",
}

# Exceptions that torch and the networks raise for wrong shapes, types or values in the files.
DATA_ERRORS = RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError, OSError


@dataclass(frozen=True, slots=True)
class Comparison:
    """The largest difference from one stored tensor or value; infinite for NaN or a differing shape."""

    component: str
    key: str
    difference: float
    bound: float
    missed: bool


@dataclass(slots=True)
class Report:
    """Collects comparisons. Passes a line per skipped part to `say` at once, and a line per component at the end."""

    say: Callable[[str], None]
    bounds: dict[str, float] = field(default_factory=lambda: dict(BOUNDS))
    rounding: Mapping[str, float] = field(default_factory=dict)  # stored key -> difference from float32 rounding alone
    comparisons: list[Comparison] = field(default_factory=list)
    failures: dict[str, list[str]] = field(default_factory=dict)  # component -> why comparisons were impossible

    @property
    def failed(self) -> list[str]:
        """Components that missed a bound or could not be compared."""
        missed = (comparison.component for comparison in self.comparisons if comparison.missed)
        return list(dict.fromkeys((*self.failures, *missed)))

    def compare(self, component: str, found: Finding) -> None:
        """Record max|actual - expected| over the elements that `only` marks.

        A finding with a component is recorded for that component, and any other finding for `component`. NaN and
        differing shapes miss every bound. If `only` marks no element, nothing is recorded.
        """
        key, actual, expected, only, own = found
        component = own or component
        stated = self.rounding.get(key.split("[")[0])  # rows of a batch share their key
        bound = self.bounds[component] if stated is None else TIMES_ROUNDING * stated
        largest = math.inf
        if actual.shape != expected.shape:
            key = f"{key} (shape {list(actual.shape)}, expected {list(expected.shape)})"
        else:
            difference = (actual.detach().double() - expected.double()).abs().nan_to_num(nan=math.inf)
            if only is not None:
                difference = difference[only.expand_as(difference)]
            if not difference.numel():
                return
            largest = float(difference.max())
        self.comparisons.append(Comparison(component, key, largest, bound, largest > bound))

    def skip(self, component: str, reason: str) -> None:
        """Print why a part of `component` is not compared."""
        self.say(f"{component:<23} skipped  {reason}")

    def fail(self, component: str, message: str) -> None:
        """Record a component as missed without a comparison."""
        self.failures.setdefault(component, []).append(message)

    @contextmanager
    def guard(self, component: str, key: str = "") -> Iterator[None]:
        """Record an error from unusable data inside the block as a miss of `component`."""
        try:
            yield
        except (StableAudioError, *DATA_ERRORS) as error:
            text = error.message if isinstance(error, StableAudioError) else f"{type(error).__name__}: {error}"
            message = " ".join(text.split())[:400]
            if component == "checkpoint":  # its message may tell which part is unusable
                component = next(
                    (owner for owner, pattern in _OWNERS.items() if re.search(pattern, message)), component
                )
            self.fail(component, f"{key}: {message}" if key else message)

    def require_groups(self, required: Mapping[str, tuple[str, ...]]) -> None:
        """Record each group in `required` as missed if none of the group's components was compared.

        A group that has failed already, or has a failed component, is not recorded again.
        """
        compared = {comparison.component for comparison in self.comparisons}
        for name, components in required.items():
            if not compared.intersection(components) and not {name, *components}.intersection(self.failures):
                self.fail(name, "nothing was compared")

    def finish(self) -> None:
        """Print a line per component and the overall result."""
        for component in dict.fromkeys((*BOUNDS, *self.failures)):
            if found := [one for one in self.comparisons if one.component == component]:
                worst, num_missed = max(found, key=lambda one: one.difference), sum(one.missed for one in found)
                counts = f"{len(found)} compared" + (f", {num_missed} missed" if num_missed else "")
                size = f"largest difference {worst.difference:.2e}  bound {worst.bound:.0e}"
                self.say(f"{component:<23} {'MISSED' if num_missed else 'ok':<8} {size}  ({counts}; worst {worst.key})")
            if reasons := self.failures.get(component):
                others = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
                self.say(f"{component:<23} MISSED   {reasons[0]}{others}")
        self.say(f"verification failed: {', '.join(self.failed)}" if self.failed else "verification passed")

    def as_dict(self) -> dict[str, Any]:
        """Returns the comparisons and failures as JSON values. An infinite difference becomes None."""
        comparisons = [asdict(one) for one in self.comparisons]
        for one in comparisons:
            one["difference"] = one["difference"] if math.isfinite(one["difference"]) else None
        return {"passed": not self.failed, "failed": self.failed, "failures": self.failures, "comparisons": comparisons}


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
        with report.guard("checkpoint"):
            model = load_model(resolve_entry("verified", path=str(folder)), device="cpu")
    if goldens is not None and (model is not None or not needs_model):
        logging.disable(logging.CRITICAL)  # the report names failures; the engine would log their stack traces too
        try:
            with report.guard("goldens"):
                if isinstance(model, SaoModel):
                    report.bounds["number"] = 1e-5  # the family scales numbers to 0..1
                if rounding := goldens.section("components", "rounding"):
                    report.bounds["autoencoder"] = 1e-4  # in such a folder, rounding moves other outputs too
                report.rounding = rounding.get("max_abs") or goldens.section("rounding", "worst_cases")
                compare(report, goldens, model=model)
                for group, unused in groupby(goldens.unused(), lambda key: key.split("/")[0]):
                    keys = list(unused)
                    names = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
                    report.skip(group, f"{len(keys)} tensors nothing is known about: {names}")
        finally:
            logging.disable(logging.NOTSET)
        adapters = {ADAPTERS: ("adapters",)} if ADAPTERS in goldens.facts else {}
        report.require_groups(REQUIRED | adapters if needs_model else REQUIRED_WITHOUT_MODEL)
    report.finish()
    return report


def compare(report: Report, goldens: Goldens, *, model: DiffusionModel | None, only: Collection[str] = ()) -> None:
    """Run the checks that apply to the model. If `only` is not empty, run only the checks of these components.

    An error in a check counts as a miss of the check's component. The other checks still run.
    """
    for check in (*SAMPLERS, *NETWORKS, *RUNS):
        if not isinstance(model, check.family) or (only and check.component not in only):
            continue
        skipped: Counter[str] = Counter()
        with report.guard(check.component), torch.no_grad():
            for match in check.items(goldens):
                with report.guard(check.component, match[0]):
                    made = check.make(Subject(goldens, model), match)
                    for found in [Finding(match[0], made, goldens[match[0]])] if isinstance(made, Tensor) else made:
                        if isinstance(found, str):
                            skipped[found] += 1
                        else:
                            report.compare(check.component, found)
        for reason, count in skipped.items():
            report.skip(check.component, f"{count} {reason}" if count > 1 else reason)
