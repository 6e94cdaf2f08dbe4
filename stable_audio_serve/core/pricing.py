"""Predict the device time of a request, for code that has no engine: the router and the job queue.

The prediction uses prices, which engines measure and publish. An engine's own predictions are more precise, because
they take its queue and its batches into account.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Protocol

from stable_audio_serve.core.generation import GenerationRequest

# Network evaluations per denoising step of each sampler. The last step may need fewer. Samplers that are not listed
# need one evaluation per step.
EVALUATIONS_PER_STEP: Mapping[str, int] = {"rk4": 4, "k-heun": 2, "k-dpm-2": 2, "k-dpmpp-2s-ancestral": 2}


class Defaults(Protocol):
    """A model's default steps and guidance scale. `ModelCard` and `Prices` implement this protocol."""

    @property
    def default_steps(self) -> int: ...
    @property
    def default_cfg_scale(self) -> float: ...


@dataclass(frozen=True, slots=True)
class WorkSize:
    """The quantities that a request's device time depends on. The size of several requests is the sum of their sizes.

    `rows` is the number of variations. `evaluations` is the number of network evaluations: rows x steps x the sampler's
    evaluations per step, and twice as many with guidance. `evaluated_s` is evaluations x the clip's length in seconds.
    `audio_s` is rows x the clip's length in seconds.
    """

    rows: float = 0.0
    evaluations: float = 0.0
    evaluated_s: float = 0.0
    audio_s: float = 0.0

    @classmethod
    def of(cls, request: GenerationRequest, *, model: Defaults) -> WorkSize:
        steps = model.default_steps if request.steps is None else request.steps
        cfg_scale = model.default_cfg_scale if request.cfg_scale is None else request.cfg_scale
        rows = request.batch_size
        per_step = EVALUATIONS_PER_STEP.get(request.sampler or "", 1)
        evaluations = rows * steps * per_step * (1 if cfg_scale == 1.0 else 2)
        return cls(rows, evaluations, evaluations * request.duration_s, rows * request.duration_s)

    @classmethod
    def sum(cls, sizes: Iterable[WorkSize]) -> WorkSize:
        return cls(*map(math.fsum, zip(*map(astuple, sizes), strict=True)))


@dataclass(frozen=True, slots=True)
class Prices:
    """The prices of one model: milliseconds of device time per unit of each quantity in `WorkSize`, with full batches.

    `default_steps` and `default_cfg_scale` apply to requests that leave these values unset. `adapted` is the time of an
    evaluation with adapters, divided by the time of an evaluation without adapters.
    """

    row_ms: float
    evaluation_ms: float
    evaluated_second_ms: float
    audio_second_ms: float
    default_steps: int = 8
    default_cfg_scale: float = 1.0
    adapted: float = 1.0

    def of(self, size: WorkSize) -> float:
        """Return the predicted device time of work of this size, in milliseconds."""
        return (
            self.row_ms * size.rows
            + self.evaluation_ms * size.evaluations
            + self.evaluated_second_ms * size.evaluated_s
            + self.audio_second_ms * size.audio_s
        )

    def of_request(self, request: GenerationRequest) -> float:
        """Return the predicted device time of one request, in milliseconds."""
        size = WorkSize.of(request, model=self)
        if request.loras:
            more = {"evaluations": self.adapted * size.evaluations, "evaluated_s": self.adapted * size.evaluated_s}
            size = replace(size, **more)
        return self.of(size)
