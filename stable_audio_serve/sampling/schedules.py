"""Timestep schedules of the flow models: evenly spaced times, warped so that more of them are near 1 (noise). The warp
can depend on the clip's length.

All arithmetic is float32 and in the same order as in the reference implementations. The network's time features amplify
the last bit of a time by 1e5, so even a more exact schedule would give different audio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from stable_audio_serve.core.errors import CheckpointError, InvalidRequestError
from stable_audio_serve.core.generation import EditSchedule

MAX_STEPS = 1000
MIN_NOISE_LEVEL = 0.01  # the lowest noise level of an edit; with a lower one, a step would divide by a time near 0
_LAST_TIME = 1 / (1 + math.exp(2.0))  # the last time before 0 in the reference implementations, where the log-SNR is 2
CONFIG_KEY = "sampling_distribution_shift_options"


def _require(condition: bool, name: str, *, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {allowed}")


class TimestepShift(Protocol):
    """A monotone function from times to times, both in 0..1. It may depend on the clip's length."""

    def warp(self, times: Tensor, length: Tensor) -> Tensor:
        """Return the warped times for a clip of `length` latent frames (at least 1).

        `times` has shape (N,); `length` is a 0-dim tensor. Both are float32.
        """
        ...


@dataclass(frozen=True, slots=True)
class NoShift:
    """Leaves the times unchanged."""

    def warp(self, times: Tensor, length: Tensor) -> Tensor:
        return times


@dataclass(frozen=True, slots=True)
class LogSnrShift:
    """Evenly spaced times become evenly spaced in log-SNR, from a start value to `logsnr_end`. The start value is
    `anchor_logsnr` for clips of `anchor_length` latent frames, and `rate` lower for each doubling of the length.
    """

    anchor_length: float = 2000.0
    anchor_logsnr: float = -6.2
    rate: float = 1.0
    logsnr_end: float = 2.0

    def __post_init__(self) -> None:
        _require(self.anchor_length > 0, "anchor_length", allowed="above 0")

    def warp(self, times: Tensor, length: Tensor) -> Tensor:
        """Return the time sigmoid(-logsnr) for each time, but exactly 0 for times <= 0 and exactly 1 for times >= 1."""
        start = self.anchor_logsnr - self.rate * torch.log2(length / self.anchor_length)
        logsnr = self.logsnr_end - times * (self.logsnr_end - start)
        warped = torch.sigmoid(-logsnr)
        warped = torch.where(times <= 0, torch.zeros_like(warped), warped)
        return torch.where(times >= 1, torch.ones_like(warped), warped)


@dataclass(frozen=True, slots=True)
class FluxShift:
    """Warps t to alpha t / (1 + (alpha - 1) t), where ln alpha is a linear function of the logarithm of the length."""

    min_length: float = 256.0
    max_length: float = 4096.0
    alpha_min: float = 1.0
    alpha_max: float = 1.0

    def __post_init__(self) -> None:
        _require(self.min_length > 0, "min_length", allowed="above 0")
        _require(self.max_length >= self.min_length, "max_length", allowed="at least min_length")
        _require(self.alpha_min > 0, "alpha_min", allowed="above 0")
        _require(self.alpha_max > 0, "alpha_max", allowed="above 0")

    def warp(self, times: Tensor, length: Tensor) -> Tensor:
        """Return the warped times. The length is clamped to `min_length`..`max_length`."""
        low, high = math.log(self.min_length), math.log(self.max_length)
        span = (high - low) or 1e-8  # a divisor; 1e-8 in the reference implementations too if the lengths are equal
        fraction = (torch.log(length.clamp(self.min_length, self.max_length)) - low) / span
        log_low, log_high = math.log(self.alpha_min), math.log(self.alpha_max)
        alpha = torch.exp(log_low + fraction * (log_high - log_low))
        return alpha * times / (1 + (alpha - 1.0) * times)


@dataclass(frozen=True, slots=True)
class FullShift:
    """Warps t to u = 1 - e^mu / (e^mu + t / (1 - t)), where mu is a linear function of the length. With `use_sine`, the
    result is sin(pi u / 2) instead of u.
    """

    base_shift: float = 0.5
    max_shift: float = 1.15
    min_length: float = 256.0
    max_length: float = 4096.0
    use_sine: bool = False

    def __post_init__(self) -> None:
        _require(self.max_length > self.min_length, "max_length", allowed="above min_length")

    def warp(self, times: Tensor, length: Tensor) -> Tensor:
        """Return the warped times. The length is clamped to `min_length`..`max_length`."""
        length = length.clamp(self.min_length, self.max_length)
        slope = self.max_shift - self.base_shift
        mu = -(self.base_shift + slope * (length - self.min_length) / (self.max_length - self.min_length))
        warped = 1 - torch.exp(mu) / (torch.exp(mu) + (1 / (1 - times) - 1))
        return torch.sin(warped * math.pi / 2) if self.use_sine else warped


# The shift of checkpoints whose config has no shift options. It does not depend on the length.
DEFAULT_SHIFT = LogSnrShift(rate=0.0)

