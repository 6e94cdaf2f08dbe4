"""Health, readiness and the list of models. These routes load no model and wait for none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pydantic import BaseModel, Field

from stable_audio_serve.api.compat.stable_audio_open_small.windowed_model import default_model
from stable_audio_serve.api.middleware.key_ring import KeyFileState
from stable_audio_serve.api.service import Service
from stable_audio_serve.core.adapters import AdapterCard
from stable_audio_serve.core.catalog import GateOutcome, ModelCard, ModelStatus
from stable_audio_serve.core.settings_sources import preloaded_names
from stable_audio_serve.jobs.store.health import StoreHealth, StoreState

_UNKNOWN = ModelStatus("loading")
# Stages in which a model accepts requests. "idle" and "waking" have no replica yet: requests wait until one is loaded.
_ANSWERING = frozenset({"ready", "idle", "waking"})


class QualityHealth(BaseModel):
    """The weights that a replica uses, and the result of its quality check at startup."""

    gate: GateOutcome = Field(
        description="passed; unchecked: the model makes sound, but no quality report could be read; fallback: the "
        "configured weights failed and the last good ones serve; off."
    )
    weights: str | None = Field(description="SHA-256 over config, weights and text encoder.")
    revision: str | None = Field(description="Commit of the weights; null for weights from a folder.")
    report: str | None = Field(description="Id of their quality report, usable as `quality_report` in the settings.")
    problem: str | None = Field(description="The problem found, null if none.")


class ModelHealth(BaseModel):
    """State of one model's replicas."""

    stage: str = Field(description="loading, ready, failed, idle (scaled to zero) or waking (from zero).")
    demo: bool = Field(description="Whether this is the demo model, meant for trying out the server.")
    device: str | None
    num_replicas: int
    detail: dict[str, str]
    quality: QualityHealth | None = Field(
        description="Of the replica with the most serious result; null until one runs."
    )
    refused_update: str | None = Field(description="Reason why new replicas do not start while older ones serve.")


class ModelInfo(BaseModel):
    """The model of the Stable Audio Open Small routes."""

    sample_rate: int = Field(description="Hertz.")
    sample_size: int = Field(description="Length of the longest clip, samples.")
    diffusion_objective: str


class JobStoreHealth(BaseModel):
    """State of the job store."""

    state: StoreState = Field(description="ok; full or unavailable: temporary; moved: until the operator restores it.")
    reason: str | None = Field(description="Reason for a state other than ok.")


class KeysHealth(BaseModel):
    """State of the key file."""

    state: KeyFileState = Field(description="unset; ok; broken: the last valid keys apply; unread: no keys yet.")
    reason: str | None = Field(description="Reason for the states broken and unread.")


class Health(BaseModel):
    """The server's state and limits."""

    status: str = Field(
        description="ok if the default model can answer or any model is loaded, else the state of the default model: "
        "loading or failed; draining while the server drains or stops; keys while the key file cannot be read."
    )
    healthy: bool = Field(description="Whether the server accepts requests; as the status code of /ready.")
    reasons: list[str] = Field(description="Reasons for not being healthy.")
    model: str = Field(description="The default model.")
    model_info: ModelInfo
    device: str | None = Field(description="Device of the default model; the configured one until it runs.")
    loaded: bool
    model_loaded: bool
    cuda_available: bool
    storage_backend: str
    available_models: list[str]
    loaded_models: list[str]
    preload_models: list[str]
    model_duration_limits_seconds: dict[str, float]
    max_duration_seconds: float
    max_steps: int = Field(description="Most steps with the default model.")
    max_batch_size: int
    models: dict[str, ModelHealth]
    job_store: JobStoreHealth
    key_file: KeysHealth


class Ready(BaseModel):
    """Whether the server accepts requests."""

    ready: bool
    status: str = Field(description="ok if the default model can answer, else loading, failed, draining or keys.")
    reasons: list[str] = Field(description="Reasons for not being ready.")
    job_store: JobStoreHealth = Field(
        description="As in /health. It does not affect `ready`, because only jobs need it."
    )


class Model(BaseModel):
    """One served model: OpenAI's fields, then extensions."""

    id: str
    object: str = "model"
    created: int
    owned_by: str
    root: str
    parent: str | None = None
    max_model_len: int | None = None
    permission: list[str] = []
    family: str
    description: str
    aliases: list[str]
    is_demo: bool
    is_default: bool
    max_duration_s: float
    sample_rate_hz: int
    channels: int
    default_steps: int
    max_steps: int = Field(description="Most steps in the native API.")
    default_cfg_scale: float
    samplers: list[str]
    type: str | None = Field(None, description="Of an adapter: lora, dora-rows, lora-xs or dora-rows-xs.")
    rank: int | None = Field(None, description="Of an adapter: its rank.")
    sha256: str | None = Field(None, description="Of an adapter: the hash of its file.")


class ModelList(BaseModel):
    """The models in the format of OpenAI's list, which its client libraries parse."""

    object: str = "list"
    data: list[Model]


class Adapter(BaseModel):
    """One adapter (LoRA)."""

    index: int
    name: str
    path: str = Field(description="Name of its file, URL, or repository.")


class AdapterList(BaseModel):
    """The adapters in the format of sa3.cpp."""

    success: bool = True
    loras: list[Adapter]
    adapters_dir: str = Field("", description="Always empty.")
    model_loaded: bool


