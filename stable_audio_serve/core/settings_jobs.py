"""The sections of the settings about durable jobs: the queue, and where the files lie."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SecretStr, model_validator

from stable_audio_serve.core.setting_types import HiddenPassword, PlainUrl, Seconds, check_signing_secret, trim_prefix
from stable_audio_serve.core.settings_section import Section


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
    max_bytes_per_key: int = Field(
        2_147_483_648,
        ge=1,
        description="Files that one client has uploaded by fal's storage and that are kept, bytes; a client is a key, "
        "without keys an address.",
    )
    endpoint_url: PlainUrl | None = Field(None, description="Endpoint of an S3-compatible service; unset = AWS.")
    region: str = Field("us-east-1", min_length=1, description="Region; auto for R2.")
    addressing: Literal["auto", "path", "virtual"] = Field(
        "auto", description="Where the bucket stands in URLs; auto = in the path of endpoints, in the host of AWS."
    )
    links: Literal["bucket", "server"] = Field(
        "bucket",
        description="Where the links of jobs lead: to the bucket, or to the server, which reads the file from a bucket "
        "that clients do not reach.",
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
