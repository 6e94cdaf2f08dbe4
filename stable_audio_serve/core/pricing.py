"""What a request costs in device time, from the request alone: for those who have no engine, such as a router and the
job queue. An engine publishes the prices; its own predictions, which know its queue and its batches, are finer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Protocol

from stable_audio_serve.core.generation import GenerationRequest

# How often a sampler asks the network in a step, but perhaps the last; those that are not here ask once.
EVALUATIONS_PER_STEP: Mapping[str, int] = {"rk4": 4, "k-heun": 2, "k-dpm-2": 2, "k-dpmpp-2s-ancestral": 2}


class Defaults(Protocol):
    """What a model does for requests that do not say: a `ModelCard`, or the `Prices` of one of its engines."""

    @property
    def default_steps(self) -> int: ...
    @property
    def default_cfg_scale(self) -> float: ...


@dataclass(frozen=True, slots=True)
class WorkSize:
    """What device time grows with; the sizes of several requests add up.

    `rows` are variations. `evaluations` of the network: as many as the sampler makes in each step of each variation,
    twice where it is guided.
    `evaluated_s` are seconds of audio times evaluations, `audio_s` seconds of audio that are decoded.
    """

    rows: float = 0.0
    evaluations: float = 0.0
    evaluated_s: float = 0.0
    audio_s: float = 0.0

    @classmethod
    def of(cls, request: GenerationRequest, *, model: Defaults) -> WorkSize:
        """Returns the size of a request to this model."""
        steps = model.default_steps if request.steps is None else request.steps
        cfg_scale = model.default_cfg_scale if request.cfg_scale is None else request.cfg_scale
        rows = request.batch_size
        per_step = EVALUATIONS_PER_STEP.get(request.sampler or "", 1)
        evaluations = rows * steps * per_step * (1 if cfg_scale == 1.0 else 2)
        return cls(rows, evaluations, evaluations * request.duration_s, rows * request.duration_s)


@dataclass(frozen=True, slots=True)
class Prices:
    """Milliseconds of device time by what a request is made of, on an engine with enough to do.

    `default_steps` and `default_cfg_scale` are the model's, for requests that name none.
    """

    row_ms: float
    evaluation_ms: float
    evaluated_second_ms: float
    audio_second_ms: float
    default_steps: int = 8
    default_cfg_scale: float = 1.0

    def of(self, size: WorkSize) -> float:
        """Returns the predicted device time of work of this size, milliseconds."""
        return (
            self.row_ms * size.rows
            + self.evaluation_ms * size.evaluations
            + self.evaluated_second_ms * size.evaluated_s
            + self.audio_second_ms * size.audio_s
        )

    def of_request(self, request: GenerationRequest) -> float:
        """Returns the predicted device time of one request, milliseconds."""
        return self.of(WorkSize.of(request, model=self))

    def to_dict(self) -> dict[str, float]:
        """Returns plain numbers by name."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, float]) -> Prices:
        """Returns what `to_dict` was made of. Raises KeyError for a missing name; unknown ones are left out."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})  # type: ignore[arg-type]
