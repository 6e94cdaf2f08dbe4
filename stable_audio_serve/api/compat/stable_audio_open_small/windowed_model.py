"""The model that handles a request of the Stable Audio Open Small API, with its limits in this API.

The model's window is the longest clip that this API generates with the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from stable_audio_serve.api.compat.stable_audio_open_small.schemas import GenerateBody, LoopForm
from stable_audio_serve.api.service import Service
from stable_audio_serve.core.catalog import OPEN_FAMILY, ModelCard
from stable_audio_serve.core.errors import InvalidRequestError, UnknownModelError

WINDOW_S = 524_288 / 44_100  # the longest clip of Stable Audio Open small, for which this dialect was written


@dataclass(frozen=True, slots=True)
class WindowedModel:
    """A served model, with the limits and defaults of this dialect."""

    card: ModelCard

    @property
    def window_s(self) -> float:
        """The length of the longest clip in seconds. It is also the default length."""
        return self.card.max_duration_s

    @property
    def makes_window(self) -> bool:
        """Whether the model generates the whole window even for a shorter clip.

        If so, the peak of the whole window determines the level of the clip.
        """
        return self.card.family == OPEN_FAMILY

    @property
    def conditioned_s(self) -> float:
        """The length that the model is conditioned on: the length of the window, rounded up to whole seconds.

        As in the original server, it does not depend on the length of the clip.
        """
        return math.ceil(self.window_s)

    def describe(self) -> dict[str, Any]:
        return {
            "sample_rate": self.card.sample_rate_hz,
            "sample_size": int(self.window_s * self.card.sample_rate_hz),
            "diffusion_objective": self.card.objective,
        }

    def steps(self, requested: int | None, *, at_most: int) -> int:
        """Return the number of denoising steps: `requested`, or else the model's default, limited to `at_most`."""
        return min(self.card.default_steps, at_most) if requested is None else requested

    def sampler(self, requested: str | None) -> str | None:
        """Return the requested sampler, or None for the model's default. Raises InvalidRequestError."""
        name = (requested or "").strip() or None
        if name is not None and name not in self.card.samplers:
            valid = ", ".join(self.card.samplers)
            raise InvalidRequestError(f"sampler_type must be one of {valid}", field="sampler_type", allowed=valid)
        return name


def default_model(service: Service) -> WindowedModel:
    """Return the model configured for this dialect, else the first Stable Audio Open model, else the default model."""
    return _view(service.backend.catalog.choose(service.settings.dialects.model, family=OPEN_FAMILY))


def find_model(service: Service, fields: GenerateBody | LoopForm) -> WindowedModel:
    """Return the default model, or the fine-tuned model that a request names. Raises InvalidRequestError.

    The request names a fine-tuned model by `finetune_repo` and optionally `finetune_checkpoint`. The text
    `<repo>` or `<repo>/<checkpoint>` must be the name or alias of a served model.
    """
    if fields.model_type == "standard":
        return default_model(service)
    if not fields.finetune_repo:
        raise InvalidRequestError("finetune_repo is required for finetune models", field="finetune_repo")
    parts = (fields.finetune_repo, fields.finetune_checkpoint)
    try:
        return _view(service.backend.catalog.resolve("/".join(part for part in parts if part)))
    except UnknownModelError as error:
        raise InvalidRequestError(f"finetune_repo: {error.message}", field="finetune_repo") from error


def _view(card: ModelCard) -> WindowedModel:
    return WindowedModel(replace(card, max_duration_s=min(card.max_duration_s, WINDOW_S)))
