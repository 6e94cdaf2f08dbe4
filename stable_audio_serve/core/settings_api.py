"""The sections of the settings about requests: what they may ask, how they come in, and how clips go out."""

from __future__ import annotations

from typing import Annotated

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
    UnknownFields,
    Url,
    check_key_hashes,
    split_commas,
)
from stable_audio_serve.core.settings_section import Section
from stable_audio_serve.core.sound import Peaks

_MOST_STEPS = 50  # as in the servers whose API ours is


class ApiSettings(Section):
    """Limits of the HTTP API, the keys that may use it, and the names and origins it is reached by."""

    max_duration_s: Seconds = Field(380.0, description="Longest clip of our own API, seconds; a model may allow less.")
    max_steps: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="Most denoising steps of our own API; unset = 50, for a model whose own default is more as many.",
    )
    max_batch_size: int = Field(4, ge=1, le=99, description="Most variations of one request.")
    unknown_fields: UnknownFields = Field(
        "ignore",
        description="Fields that our own API does not have: ignored and named in the answer, or refused.",
    )
    max_upload_bytes: int = Field(104_857_600, ge=1, description="Largest uploaded audio file, bytes.")
    max_bodies_bytes: int = Field(
        4_294_967_296, ge=1, description="Bodies of requests in progress, uploads included, bytes, per ingress replica."
    )
    default_deadline_s: Seconds = Field(900.0, description="Time budget of a request that names none, seconds.")
    max_deadline_s: Seconds = Field(3600.0, description="Largest time budget a request may ask for, seconds.")
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

    def most_steps(self, default_steps: int) -> int:
        """Returns the most steps of our own API for a model with this default."""
        return max(_MOST_STEPS, default_steps) if self.max_steps is None else self.max_steps

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


class IngressSettings(Section):
    """The deployment that answers HTTP requests: its processes and what one of them handles at a time."""

    replicas: int = Field(1, ge=1, description="Ingress processes; two or more off a laptop.")
    num_cpus: float = Field(0.0, ge=0, allow_inf_nan=False, description="CPU cores Ray reserves per process.")
    max_ongoing_requests: int = Field(256, ge=1, description="Generations one process has in progress at a time.")


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

    host: ListenHost = Field(
        "127.0.0.1",
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
    recipes: bool = Field(
        False, description="Whether files and answers of these dialects carry recipes, too (docs/api.md)."
    )
