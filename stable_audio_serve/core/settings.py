"""The settings tree: every value an operator can choose, with its unit, bounds and default.

The sections are in the `settings_*` modules. `core.settings_sources` reads the values from the file, `.env` and the
environment.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SecretStr, model_validator

from stable_audio_serve.core.setting_types import Device, Folder, ModelName, Section, split_commas
from stable_audio_serve.core.settings_api import (
    ApiSettings,
    AudioSettings,
    DialectSettings,
    FalCheckpoint,
    IngressSettings,
    MetricsSettings,
    ProxySettings,
)
from stable_audio_serve.core.settings_jobs import JobSettings, StorageSettings
from stable_audio_serve.core.settings_models import EngineSettings, ModelSettings, QualityGateSettings, ReplicaSettings

__all__ = [
    "ApiSettings",
    "AudioSettings",
    "DialectSettings",
    "EngineSettings",
    "FalCheckpoint",
    "IngressSettings",
    "JobSettings",
    "MetricsSettings",
    "ModelSettings",
    "ProxySettings",
    "QualityGateSettings",
    "ReplicaSettings",
    "Section",
    "Settings",
    "StorageSettings",
]


class Settings(Section):
    """All settings. The `args:` of the application in serve_config.yaml have the same structure."""

    models: tuple[ModelSettings, ...] = Field(
        (ModelSettings(name="small-sfx"), ModelSettings(name="small-music"), ModelSettings(name="medium")),
        min_length=1,
        description="The served models. Without `default_model` the first one that is not the demo is the default.",
    )
    default_model: ModelName | None = Field(None, description="Model for requests without one; an alias is allowed.")
    preload_models: Annotated[tuple[ModelName, ...], BeforeValidator(split_commas)] | None = Field(
        None,
        description="Models kept loaded, a list or comma-separated; empty = load on first use; unset = default.",
    )
    device: Device | None = Field(None, description="cuda, mps or cpu; unset = the first available.")
    model_half: bool = Field(True, description="Run denoisers in half precision on CUDA.")
    output_dir: Folder = Field("outputs", description="Folder for jobs and, without a bucket, their files.")
    hf_token: SecretStr | None = Field(None, description="Hugging Face token for gated weights.")
    drain_s: float = Field(
        20.0, ge=0, le=3600, description="How long a stop waits for requests in progress, seconds; 0 = no wait."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Lowest level that is logged.")
    api: ApiSettings = Field(ApiSettings(), description="Limits of the HTTP API.")
    audio: AudioSettings = Field(AudioSettings(), description="Processing of finished clips.")
    quality_gate: QualityGateSettings = Field(QualityGateSettings(), description="Quality check of new replicas.")
    ingress: IngressSettings = Field(IngressSettings(), description="The HTTP deployment.")
    proxy: ProxySettings = Field(ProxySettings(), description="HAProxy's time limits.")
    metrics: MetricsSettings = Field(MetricsSettings(), description="Metrics for operators.")
    dialects: DialectSettings = Field(DialectSettings(), description="APIs of other servers.")
    jobs: JobSettings = Field(JobSettings(), description="Durable jobs.")
    storage: StorageSettings = Field(StorageSettings(), description="Storage of job files.")

    @property
    def hub_token(self) -> str | None:
        """`hf_token` in plain text, for downloads from Hugging Face. None if it is not set."""
        return self.hf_token.get_secret_value() if self.hf_token else None

    @model_validator(mode="after")
    def _check_pins(self) -> Settings:
        if not self.quality_gate.enabled and (pinned := [m.name for m in self.models if m.quality_report is not None]):
            raise ValueError(f"quality_report of {pinned[0]} needs quality_gate: {{enabled: true}}")
        return self
