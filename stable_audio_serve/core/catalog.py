"""Names, limits and defaults of the served models. They are known before any weights are loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from stable_audio_serve.core.errors import ConfigError, UnknownModelError
from stable_audio_serve.core.generation import EditSchedule

SA3_FAMILY = "stable-audio-3"
OPEN_FAMILY = "stable-audio-open"

# The package whose networks a model uses: this one, or stable-audio-tools, which only runs Stable Audio Open models.
NetworkBackend = Literal["native", "stable_audio_tools"]

# Precision of the decoder's matrix products. split = three half-precision products, which come close to float32.
DecodePrecision = Literal["float32", "split", "tf32", "half"]

# The API refuses an unknown sampler when a job is submitted. The names are listed here, because the API does not import
# torch.
FLOW_SAMPLERS = ("euler", "rk4", "dpmpp", "pingpong")
V_TIME_SAMPLERS = ("v-ddim", "v-ddim-cfgpp")  # the other samplers of models with the v objective run over sigma
V_SAMPLERS = (
    "dpmpp-3m-sde",
    "dpmpp-2m-sde",
    "dpmpp-2m",
    "k-heun",
    "k-lms",
    "k-dpmpp-2s-ancestral",
    "k-dpm-2",
    "k-dpm-fast",
    *V_TIME_SAMPLERS,
)
_LOWEST_SIGMA, _HIGHEST_SIGMA = 0.01, 500.0  # bounds of an edit's noise level


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Public properties of one served model. Durations in seconds, rates in hertz."""

    name: str
    family: str
    aliases: tuple[str, ...] = ()
    max_duration_s: float = 120.0
    sample_rate_hz: int = 44100
    channels: int = 2
    latent_channels: int = 256
    objective: str = "rf_denoiser"  # its training objective: rf_denoiser, rectified_flow or v
    default_steps: int = 8
    default_cfg_scale: float = 1.0
    default_duration_padding_s: float = 6.0
    edit_schedule: EditSchedule | None = None  # None = the family's default
    samplers: tuple[str, ...] = FLOW_SAMPLERS  # allowed values of GenerationRequest.sampler
    conditions_on_start: bool = False  # whether the model uses GenerationRequest.start_s
    is_demo: bool = False
    description: str = ""

    @property
    def default_edit_schedule(self) -> EditSchedule:
        """The time steps of a flow model's edits: `edit_schedule`, else the family's default.

        The default of Stable Audio Open is its reference schedule, which is evenly spaced and never exceeds the noise
        level. That of Stable Audio 3 has neither property, so its default is "even" (`sampling/schedules.py`).
        """
        return self.edit_schedule or ("reference" if self.family == OPEN_FAMILY else "even")

    def noise_level(self, share: float, *, sampler: str | None) -> float:
        """Convert a share of noise to `GenerationRequest.init_noise_level`.

        `share` is in 0..1; with 1 the source has no influence. For samplers that run over sigma the result is the sigma
        with share = 2/pi atan(sigma), for others it is `share`.
        """
        if self.objective != "v" or sampler in V_TIME_SAMPLERS:
            return share
        return min(max(math.tan(share * math.pi / 2), _LOWEST_SIGMA), _HIGHEST_SIGMA)


class ModelCatalog:
    """The configured models, in configuration order. Lookups by name or alias ignore case and surrounding spaces."""

    def __init__(self, cards: Iterable[ModelCard], *, default: str | None = None) -> None:
        """`default` is a name or an alias. Without it, the first model that is not the demo is the default.

        Raises ConfigError when there is no card, when two models share a name, or when the default is unknown.
        """
        self._cards: dict[str, ModelCard] = {}
        self._names: dict[str, str] = {}
        for card in cards:
            for name in (card.name, *card.aliases):
                key = _key(name)
                if self._names.get(key, card.name) != card.name:
                    raise ConfigError(f"models: two models have the name {name!r}", field="models")
                self._names[key] = card.name
            self._cards[card.name] = card
        if not self._cards:
            raise ConfigError("models: at least one model must be configured", field="models")
        try:
            self.default = self.resolve(default) if default else min(self, key=lambda card: card.is_demo)
        except UnknownModelError as error:
            raise ConfigError(
                f"default_model (STABLE_AUDIO_DEFAULT_MODEL or STABLE_AUDIO_MODEL): {error.message}",
                field="default_model",
            ) from error

    def resolve(self, name: str) -> ModelCard:
        """Return the card for a canonical name or an alias. Raises UnknownModelError, which lists the valid names."""
        canonical = self._names.get(_key(name))
        if canonical is None:
            valid = ", ".join(self._cards)
            raise UnknownModelError(f"unknown model {name[:100]!r}; valid: {valid}", field="model", allowed=valid)
        return self._cards[canonical]

    def choose(self, name: str | None, *, family: str) -> ModelCard:
        """Return the card for `name`, without a name the first card of `family`, and without one the default.

        Raises UnknownModelError.
        """
        if name is not None:
            return self.resolve(name)
        return next((card for card in self if card.family == family), self.default)

    def __iter__(self) -> Iterator[ModelCard]:
        return iter(self._cards.values())

    def __len__(self) -> int:
        return len(self._cards)


# Result of the quality gate for a replica. passed: its audio matches the quality report. unchecked: no report could be
# read. fallback: the configured weights failed, so the replica serves the last good ones. off: the gate is disabled.
GateOutcome = Literal["passed", "unchecked", "fallback", "off"]


@dataclass(frozen=True, slots=True)
class ModelQuality:
    """The weights of a replica, and its result at the quality gate.

    `weights` is the hash of the weights. `revision` is their commit, None for weights from a folder. `report` is the id
    of their quality report. `problem` is a sentence for clients that contains no path of this machine.
    """

    gate: GateOutcome
    weights: str | None = None
    revision: str | None = None
    report: str | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """State of one model's replicas.

    `stage` is loading, ready, failed, idle (no replica) or waking (the first replica starts, and requests wait for it).
    `quality` is that of the replica with the most serious result. `refused_update` is set while the replicas of the
    last deployment do not start and older replicas serve instead; it gives the reason. `states` counts the replicas in
    each of Ray Serve's states.
    """

    stage: str
    num_replicas: int = 0
    device: str | None = None
    detail: Mapping[str, str] | None = None
    quality: ModelQuality | None = None
    refused_update: str | None = None
    states: Mapping[str, int] = field(default_factory=dict)


def _key(name: str) -> str:
    return name.strip().casefold()
