"""Settings of served models: weights, devices, engines and replicas."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from stable_audio_serve.core.catalog import DecodePrecision, NetworkBackend
from stable_audio_serve.core.generation import EditSchedule, Stacking
from stable_audio_serve.core.setting_types import (
    AdapterName,
    Delay,
    Device,
    FileName,
    Folder,
    ModelName,
    NewModelName,
    ReportId,
    Seconds,
    Section,
)


class ReplicaSettings(Section):
    """How many replicas a model has, and when replicas are added and removed (docs/operations.md)."""

    min_replicas: int | None = Field(
        None, ge=0, description="Fewest replicas; unset = 1 for preloaded models, 0 for others."
    )
    max_replicas: int = Field(1, ge=1, description="Most replicas under load.")
    target_wait_s: Seconds = Field(
        10.0, description="Autoscaling target: predicted work per replica, queued jobs included, seconds."
    )
    upscale_delay_s: Delay = Field(
        3.0,
        description="How long demand must exceed the replicas before some are added, seconds.",
    )
    downscale_delay_s: Delay = Field(
        300.0, description="How long demand must be lower before replicas are removed, seconds."
    )
    surge: bool | None = Field(
        None,
        description="Whether an update starts a new replica before it stops an old one, which needs the resources and "
        "memory of one more; unset = yes if one more fits on the nodes beside the most replicas of all models.",
    )

    @model_validator(mode="after")
    def _check_order(self) -> ReplicaSettings:
        if self.min_replicas is not None and self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas must not be above max_replicas")
        return self


class QualityGateSettings(Section):
    """The quality gate: the check of a new replica's audio before it serves requests (docs/operations.md)."""

    enabled: bool = Field(True, description="Whether new replicas must pass the gate.")


class EngineSettings(Section):
    """How one replica shares its device among requests. The defaults suit most servers."""

    profile: Literal["auto", "plain", "accelerated"] = Field(
        "auto",
        description="Speed features on a GPU: plain = none, accelerated = all, auto = all if a check at start passes.",
    )
    features: dict[Literal["captures", "second_queue", "packing", "fast_decoding", "fused_kernels"], bool] = Field(
        {}, description="Speed features to switch off on a GPU, such as {captures: off}; see the page on operation."
    )
    warmup_budget_s: float = Field(
        2.0, ge=0, le=3600, description="Time for measuring speed before the first request, seconds; 0 = none."
    )


class LoraSettings(Section):
    """One adapter of a model."""

    path: FileName = Field(
        description="Its safetensors file: a path, an https URL, s3://bucket/key, or a repository of the hub, with or "
        "without a file in it.",
    )
    conditioner: bool = Field(
        False, description="Whether it also changes the embedding of the duration, if the file has tensors for that."
    )


