"""The sections of the settings about served models: their weights, devices, engines and replicas."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stable_audio_serve.core.catalog import DecodePrecision, NetworkBackend
from stable_audio_serve.core.generation import EditSchedule
from stable_audio_serve.core.setting_types import Delay, Device, Folder, ModelName, NewModelName, ReportId, Seconds
from stable_audio_serve.core.settings_section import Section


class ReplicaSettings(Section):
    """How many replicas of a model run and when that changes (docs/autoscaling.md)."""

    min_replicas: int | None = Field(
        None, ge=0, description="Replicas kept at all times; unset = 1 for preloaded models, 0 for the others."
    )
    max_replicas: int = Field(1, ge=1, description="Most replicas under load.")
    target_wait_s: Seconds = Field(
        10.0, description="Predicted work per replica that autoscaling aims at, waiting jobs included, seconds."
    )
    upscale_delay_s: Delay = Field(
        3.0,
        description="How long more replicas are wanted before some are added, seconds.",
    )
    downscale_delay_s: Delay = Field(
        300.0, description="How long fewer replicas are wanted before some are removed, seconds."
    )
    surge: bool | None = Field(
        None,
        description="Whether an update starts a new replica before it stops an old one, which takes the resources and "
        "the memory of one more; unset = where Ray has them to spare when the application is deployed.",
    )

    @model_validator(mode="after")
    def _check_order(self) -> ReplicaSettings:
        if self.min_replicas is not None and self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas must not be above max_replicas")
        return self


class QualityGateSettings(Section):
    """What a new replica must generate before it takes requests (docs/quality.md)."""

    enabled: bool = Field(True, description="Whether there is a gate.")


class EngineSettings(Section):
    """How one replica shares its device among the requests it has; the defaults suit most."""

    max_step_tokens: int = Field(
        16_384, ge=64, le=1_048_576, description="Most latent frames of one denoising step, all its rows together."
    )
    slots: int = Field(
        8,
        ge=2,
        le=128,
        description="Rows of one call in strict mode on CUDA, a guided variation is two; unused ones cost.",
    )
    warmup_budget_s: float = Field(
        2.0, ge=0, le=3600, description="Time spent on measuring speed before the first request, seconds; 0 = none."
    )


class ModelSettings(Section):
    """One served model. With neither `path` nor `repo_id` the name must be one of the built-in registry."""

    name: NewModelName = Field(description="Canonical name, as it stands in headers and file names.")
    path: Folder | None = Field(None, description="Folder with model_config.json and model.safetensors.")
    repo_id: str | None = Field(None, min_length=1, description="Hugging Face repository of the same files.")
    revision: str | None = Field(None, min_length=1, description="Branch, tag or commit of the repository.")
    aliases: tuple[ModelName, ...] = Field((), description="Further names requests may use.")
    max_duration_s: Seconds | None = Field(None, description="Longest clip, seconds; unset = the model's own cap.")
    duration_padding_s: float | None = Field(
        None, ge=0, le=30, description="Headroom generated behind a clip, seconds; unset = the model's own."
    )
    edit_schedule: EditSchedule | None = Field(
        None,
        description="Times of a flow model's edits: even in log-SNR, scaled by their noise level, or reference = as "
        "the original code; unset = even for Stable Audio 3, reference for Stable Audio Open.",
    )
    backend: NetworkBackend = Field(
        "native",
        description="stable_audio_tools = a Stable Audio Open model runs on that package's networks, which build more "
        "configs than the native ones (docs/stable-audio-tools.md).",
    )
    device: Device | None = Field(None, description="cuda, mps or cpu; unset = the server's `device`.")
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None,
        description="Precision of the denoiser; unset = by `model_half` on CUDA, else float32. bfloat16 on a CPU needs "
        "AVX512-bf16 or AMX (docs/cpu.md).",
    )
    decode_precision: DecodePrecision | None = Field(
        None,
        description="Precision of the decoder's products; split = three in half precision, near float32; unset = tf32 "
        "on CUDA, else float32.",
    )
    compile: bool = Field(
        False,
        description="Compile the denoiser's layers (torch.compile) at the start, in fast mode only; meant for CUDA; "
        "needs a C++ compiler, on CUDA Triton, too.",
    )
    mode: Literal["strict", "fast"] | None = Field(
        None, description="strict = same bytes in any company; unset = strict on a CPU, fast on CUDA."
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads of one replica; unset = its share of the machine's cores, 1 for the demo."
    )
    num_cpus: float | None = Field(None, ge=0, allow_inf_nan=False, description="CPU cores Ray reserves per replica.")
    num_gpus: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="GPUs Ray reserves per replica, a share below 1 or a whole number; unset = 1 on CUDA, else 0.",
    )
    memory_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of a GPU's memory a replica may use, weights included; unset = `num_gpus` if below 1.",
    )
    max_queue_s: Seconds = Field(
        300.0,
        description="Predicted work a replica accepts before it refuses, seconds; batch work leaves room for other.",
    )
    max_memory_bytes: int | None = Field(
        None,
        ge=1,
        description="Device memory for variations in progress on one replica, bytes; others wait; unset = most of what "
        "weights leave of `memory_share` on CUDA, no bound on a CPU.",
    )
    engine: EngineSettings = Field(
        default_factory=lambda: EngineSettings(), description="How a replica shares its device among requests."
    )
    replicas: ReplicaSettings = Field(default_factory=lambda: ReplicaSettings(), description="Replica counts.")
    quality_report: ReportId | None = Field(
        None,
        description="Id of the quality report that this model must sound like, whatever its revision; unset = its own.",
    )

    @model_validator(mode="after")
    def _check_source(self) -> ModelSettings:
        if self.path and (self.repo_id or self.revision):
            raise ValueError("path and repo_id/revision exclude each other")
        return self

    @model_validator(mode="after")
    def _check_gpu(self) -> ModelSettings:
        if self.num_gpus is not None and self.num_gpus > 1 and self.num_gpus % 1:
            raise ValueError("num_gpus must be a whole number above 1")
        if self.memory_share is not None and (self.num_gpus == 0 or self.device in ("cpu", "mps")):
            raise ValueError("memory_share is of a GPU's memory, and this model gets no GPU")
        return self

    @model_validator(mode="after")
    def _check_compile(self) -> ModelSettings:
        if self.compile and self.mode == "strict":
            raise ValueError("compile and mode: strict exclude each other: kernels differ between shapes of calls")
        if self.compile and self.backend != "native":
            raise ValueError("compile needs backend: native")
        return self