def describe_health(service: Service, status: Mapping[str, ModelStatus], *, job_store: StoreHealth) -> Health:
    """Return the response of the health route."""
    settings, catalog = service.settings, service.backend.catalog
    api = settings.api
    verdict = _judge(service, status)
    models = {card.name: _describe_status(card, status.get(card.name, _UNKNOWN)) for card in catalog}
    loaded = sorted(name for name, model in models.items() if model.stage == "ready")
    return Health(
        status="ok" if loaded and not verdict.is_blocked else verdict.status,
        healthy=not verdict.reasons,
        reasons=verdict.reasons,
        model=catalog.default.name,
        model_info=ModelInfo(**default_model(service).describe()),
        device=models[catalog.default.name].device or settings.device,
        loaded=bool(loaded),
        model_loaded=bool(loaded),
        cuda_available=any((model.device or "").startswith("cuda") for model in models.values()),
        storage_backend="s3" if settings.storage.bucket else "local",
        available_models=list(models),
        loaded_models=loaded,
        preload_models=list(preloaded_names(settings, catalog)),
        model_duration_limits_seconds={card.name: min(api.max_duration_s, card.max_duration_s) for card in catalog},
        max_duration_seconds=api.max_duration_s,
        max_steps=api.most_steps(catalog.default.default_steps),
        max_batch_size=api.max_batch_size,
        models=models,
        job_store=JobStoreHealth.model_validate(job_store, from_attributes=True),
        key_file=KeysHealth.model_validate(service.keys.ring.health, from_attributes=True),
    )


def describe_ready(service: Service, status: Mapping[str, ModelStatus], *, job_store: StoreHealth) -> Ready:
    """Return the response of the readiness route."""
    verdict = _judge(service, status)
    return Ready(
        ready=not verdict.reasons,
        status=verdict.status,
        reasons=verdict.reasons,
        job_store=JobStoreHealth.model_validate(job_store, from_attributes=True),
    )


def describe_models(service: Service, *, owned_by: str, created_at: int) -> ModelList:
    """Return the list of models. `created_at` is the Unix time when the server started."""
    catalog, longest_s = service.backend.catalog, service.settings.api.max_duration_s
    models = [
        Model(
            id=card.name,
            created=created_at,
            owned_by=owned_by,
            root=card.name,
            family=card.family,
            description=card.description,
            aliases=list(card.aliases),
            is_demo=card.is_demo,
            is_default=card.name == catalog.default.name,
            max_duration_s=min(longest_s, card.max_duration_s),
            sample_rate_hz=card.sample_rate_hz,
            channels=card.channels,
            default_steps=card.default_steps,
            max_steps=service.settings.api.most_steps(card.default_steps),
            default_cfg_scale=card.default_cfg_scale,
            samplers=list(card.samplers),
        )
        for card in catalog
    ]
    by_name = {model.id: model for model in models}
    adapters = [card for card in service.adapters.cards() if card.problem is None]
    return ModelList(data=[*models, *(_describe_adapter(card, by_name[card.model]) for card in adapters)])


def _describe_adapter(adapter: AdapterCard, model: Model) -> Model:
    facts = {"type": adapter.type, "rank": adapter.rank, "sha256": adapter.sha256}
    own = {"aliases": [], "description": "", "is_default": False, **facts}
    name = f"{model.id}:{adapter.name}"
    return model.model_copy(update={"id": name, "parent": model.id, "root": adapter.public_source, **own})


def describe_adapters(service: Service, status: Mapping[str, ModelStatus]) -> AdapterList:
    """Return the adapters of the default model.

    If the default model takes no adapters, return the adapters of the first model that takes some.
    """
    catalog = service.backend.catalog
    model = next((card for card in (catalog.default, *catalog) if card.takes_adapters), catalog.default)
    usable = [card for card in service.adapters.cards(model.name) if card.problem is None]
    return AdapterList(
        loras=[Adapter(index=index, name=card.name, path=card.public_source) for index, card in enumerate(usable)],
        model_loaded=status.get(model.name, _UNKNOWN).stage == "ready",
    )


class _Verdict(NamedTuple):
    """Whether a load balancer should send requests to this server: only if there are no `reasons` not to."""

    status: str  # ok, loading, failed, draining or keys
    reasons: list[str]
    is_blocked: bool  # whether the server accepts no work for another reason than its default model


def _judge(service: Service, status: Mapping[str, ModelStatus]) -> _Verdict:
    blocked = {}
    if service.draining.refusal is not None:
        blocked["draining"] = service.draining.refusal
    if service.keys.ring.health.state == "unread":
        blocked["keys"] = "the key file cannot be read"
    default = service.backend.catalog.default.name
    words, reasons = [*blocked], [*blocked.values()]
    if (stage := status.get(default, _UNKNOWN).stage) not in _ANSWERING:
        words.append(stage)
        state = "cannot be loaded" if stage == "failed" else "is being loaded"
        reasons.append(f"the default model, {default}, {state}")
    return _Verdict(words[0] if words else "ok", reasons, bool(blocked))


def _describe_status(card: ModelCard, status: ModelStatus) -> ModelHealth:
    return ModelHealth(
        stage=status.stage,
        demo=card.is_demo,
        device=status.device,
        num_replicas=status.num_replicas,
        detail=dict(status.detail or {}),
        quality=QualityHealth.model_validate(status.quality, from_attributes=True) if status.quality else None,
        refused_update=status.refused_update,
    )