_KINDS: Mapping[str, type[NoShift | LogSnrShift | FluxShift | FullShift]] = {
    "logsnr": LogSnrShift,
    "flux": FluxShift,
    "full": FullShift,
    "none": NoShift,
}
_LARGEST_OPTION = 1e30  # float32 can represent it


def shift_from_config(options: Mapping[str, object] | None, *, key: str = CONFIG_KEY) -> TimestepShift:
    """Return the shift that a checkpoint's config defines. `options` has its `type` (default "full") and parameters.

    Returns the default shift if `options` is None. Raises CheckpointError, whose message contains `key`, if an option
    is invalid, or if the options give levels that no clip can be made with.
    """
    if options is None:
        return DEFAULT_SHIFT
    try:
        if not isinstance(options, Mapping):
            raise ValueError("must be an object")
        kind = options.get("type", "full")
        shift = _build(str(kind), {name: value for name, value in options.items() if name != "type"})
    except ValueError as error:
        raise CheckpointError(f"model_config.json: {key}: {error}", field=key) from error
    try:
        for length in (1.0, 1e6):
            build_sigmas(8, shift, length=length)
    except InvalidRequestError as error:
        raise CheckpointError(f"model_config.json: {key}: not all noise levels are above 0", field=key) from error
    return shift


def build_sigmas(steps: int, shift: TimestepShift, *, length: float, sigma_max: float = 1.0) -> Tensor:
    """Return noise levels (steps + 1,) float32 from `sigma_max` to 0 for a clip of `length` latent frames.

    Evenly spaced levels from `sigma_max` to 0 are warped by `shift`, and then the first is set to `sigma_max` again. If
    `sigma_max` is below about 0.7, later levels may therefore exceed it, as in the reference implementations. Raises
    InvalidRequestError if `steps` is outside 1..1000 or too many for the shift.
    """
    check_steps(steps)
    times = torch.linspace(sigma_max, 0, steps + 1, dtype=torch.float32)
    sigmas = shift.warp(times, torch.tensor(max(length, 1.0), dtype=torch.float32)).clone()
    sigmas[0] = sigma_max
    if not (torch.isfinite(sigmas).all() and (sigmas[:-1] > 0).all()):
        message = f"the model has no schedule of {steps} steps: not all noise levels would be above 0"
        raise InvalidRequestError(message, field="steps", allowed="fewer steps")
    return sigmas


def edit_times(build: Callable[[float], Tensor], level: float, *, schedule: EditSchedule) -> Tensor:
    """Return the times of an edit, which starts at noise level `level`, from MIN_NOISE_LEVEL to 1, and ends at 0.

    `build(level)` returns the schedule of the reference implementation. The value of `schedule` means:

    - "even": the times are evenly spaced in log-SNR.
    - "scaled": the times are `build(1)`, a run from pure noise, multiplied by `level`. Half of these are near `level`.
    - "reference": the times are `build(level)`. For Stable Audio 3, some times after the first exceed `level`.

    In a test with 144 variations of held tones, without a prompt, 130 kept their pitch with "even", 112 with "scaled"
    and 96 with "reference" at level 0.25. At level 0.4, the numbers are 116, 91 and 49 (docs/performance.md). If
    `level` is 1, the three schedules are equal.
    """
    if schedule == "reference" or level == 1.0:
        return build(level)
    whole = build(1.0)
    return whole * level if schedule == "scaled" else _even_times(len(whole) - 1, level=level)


def _even_times(steps: int, *, level: float) -> Tensor:
    """Return times (steps + 1,) float32 from `level` to 0, evenly spaced in log-SNR, whatever the model's shift is.

    The last time before 0 is `level` times the last time before 0 of a run from pure noise.
    """
    first, last = (math.log((1 - time) / time) for time in (level, level * _LAST_TIME))
    times = torch.sigmoid(-torch.linspace(first, last, steps + 1, dtype=torch.float32))
    times[0], times[-1] = level, 0.0
    return times


def check_steps(steps: int) -> None:
    """Raise InvalidRequestError if `steps` is outside 1..1000."""
    if not 1 <= steps <= MAX_STEPS:
        allowed = f"1..{MAX_STEPS}"
        raise InvalidRequestError(f"steps must be in {allowed}, got {steps}", field="steps", allowed=allowed)


def _build(kind: str, options: Mapping[str, object]) -> TimestepShift:
    chosen = _KINDS.get(kind)
    if chosen is None:
        raise ValueError(f"unknown type {kind[:40]!r}; valid: {', '.join(_KINDS)}")
    known = {field.name for field in fields(chosen)}
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"unknown option {name[:40]!r} for type {kind}")
        if not isinstance(value, int | float) or not abs(value) <= _LARGEST_OPTION:
            raise ValueError(f"{name} must be a number from {-_LARGEST_OPTION:g} to {_LARGEST_OPTION:g}")
    return chosen(**{name: float(value) for name, value in options.items()})  # type: ignore[arg-type]
