"""The one settings tree: every value an operator may choose, with its unit, bounds and default.

Holds values only; where they come from (file, `.env`, environment) is `core.settings_sources`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    model_validator,
)

from stable_audio_serve.core.catalog import DecodePrecision, NetworkBackend
from stable_audio_serve.core.generation import EditSchedule
from stable_audio_serve.core.setting_types import (
    Delay,
    Device,
    FileName,
    Folder,
    Hidden,
    HiddenPassword,
    HostName,
    ModelName,
    Origin,
    PlainUrl,
    ProxyKind,
    ReportId,
    Seconds,
    Url,
    check_key_hashes,
    check_signing_secret,
    split_commas,
    trim_prefix,
)
from stable_audio_serve.core.sound import Peaks


class Section(BaseModel):
    """Base of every section: frozen, refuses unknown keys, checks values by type and range."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ApiSettings(Section):
    """Limits of the HTTP API, the keys that may use it, and the names and origins it is reached by."""

    max_duration_s: Seconds = Field(380.0, description="Longest clip of our own API, seconds; a model may allow less.")
    max_steps: int = Field(50, ge=1, le=1000, description="Most denoising steps of our own API.")
    max_batch_size: int = Field(4, ge=1, le=99, description="Most variations of one request.")
    max_upload_bytes: int = Field(104_857_600, ge=1, description="Largest uploaded audio file, bytes.")
    max_fields_bytes: int = Field(
        1_048_576, ge=1024, description="Largest JSON body, and largest rest of a form besides its upload, bytes."
    )
    max_bodies_bytes: int = Field(
        4_294_967_296, ge=1, description="Bodies of requests in progress, uploads included, bytes, per ingress replica."
    )
    max_source_bytes: int = Field(
        1_073_741_824, ge=1, description="Decoded source audio of requests in progress, bytes, per ingress replica."
    )
    receive_rate_bytes_s: float = Field(
        4096.0,
        gt=0,
        allow_inf_nan=False,
        description="Least rate at which a body must arrive, averaged over `receive_window_s`, bytes a second.",
    )
    receive_window_s: Seconds = Field(10.0, description="What that rate is averaged over, seconds.")
    receive_total_timeout_s: Seconds = Field(300.0, description="Longest time for a whole body to arrive, seconds.")
    max_receiving: int = Field(
        256, ge=1, description="Bodies received at a time, per ingress replica, besides those that arrive at once."
    )
    receive_grace_s: Seconds = Field(
        4.0, description="What at once means: a body within about this time, give or take a half, seconds."
    )
    send_idle_timeout_s: Seconds = Field(60.0, description="Longest a client may stop reading its answer, seconds.")
    default_deadline_s: Seconds = Field(900.0, description="Time budget of a request that names none, seconds.")
    max_deadline_s: Seconds = Field(3600.0, description="Largest time budget a request may ask for, seconds.")
    max_decode_s: Seconds = Field(20.0, description="Longest time to decode one uploaded file, seconds.")
    decode_workers: int = Field(1, ge=1, le=16, description="Processes that decode uploads, per ingress replica.")
    encode_workers: int = Field(2, ge=1, le=64, description="Threads that encode audio files, per ingress replica.")
    key_hashes: Annotated[tuple[str, ...], BeforeValidator(split_commas), AfterValidator(check_key_hashes), Hidden] = (
        Field(
            (),
            description="Keys that may use the API, as `<SHA-256>` or `<client>:<SHA-256>`, a list or comma list; "
            "none = everybody may.",
            repr=False,
        )
    )
    key_file: FileName | None = Field(
        None, description="File of further keys, lines as `keys new` prints them, read again when it changes."
    )
    public_url: Url | None = Field(
        None, description="How clients reach this server, for links in replies; unset = by what each request used."
    )
    cors_origins: Annotated[tuple[Origin, ...], BeforeValidator(split_commas)] | None = Field(
        None,
        description="Origins whose pages may use the API, a list or comma list; * = all, empty = none; "
        "unset = all where keys are configured, else those of this machine and of `public_url`.",
    )
    allowed_hosts: Annotated[tuple[HostName, ...], BeforeValidator(split_commas)] = Field(
        (),
        description="Names this server is called by, besides its addresses, localhost, its own name and that in "
        "`public_url`, a list or comma list; * = any. Where keys are configured, none = any.",
    )

    @property
    def has_keys(self) -> bool:
        """Whether keys are configured: then requests need one."""
        return bool(self.key_hashes) or self.key_file is not None


