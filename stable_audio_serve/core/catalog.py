"""Names, limits and defaults of the served models, which are known before any weights are loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from stable_audio_serve.core.errors import ConfigError, UnknownModelError
from stable_audio_serve.core.generation import EditSchedule, Stacking

# Names of adapters. A colon and plus signs separate them from the model in `medium:vinyl+bells`.
ADAPTER_NAME = r"(?!\s)[^:+/\\\x00-\x1f\x7f]{1,100}(?<!\s)"

SA3_FAMILY = "stable-audio-3"
OPEN_FAMILY = "stable-audio-open"

# The package whose networks a model uses: this one, or stable-audio-tools, which only runs Stable Audio Open models.
NetworkBackend = Literal["native", "stable_audio_tools"]

DecodePrecision = Literal["float32", "tf32", "half"]  # precision of the decoder's matrix multiplications

# Names of the samplers, for models with a flow objective (FLOW_SAMPLERS) and with the v objective (V_SAMPLERS). They
# are not taken from `sampling`, which imports torch: the HTTP layer checks the names, and it must not import torch.
FLOW_SAMPLERS = ("euler", "rk4", "dpmpp", "pingpong")
V_TIME_SAMPLERS = ("v-ddim", "v-ddim-cfgpp")  # these step over the network's time, the other V_SAMPLERS over sigma
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
_LOWEST_SIGMA, _HIGHEST_SIGMA = 0.01, 500.0  # bounds of the sigma that `noise_level` returns


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Public properties of one served model, which do not depend on its replicas."""

    name: str
    family: str
    aliases: tuple[str, ...] = ()
    max_duration_s: float = 120.0
    sample_rate_hz: int = 44100
    channels: int = 2
    latent_channels: int = 256
    objective: str = "rf_denoiser"  # the training objective: rf_denoiser, rectified_flow or v
    default_steps: int = 8
    default_cfg_scale: float = 1.0
    default_duration_padding_s: float = 6.0
    edit_schedule: EditSchedule | None = None  # None = the default of the model's family
    samplers: tuple[str, ...] = FLOW_SAMPLERS  # the values that `GenerationRequest.sampler` may have
    conditions_on_start: bool = False  # whether the model uses `GenerationRequest.start_s`
    is_demo: bool = False
    description: str = ""
    lora_stacking: Stacking = "chained"  # how several adapters combine if the request does not set `lora_stacking`
    loras: tuple[str, ...] = ()  # the adapters in the model name of a request, such as `medium:vinyl+bells`

    @property
    def takes_adapters(self) -> bool:
        """Whether adapters (LoRA) of this model can exist."""
        return self.family == SA3_FAMILY

    @property
    def default_edit_schedule(self) -> EditSchedule:
        """The schedule of a flow model's edits: `edit_schedule`, or if that is None, the default of the model's family.

        For Stable Audio Open the default is "reference", because the original code's schedule is evenly spaced and
        never exceeds the noise level. The original schedule of other models does not have these properties, so their
        default is "even".
        """
        return self.edit_schedule or ("reference" if self.family == OPEN_FAMILY else "even")

    def noise_level(self, share: float, *, sampler: str | None) -> float:
        """Convert a share of noise to the value of `GenerationRequest.init_noise_level`.

        `share` is in 0..1. At 1, the source audio has no influence. If the sampler steps over sigma, the result is the
        sigma for which share = 2/pi atan(sigma). For other samplers the result is `share`.
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
                if card.name in self._cards or self._names.get(key, card.name) != card.name:
                    raise ConfigError(f"models: two models have the name {name!r}", field="models")
                self._names[key] = card.name
            self._cards[card.name] = card
        if not self._cards:
            raise ConfigError("models: at least one model must be configured", field="models")
        try:
            self.default = self.find(default) if default else min(self, key=lambda card: card.is_demo)
        except UnknownModelError as error:
            raise ConfigError(
                f"default_model (STABLE_AUDIO_DEFAULT_MODEL or STABLE_AUDIO_MODEL): {error.message}",
                field="default_model",
            ) from error

    def resolve(self, name: str) -> ModelCard:
        """Return the card for a canonical name or an alias. Raises UnknownModelError, which lists the valid names.

        A name like `medium:vinyl+bells` also asks for two adapters. The card lists their names in `loras`. This method
        does not check whether the adapters exist.
        """
        model, _, adapters = name.rpartition(":")  # aliases may contain colons, names of adapters do not
        loras = tuple(part.strip() for part in adapters.split("+"))
        if _key(name) not in self._names and _key(model) in self._names and all(loras):
            return replace(self.find(model), loras=loras)
        return self.find(name)

    def find(self, name: str) -> ModelCard:
        """Return the card for a canonical name or an alias. Raises UnknownModelError, which lists the valid names."""
        canonical = self._names.get(_key(name))
        if canonical is None:
            valid = ", ".join(self._cards)
            raise UnknownModelError(f"unknown model {name[:100]!r}; valid: {valid}", field="model", allowed=valid)
        return self._cards[canonical]

    def choose(self, name: str | None, *, family: str) -> ModelCard:
        """Return the card of the model `name`. Raises UnknownModelError if there is no such model.

        If `name` is None, returns the first card of `family`, or the default if no model is of this family.
        """
        if name is not None:
            return self.resolve(name)
        return next((card for card in self if card.family == family), self.default)

    def __iter__(self) -> Iterator[ModelCard]:
        return iter(self._cards.values())


# Result of the quality gate, which compares a new replica's audio with the model's quality report. passed: the audio
# matches. unchecked: no report could be read. fallback: the configured weights failed, so the replica serves the last
# weights that passed. off: the gate is disabled.
GateOutcome = Literal["passed", "unchecked", "fallback", "off"]


@dataclass(frozen=True, slots=True)
class ModelQuality:
    """The weights of a replica, and its result at the quality gate.

    `weights` is the hash of the weights. `revision` is the repository commit that the weights come from, or None if
    they come from a local folder. `report` is the id of the weights' quality report. `problem` explains a bad result.
    Clients may see `problem`, so it contains no path of this machine.
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
    `quality` describes the replica with the worst result at the quality gate. If the replicas of the last deployment
    do not start and older replicas serve instead, `refused_update` is the reason. `states` maps the names of Ray
    Serve's replica states to the number of replicas in each state.
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