def _from_path(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


class ModelSettings(Section):
    """One served model. Without `path` and `repo_id`, `name` must be in the built-in registry."""

    name: NewModelName = Field(description="Canonical name, used in headers and file names.")
    path: Folder | None = Field(None, description="Folder with model_config.json and model.safetensors.")
    repo_id: str | None = Field(None, min_length=1, description="Hugging Face repository of the same files.")
    revision: str | None = Field(None, min_length=1, description="Branch, tag or commit of the repository.")
    aliases: tuple[ModelName, ...] = Field((), description="Further names that requests may use.")
    max_duration_s: Seconds | None = Field(None, description="Longest clip, seconds; unset = the model's own limit.")
    duration_padding_s: float | None = Field(
        None,
        ge=0,
        le=30,
        description="Audio generated past the end of a clip and cut off, seconds; unset = the model's default.",
    )
    edit_schedule: EditSchedule | None = Field(
        None,
        description="Time steps of a flow model's edits: even in log-SNR, scaled by the noise level, or reference = "
        "as the original code; unset = even for Stable Audio 3, reference for Stable Audio Open.",
    )
    backend: NetworkBackend = Field(
        "native",
        description="stable_audio_tools = run a Stable Audio Open model with that package's networks, which support "
        "more configs than the native ones (docs/models.md).",
    )
    device: Device | None = Field(None, description="cuda, mps or cpu; unset = the server's `device`.")
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None,
        description="Precision of the denoiser; unset = by `model_half` on CUDA, else float32. bfloat16 on a CPU needs "
        "AVX512-bf16 or AMX (docs/performance.md).",
    )
    decode_precision: DecodePrecision | None = Field(
        None,
        description="Precision of the decoder's matrix products; unset = float32 on a CPU; on CUDA half, or tf32 if "
        "`dtype` is float32.",
    )
    compile: bool = Field(
        False,
        description="Compile the denoiser's layers (torch.compile) at the start; fast mode only, best on CUDA. "
        "Needs a C++ compiler, and Triton on CUDA.",
    )
    mode: Literal["strict", "fast"] | None = Field(
        None, description="strict = bytes do not depend on other requests; unset = strict on a CPU, fast on CUDA."
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads per replica; unset = its share of the machine's cores, 1 for the demo."
    )
    num_cpus: float | None = Field(None, ge=0, allow_inf_nan=False, description="CPU cores Ray reserves per replica.")
    num_gpus: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="GPUs Ray reserves per replica, a fraction below 1 or a whole number; unset = 1 on CUDA, else 0.",
    )
    memory_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of a GPU's memory a replica may use, weights included; at most `num_gpus`, the default.",
    )
    max_queue_s: Seconds = Field(
        300.0,
        description="Predicted work a replica queues before it refuses requests, seconds; lower for batch work.",
    )
    max_memory_bytes: int | None = Field(
        None,
        ge=1,
        description="Device memory for variations in progress per replica, bytes; others wait; unset = most of "
        "`memory_share` minus the weights on CUDA, no limit on a CPU.",
    )
    loras: dict[AdapterName, Annotated[LoraSettings, BeforeValidator(_from_path)]] = Field(
        {}, description="Adapters by name: a path or source, or {path, conditioner} (docs/adapters.md)."
    )
    lora_folder: Folder | None = Field(
        None, description="Folder of adapters, named by their files; new files are found while the server runs."
    )
    max_loras: int = Field(4, ge=1, le=64, description="Most adapters of one request.")
    max_lora_rank: int = Field(
        64, ge=1, le=256, description="Most that the ranks of a request's adapters may add up to."
    )
    lora_cache_bytes: int = Field(
        512 * 2**20, ge=0, description="Memory of a replica for loaded adapters, bytes; on the GPU, if there is one."
    )
    lora_stacking: Stacking = Field(
        "chained",
        description="How several adapters combine if the request does not say: chained or summed (docs/adapters.md).",
    )
    engine: EngineSettings = Field(EngineSettings(), description="Scheduling of requests on a replica.")
    replicas: ReplicaSettings = Field(ReplicaSettings(), description="Replica counts.")
    quality_report: ReportId | None = Field(
        None,
        description="Id of the quality report that this model must match, at any revision; unset = its own.",
    )

    @model_validator(mode="after")
    def _check_source(self) -> ModelSettings:
        if self.path and (self.repo_id or self.revision):
            raise ValueError("set either path, or repo_id and revision")
        return self

    @model_validator(mode="after")
    def _check_gpu(self) -> ModelSettings:
        if self.num_gpus is not None and self.num_gpus > 1 and self.num_gpus % 1:
            raise ValueError("num_gpus must be a whole number when it is above 1")
        if self.memory_share is not None and (self.num_gpus == 0 or self.device in ("cpu", "mps")):
            raise ValueError("memory_share needs a GPU: set num_gpus above 0 and device to cuda")
        return self

    @model_validator(mode="after")
    def _check_compile(self) -> ModelSettings:
        if self.compile and self.mode == "strict":
            raise ValueError("compile needs mode: fast, because compiled kernels differ between shapes")
        if self.compile and self.backend != "native":
            raise ValueError("compile needs backend: native")
        return self
