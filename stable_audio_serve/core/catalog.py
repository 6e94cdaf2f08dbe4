"""What a served model looks like from outside: names, limits and defaults, known without loading any weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from stable_audio_serve.core.errors import ConfigError, UnknownModelError
from stable_audio_serve.core.generation import EditSchedule

SA3_FAMILY = "stable-audio-3"
OPEN_FAMILY = "stable-audio-open"

# Whose networks a model runs on: ours, or for a Stable Audio Open config those of the package of that name.
NetworkBackend = Literal["native", "stable_audio_tools"]

# How a decoder's products are rounded: not, as three products of half-precision parts, to TF32, to half precision.
DecodePrecision = Literal["float32", "split", "tf32", "half"]

# Listed here so that a job with another sampler is refused when it is submitted, without importing torch.
FLOW_SAMPLERS = ("euler", "rk4", "dpmpp", "pingpong")
V_TIME_SAMPLERS = ("v-ddim", "v-ddim-cfgpp")  # of models trained for v; the others run over sigma
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
_LOWEST_SIGMA, _HIGHEST_SIGMA = 0.01, 500.0  # of an edit


@dataclass(frozen=True, slots=True)
class ModelCard:
    """The public facts of one served model; durations in seconds, rates in hertz."""

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
    edit_schedule: EditSchedule | None = None  # the operator's choice
    samplers: tuple[str, ...] = FLOW_SAMPLERS  # allowed values of GenerationRequest.sampler
    conditions_on_start: bool = False  # honours GenerationRequest.start_s
    is_demo: bool = False
    description: str = ""

    @property
    def default_edit_schedule(self) -> EditSchedule:
        """The schedule of a flow model's edits: the operator's choice, else the family's own.

        The reference's times of Stable Audio Open are even and never above the level, those of Stable Audio 3 are
        neither (`sampling/schedules.py`).
        """
        return self.edit_schedule or ("reference" if self.family == OPEN_FAMILY else "even")

    def noise_level(self, share: float, *, sampler: str | None) -> float:
        """Returns `GenerationRequest.init_noise_level` for a share of noise in 0..1; 1 = no influence of the source.

        A sampler over sigma gets the level whose time, 2/pi atan sigma, is that share.
        """
        if self.objective != "v" or sampler in V_TIME_SAMPLERS:
            return share
        return min(max(math.tan(share * math.pi / 2), _LOWEST_SIGMA), _HIGHEST_SIGMA)


class ModelCatalog:
    """The configured models by canonical name and alias, in configuration order; lookups ignore case and spaces."""

    def __init__(self, cards: Iterable[ModelCard], *, default: str | None = None) -> None:
        """`default` may be an alias. Without it the default is the first card that is not the demo, if any.

        Raises ConfigError when there is no card, a name is claimed twice, or the default is unknown.
        """
        self._cards: dict[str, ModelCard] = {}
        self._names: dict[str, str] = {}
        for card in cards:
            for name in (card.name, *card.aliases):
                key = _key(name)
                if self._names.get(key, card.name) != card.name:
                    raise ConfigError(f"models: the name {name!r} is claimed by two models", field="models")
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
        """Returns the card for a canonical name or an alias. Raises UnknownModelError naming the valid ones."""
        canonical = self._names.get(_key(name))
        if canonical is None:
            valid = ", ".join(self._cards)
            raise UnknownModelError(f"unknown model {name[:100]!r}; valid: {valid}", field="model", allowed=valid)
        return self._cards[canonical]

    def choose(self, name: str | None, *, family: str) -> ModelCard:
        """Returns the card of `name`; without one the first of `family`, and the default where none is served.

        Raises UnknownModelError.
        """
        if name is not None:
            return self.resolve(name)
        return next((card for card in self if card.family == family), self.default)

    def __iter__(self) -> Iterator[ModelCard]:
        return iter(self._cards.values())

    def __len__(self) -> int:
        return len(self._cards)


# How a replica came through the quality gate: passed; unchecked = there is sound, but nothing to compare it with could
# be read; fallback = the last good weights serve, because the configured ones failed; off = there was no gate.
GateOutcome = Literal["passed", "unchecked", "fallback", "off"]


@dataclass(frozen=True, slots=True)
class ModelQuality:
    """What is known of a replica's weights and sound.

    `weights` is their hash, `revision` the commit they are from, None from a folder; `report` is the id of their
    quality report. `problem` is a sentence for clients, without places of this machine.
    """

    gate: GateOutcome
    weights: str | None = None
    revision: str | None = None
    report: str | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """What one model's replicas are doing.

    `stage` is loading, ready, failed, idle (scaled to zero) or waking (from zero, while its first requests are held).
    `quality` is that of the replica that has the most to say. `refused_update` says why a deployment failed while older
    replicas go on, else None. `states` counts replicas by Serve's words: running, starting, stopping and so on.
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
