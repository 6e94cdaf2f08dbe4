"""The result of a verification: comparisons by component with their bounds, failures, and whether it passed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from stable_audio_serve.core.errors import StableAudioError
from stable_audio_serve.core.processor import is_amd
from stable_audio_serve.verification.checks import Finding

# Largest absolute difference from the reference, float32 on a CPU. 0 means equal. The report keeps this order.
BOUNDS: dict[str, float] = {
    "lengths": 0.0,
    "schedules": 1e-6,
    "draws": 0.0,
    "text tokens": 0.0,
    "text": 2e-5,
    "text in float16": 2e-3,
    "number": 1e-4,  # Fourier arguments reach 6e4 rad
    "denoiser time features": 1e-4,
    "denoiser": 2e-5,
    "denoiser guidance": 5e-5,
    "denoiser padding": 2e-5,
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

# The reference ran on an AMD processor. Other vector widths and libraries add in another order. These bounds are the
# differences measured on a Xeon with AVX512 and AMX, rounded up.
if not is_amd():
    BOUNDS |= {"text": 3e-5, "text in float16": 4e-3, "denoiser time features": 2.5e-4, "denoiser": 3e-5}

OPEN_NUMBER_BOUND = 1e-5  # for "number" in the Stable Audio Open family, which scales numbers to 0..1

# A folder may state how far float32 rounding of the weights alone moves a stored tensor. The bound of that tensor is
# this factor times the stated distance. In such folders rounding moves other outputs of the autoencoder by over 1e-5.
TIMES_ROUNDING = 10.0
AUTOENCODER_BOUND_WITH_ROUNDING = 1e-4

# Verification of a model fails if one of these parts had no comparison.
REQUIRED: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "number": ("number",),
    "denoiser": ("denoiser", "denoiser guidance", "denoiser padding"),
    "autoencoder": ("autoencoder",),
    "end-to-end": ("end-to-end latents", "end-to-end audio"),
}

# Exceptions that torch and the networks raise for wrong shapes, types or values in the files.
DATA_ERRORS = RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError, OSError


def describe_error(error: BaseException) -> str:
    """Returns an error message on one line, at most 400 characters."""
    text = error.message if isinstance(error, StableAudioError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:400]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The largest difference from one stored tensor or value; infinite for NaN or a differing shape."""

    component: str
    key: str
    difference: float
    bound: float

    @property
    def missed(self) -> bool:
        return self.difference > self.bound


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

    @property
    def passed(self) -> bool:
        """Whether every comparison was within its bound."""
        return not self.failed

    def compare(self, component: str, found: Finding) -> None:
        """Record max|actual - expected| over the elements that `only` marks, for the finding's component or this one.

        NaN and differing shapes miss every bound. If `only` marks no element, nothing is recorded.
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
        self.comparisons.append(Comparison(component, key, largest, bound))

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
            self.fail(component, f"{key}: {describe_error(error)}" if key else describe_error(error))

    def require_groups(self, required: Mapping[str, tuple[str, ...]]) -> None:
        """Record a part of `required` as missed if it had no comparison, unless it has failed already."""
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
        comparisons = [{**asdict(one), "missed": one.missed} for one in self.comparisons]
        for one in comparisons:
            one["difference"] = one["difference"] if math.isfinite(one["difference"]) else None
        return {"passed": self.passed, "failed": self.failed, "failures": self.failures, "comparisons": comparisons}
