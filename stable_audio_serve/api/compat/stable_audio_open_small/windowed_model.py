"""The model behind a request, as this dialect sees it: its window, its default steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from stable_audio_serve.api.compat.stable_audio_open_small.schemas import GenerateBody, LoopForm
from stable_audio_serve.api.service import Service
from stable_audio_serve.core.catalog import OPEN_FAMILY, ModelCard
from stable_audio_serve.core.errors import InvalidRequestError, UnknownModelError


@dataclass(frozen=True, slots=True)
class WindowedModel:
    """A served model whose longest clip is this dialect's window."""

    card: ModelCard

    @property
    def window_s(self) -> float:
        """Longest clip, seconds; also the default length of a clip."""
        return self.card.max_duration_s

    @property
    def makes_window(self) -> bool:
        """Whether it makes its whole window however short the clip is, so that the peak is the window's."""
        return self.card.family == OPEN_FAMILY

    @property
    def conditioned_s(self) -> float:
        """What the original tells its model of the length, seconds: a whole number that holds the window.

        The network always makes the window, whatever is cut from it.
        """
        return math.ceil(self.window_s)

    @property
    def num_window_samples(self) -> int:
        """Samples of a whole window."""
        return int(self.window_s * self.card.sample_rate_hz)

    def steps(self, wanted: int | None, *, at_most: int) -> int:
        """Returns the steps to take: what is wanted, else the model's default."""
        return min(self.card.default_steps, at_most) if wanted is None else wanted

    def sampler(self, wanted: str | None) -> str | None:
        """Returns the sampler to use, None for the model's own. Raises InvalidRequestError."""
        name = (wanted or "").strip() or None
        if name is not None and name not in self.card.samplers:
            valid = ", ".join(self.card.samplers)
            raise InvalidRequestError(f"sampler_type must be one of {valid}", field="sampler_type", allowed=valid)
        return name


def default_model(service: Service) -> WindowedModel:
    """Returns the model the operator chose for this dialect, else the first Stable Audio Open, else the default."""
    return _view(service, service.backend.catalog.choose(service.settings.dialects.saos_model, family=OPEN_FAMILY))


def find_model(service: Service, fields: GenerateBody | LoopForm) -> WindowedModel:
    """Returns the default model, or the fine-tune that a request names. Raises InvalidRequestError.

    `<repo>`, or `<repo>/<checkpoint>`, must be the name or an alias of a served model.
    """
    if fields.model_type == "standard":
        return default_model(service)
    if not fields.finetune_repo:
        raise InvalidRequestError("finetune_repo is required for finetune models", field="finetune_repo")
    parts = (fields.finetune_repo, fields.finetune_checkpoint)
    try:
        return _view(service, service.backend.catalog.resolve("/".join(part for part in parts if part)))
    except UnknownModelError as error:
        raise InvalidRequestError(f"finetune_repo: {error.message}", field="finetune_repo") from error


def _view(service: Service, card: ModelCard) -> WindowedModel:
    window_s = min(card.max_duration_s, service.settings.dialects.saos_window_s)
    return WindowedModel(replace(card, max_duration_s=window_s))
