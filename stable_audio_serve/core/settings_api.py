"""Settings of the HTTP server: request limits, ingress, proxy, metrics, dialects and processing of finished clips."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from stable_audio_serve.core.setting_types import (
    FileName,
    Folder,
    Hidden,
    HostName,
    ListenHost,
    ModelName,
    Origin,
    ProxyKind,
    Seconds,
    Section,
    UnknownFields,
    Url,
    check_key_hashes,
    split_commas,
)
from stable_audio_serve.core.sound import Peaks

_MOST_STEPS = 50  # default of `max_steps`, as in the servers whose API the native API follows
_DEADLINE_S = 900.0  # three times the default of `max_queue_s`


class ApiSettings(Section):
    """Limits of the HTTP API, API keys, and the allowed host names and origins."""

    max_duration_s: Seconds = Field(
        380.0, description="Longest clip in the native API, seconds; a model may allow less."
    )
    max_long_s: Seconds = Field(1800.0, description="Longest piece of a job with sections, seconds.")
    max_steps: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="Most denoising steps in the native API; unset = 50, or the model's default if higher.",
    )
    max_batch_size: int = Field(4, ge=1, le=99, description="Most variations of one request.")
    unknown_fields: UnknownFields = Field(
        "ignore",
        description="Unknown fields in the native API: ignore = list them in the response, refuse = an error.",
    )
    max_upload_bytes: int = Field(104_857_600, ge=1, description="Largest uploaded audio file, bytes.")
    max_bodies_bytes: int = Field(
        4_294_967_296, ge=1, description="Total size of request bodies in progress, bytes, per ingress replica."
    )
    max_deadline_s: Seconds = Field(3600.0, description="Largest time budget of a request, seconds.")
    key_hashes: Annotated[tuple[str, ...], BeforeValidator(split_commas), AfterValidator(check_key_hashes), Hidden] = (
        Field(
            (),
            description="Allowed API keys, as `<SHA-256>` or `<client>:<SHA-256>`, a list or comma-separated; "
            "none = no key needed.",
            repr=False,
        )
    )
    key_file: FileName | None = Field(
        None, description="File of API keys, one line of `keys new` each; read again when it changes."
    )
    public_url: Url | None = Field(
        None, description="Base URL for links in responses; unset = the host of each request."
    )
    cors_origins: Annotated[tuple[Origin, ...], BeforeValidator(split_commas)] | None = Field(
        None,
        description="Origins whose pages may use the API, a list or comma-separated; * = all, empty = none; "
        "unset = all if keys are configured, otherwise this machine and `public_url`.",
    )
    allowed_hosts: Annotated[tuple[HostName, ...], BeforeValidator(split_commas)] = Field(
        (),
        description="Further host names of this server, a list or comma-separated; * = any. Its addresses, localhost, "
        "its own name and the host of `public_url` are always allowed. With keys, an empty list allows any.",
    )

    def most_steps(self, default_steps: int) -> int:
        """Return the largest number of steps that the native API accepts for a model with this default."""
        return max(_MOST_STEPS, default_steps) if self.max_steps is None else self.max_steps

    @property
    def default_deadline_s(self) -> float:
        """The time budget of a request that sets none, seconds."""
        return min(_DEADLINE_S, self.max_deadline_s)

    @property
    def has_keys(self) -> bool:
        """Whether keys are configured, so that requests need one."""
        return bool(self.key_hashes) or self.key_file is not None


class AudioSettings(Section):
    """Processing of finished clips before encoding."""

    peaks: Peaks = Field(
        "limit",
        description="limit = a limiter holds peaks at 0.977, quieter clips keep their bits; scale = divide every clip "
        "by its own peak; clip = cut off at full scale. Requests may override it.",
    )


class IngressSettings(Section):
    """The Ray Serve deployment that answers HTTP requests: number of processes and concurrency."""

    replicas: int = Field(1, ge=1, description="Ingress processes; use two or more in production.")
    num_cpus: float = Field(0.0, ge=0, allow_inf_nan=False, description="CPU cores Ray reserves per process.")
    max_ongoing_requests: int = Field(256, ge=1, description="Generations in progress per process.")


class ProxySettings(Section):
    """The HAProxy that `stable-audio-serve serve` starts in front of the HTTP deployment.

    On a cluster, these settings have no effect: set the environment variables of docs/deploy.md for each Ray process.
    """

    kind: ProxyKind = Field("auto", description="Proxy that accepts connections; auto = HAProxy where it runs.")
    header_timeout_s: Seconds = Field(
        15.0, description="Time limit for a request's headers and the first 16 kB of its body, seconds."
    )
    idle_timeout_s: Seconds = Field(
        120.0, description="Longest pause of a client while it sends a request or reads a response, seconds."
    )


class MetricsSettings(Section):
    """Address of the statistics and metrics pages."""

    host: ListenHost = Field(
        "127.0.0.1",
        description="Address of statistics and metrics; any other than loopback exposes Ray's other ports too.",
    )
    port: int | None = Field(
        None, ge=1, le=65535, description="Port of the metrics when the server starts Ray itself; unset = a free one."
    )


# A checkpoint of Stable Audio 3 in the ids of fal's endpoints.
FalCheckpoint = Literal[
    "stable-audio-3/medium",
    "stable-audio-3/medium/base",
    "stable-audio-3/small/music",
    "stable-audio-3/small/music/base",
    "stable-audio-3/small/sfx",
    "stable-audio-3/small/sfx/base",
]


class DialectSettings(Section):
    """The foreign dialects: HTTP APIs of other servers that this server offers too."""

    model: ModelName | None = Field(
        None,
        description="Model of requests in the foreign dialects that name none, or its name there; unset = the first "
        "served Stable Audio Open model, for which these dialects were written, otherwise the default model.",
    )
    stability_model: ModelName | None = Field(
        None, description="Model behind Stability's API; unset = the first served Stable Audio 3 model."
    )
    fal_models: dict[FalCheckpoint, ModelName] = Field(
        default_factory=dict,
        description="Models behind fal's Stable Audio 3 endpoints, such as `stable-audio-3/small/sfx/base: my-model`; "
        "unset = the model of that name.",
    )
    elevenlabs_model: ModelName | None = Field(
        None,
        description="Model behind ElevenLabs' API; unset = the first model with `sfx` in its name, otherwise the first "
        "served Stable Audio 3 model.",
    )
    riff_dir: Folder | None = Field(
        None,
        description="Folder of riffs, named like gsharp_80bpm_4.wav; unset = `riffs`, or two packaged riffs.",
    )
    recipes: bool = Field(False, description="Add recipes to files and responses of these dialects too (docs/api.md).")