class AudioSettings(Section):
    """How finished clips are treated before they are encoded."""

    peaks: Peaks = Field(
        "limit",
        description="limit = a limiter holds peaks at 0.977, quieter clips stay bit for bit; scale = every clip is "
        "divided by its own peak; clip = cut off at full scale. Requests may choose.",
    )


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
        description="How long there is work for twice as many replicas before some are added, seconds; a third of it "
        "if for four times as many.",
    )
    downscale_delay_s: Delay = Field(
        300.0, description="How long fewer replicas have been enough before some are removed, seconds."
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
    budget_s: Seconds = Field(20.0, description="No golden request begins later than this, but for the first, seconds.")
    store_wait_s: Seconds = Field(10.0, description="Longest wait for one answer of the report store, seconds.")


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
    turn_frames: int = Field(
        512, ge=1, le=1_048_576, description="Latent frames encoded or decoded between two steps, in fast mode."
    )
    slack: float = Field(
        6.0,
        ge=1,
        le=1000,
        description="A request is due this many times its time alone after it arrived; who is due first goes first.",
    )
    max_slack_s: float = Field(120.0, ge=0, le=86_400, description="Longest that may be until then, seconds.")
    batch_share: float = Field(
        0.125, ge=0, le=100, description="Time batch work gets beside other work, as a share of that work's time."
    )
    prompt_cache_bytes: int = Field(268_435_456, ge=0, description="Encoded prompts that are kept, bytes; 0 = none.")
    warmup_budget_s: float = Field(
        2.0, ge=0, le=3600, description="Time spent on measuring speed before the first request, seconds; 0 = none."
    )


class ModelSettings(Section):
    """One served model. With neither `path` nor `repo_id` the name must be one of the built-in registry."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        json_schema_extra={"form": "1 to 64 letters, digits, dots, dashes and underscores, a letter or digit first"},
        description="Canonical name, as it stands in headers and file names.",
    )
    path: Folder | None = Field(None, description="Folder with model_config.json and model.safetensors.")
    repo_id: str | None = Field(None, min_length=1, description="Hugging Face repository of the same files.")
    revision: str | None = Field(None, min_length=1, description="Branch, tag or commit of the repository.")
    aliases: tuple[ModelName, ...] = Field((), description="Further names requests may use.")
    max_duration_s: Seconds | None = Field(None, description="Longest clip, seconds; unset = the model's own cap.")
    duration_padding_s: float | None = Field(
        None, ge=0, le=30, description="Headroom generated behind a clip, seconds; unset = the model's own."
    )
    edit_schedule: EditSchedule = Field(
        "scaled",
        description="Times of a flow model's edits: scaled by their noise level, or reference = as the original code.",
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
    overflow: Literal["cpu"] | None = Field(
        None,
        description="cpu = requests that the replicas on GPUs refuse for being full go to replicas on CPUs, where they "
        "would end in time; meant for small models (docs/overflow.md).",
    )
    overflow_replicas: int = Field(
        1, ge=1, le=1000, description="Replicas on CPUs for `overflow`, which are always loaded."
    )
    max_queue_s: Seconds = Field(
        300.0,
        description="Predicted work a replica accepts before it refuses, seconds; batch work leaves room for other.",
    )
    max_rows: int = Field(
        64, ge=2, description="Most variations in progress on one replica; a quarter is kept free of batch ones."
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
    def _check_overflow(self) -> ModelSettings:
        if self.overflow is None:
            if "overflow_replicas" in self.model_fields_set:
                raise ValueError("overflow_replicas needs overflow: cpu")
        elif self.num_gpus == 0 or self.device in ("cpu", "mps"):
            raise ValueError("overflow: cpu is for a model on a GPU, and this one gets none")
        elif self.mode == "strict":
            raise ValueError("overflow and mode: strict exclude each other: a CPU makes other bytes than a GPU")
        return self

    @model_validator(mode="after")
    def _check_compile(self) -> ModelSettings:
        if self.compile and self.mode == "strict":
            raise ValueError("compile and mode: strict exclude each other: kernels differ between shapes of calls")
        if self.compile and self.backend != "native":
            raise ValueError("compile needs backend: native")
        return self


class IngressSettings(Section):
    """The deployment that answers HTTP requests: its processes and what one of them handles at a time."""

    replicas: int = Field(1, ge=1, description="Ingress processes; two or more off a laptop.")
    num_cpus: float = Field(0.0, ge=0, allow_inf_nan=False, description="CPU cores Ray reserves per process.")
    max_ongoing_requests: int = Field(256, ge=1, description="Generations one process has in progress at a time.")
    max_event_streams: int = Field(128, ge=1, description="Streams of job events one process has open at a time.")


class ProxySettings(Section):
    """HAProxy in front of the ingress, where `stable-audio-serve serve` starts it; on a cluster its variables count."""

    kind: ProxyKind = Field("auto", description="Who accepts connections; auto = HAProxy where it runs.")
    header_timeout_s: Seconds = Field(
        15.0, description="Longest time for a request's headers and the first 16 kB of its body to arrive, seconds."
    )
    idle_timeout_s: Seconds = Field(
        120.0, description="Longest a client may neither send what is missing nor take what is there, seconds."
    )


class MetricsSettings(Section):
    """Where the pages with statistics and metrics for operators listen."""

    host: str = Field(
        "127.0.0.1",
        pattern=r"^[0-9A-Za-z.:%_-]+$",
        json_schema_extra={"form": "an address or a host name"},
        description="Where statistics and metrics listen; another than loopback opens Ray's other ports there too.",
    )
    port: int | None = Field(
        None, ge=1, le=65535, description="Port of the metrics of a Ray of the server's own; unset = a free one."
    )


class DialectSettings(Section):
    """Which model each foreign dialect uses. An unset model is the first Stable Audio Open that is served, for which
    these dialects were written, else the server's default model.
    """

    saos_model: ModelName | None = Field(None, description="Model behind the Stable Audio Open small routes.")
    vllm_model: ModelName | None = Field(None, description="Model of vLLM requests that name none.")
    aiml_model: ModelName | None = Field(None, description="Model called `stable-audio` in the AIML API.")
    fal_model: ModelName | None = Field(None, description="Model behind `fal-ai/stable-audio`.")
    saos_window_s: Seconds = Field(
        524_288 / 44_100, description="Longest clip of the Stable Audio Open small routes, seconds."
    )
    riff_dir: Folder | None = Field(
        None,
        description="Folder of riffs named like gsharp_80bpm_4.wav; unset = `riffs`, or two packaged ones without it.",
    )


class JobSettings(Section):
    """The job queue: where jobs are kept, how many may wait or run, and how long they are kept."""

    database_url: Annotated[str | None, HiddenPassword] = Field(
        None, min_length=1, description="Where jobs are kept; unset = SQLite, jobs.db in `output_dir`."
    )
    max_queued: int = Field(
        10_000,
        ge=1,
        description="Jobs waiting to run; above it only keys with less than their share add some, up to twice as many.",
    )
    max_queued_per_key: int = Field(1000, ge=1, description="Of these, jobs of one API key.")
    runners: int = Field(1, ge=1, description="Job runner processes.")
    max_running: int = Field(64, ge=1, description="Jobs of each priority running at a time, of one runner.")
    work_ahead_s: Seconds = Field(
        30.0,
        description="Predicted interactive work a runner hands to each model replica at a time, seconds; one job at "
        "least.",
    )
    batch_ahead_s: Seconds = Field(5.0, description="The same for batch work, which interactive work passes anyway.")
    lease_s: float = Field(
        15.0, ge=1, le=3600, description="How long a silent runner keeps its jobs, seconds; renewed at a third of it."
    )
    max_attempts: int = Field(3, ge=1, description="Starts of one job whose failure is not its own fault.")
    retention_s: Seconds = Field(604_800.0, description="How long ended jobs and their files are kept, seconds.")
    orphan_after_s: Seconds = Field(86_400.0, description="Age at which a file that belongs to nothing goes, seconds.")
    sweep_every_s: Seconds = Field(600.0, description="Pause between two sweeps of what is too old, seconds.")
    webhook_secret: Annotated[SecretStr, AfterValidator(check_signing_secret)] | None = Field(
        None, description="Signs webhooks (Standard Webhooks): `whsec_` and base64 of 24 to 64 bytes; unset = unsigned."
    )
    webhook_allow_hosts: tuple[str, ...] = Field(
        (), description="Hosts webhooks may reach although their address is private, for example localhost."
    )


class StorageSettings(Section):
    """Where the files of jobs are kept: an S3 bucket when `bucket` is set, else `output_dir`."""

    bucket: str | None = Field(None, min_length=1, description="Bucket name; unset = local files.")
    prefix: Annotated[str, AfterValidator(trim_prefix)] = Field(
        "stable-audio/jobs", max_length=500, description="What keys begin with; slashes at its ends do not count."
    )
    endpoint_url: PlainUrl | None = Field(None, description="Endpoint of an S3-compatible service; unset = AWS.")
    region: str = Field("us-east-1", min_length=1, description="Region; auto for R2.")
    addressing: Literal["auto", "path", "virtual"] = Field(
        "auto", description="Where the bucket stands in URLs; auto = in the path of endpoints, in the host of AWS."
    )
    public_base_url: PlainUrl | None = Field(
        None, description="Public base of download links; unset = presigned links."
    )
    presigned_url_expires_s: int = Field(3600, ge=1, le=604_800, description="Life of a presigned link, seconds.")
    access_key_id: SecretStr | None = Field(
        None, min_length=1, description="Access key; unset = where the AWS SDK looks for one."
    )
    secret_access_key: SecretStr | None = Field(None, min_length=1, description="The access key's secret.")
    session_token: SecretStr | None = Field(None, min_length=1, description="Of temporary access keys.")

    @model_validator(mode="after")
    def _check_keys(self) -> StorageSettings:
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise ValueError("access_key_id and secret_access_key belong together")
        return self


class Settings(Section):
    """Everything an operator may choose; the application `args:` of serve_config.yaml have this shape."""

    models: tuple[ModelSettings, ...] = Field(
        (ModelSettings(name="small-sfx"), ModelSettings(name="small-music"), ModelSettings(name="medium")),
        min_length=1,
        description="The served models; the first that is no demo is the default, unless `default_model` is set.",
    )
    default_model: ModelName | None = Field(None, description="Model of requests that name none; aliases allowed.")
    preload_models: Annotated[tuple[ModelName, ...], BeforeValidator(split_commas)] | None = Field(
        None,
        description="Models kept loaded, a list or comma list; empty = load on first use; unset = the default.",
    )
    device: Device | None = Field(None, description="cuda, mps or cpu; unset = the first that exists.")
    model_half: bool = Field(True, description="Half precision denoisers on CUDA.")
    compile_dir: Folder = Field(
        "~/.cache/stable-audio-serve/compiled",
        description="Folder of what `compile` makes, kept between starts; nobody else may write to it.",
    )
    output_dir: Folder = Field("outputs", description="Folder of jobs and, without a bucket, their files.")
    hf_token: SecretStr | None = Field(None, description="Hugging Face token for gated weights.")
    drain_s: float = Field(
        20.0, ge=0, le=3600, description="How long a stop waits for answers in flight, seconds; 0 = not at all."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe line logged.")
    api: ApiSettings = Field(default_factory=lambda: ApiSettings(), description="Limits of the HTTP surface.")
    audio: AudioSettings = Field(default_factory=lambda: AudioSettings(), description="How clips are finished.")
    quality_gate: QualityGateSettings = Field(
        default_factory=lambda: QualityGateSettings(), description="The check of new replicas."
    )
    ingress: IngressSettings = Field(default_factory=lambda: IngressSettings(), description="The HTTP deployment.")
    proxy: ProxySettings = Field(default_factory=lambda: ProxySettings(), description="HAProxy's time limits.")
    metrics: MetricsSettings = Field(default_factory=lambda: MetricsSettings(), description="Pages for operators.")
    dialects: DialectSettings = Field(default_factory=lambda: DialectSettings(), description="Foreign dialects.")
    jobs: JobSettings = Field(default_factory=lambda: JobSettings(), description="Durable jobs.")
    storage: StorageSettings = Field(default_factory=lambda: StorageSettings(), description="Job artifacts.")

    @model_validator(mode="after")
    def _check_pins(self) -> Settings:
        if not self.quality_gate.enabled and (pinned := [m.name for m in self.models if m.quality_report is not None]):
            raise ValueError(f"quality_report of {pinned[0]} needs quality_gate: {{enabled: true}}")
        return self
