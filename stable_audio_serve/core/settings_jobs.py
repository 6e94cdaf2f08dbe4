"""Settings of durable jobs: the job queue, and the storage of the jobs' files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SecretStr, model_validator

from stable_audio_serve.core.setting_types import (
    HiddenPassword,
    PlainUrl,
    Seconds,
    Section,
    check_signing_secret,
    trim_prefix,
)


class JobSettings(Section):
    """The job queue: database, limits, leases, retention and webhooks."""

    database_url: Annotated[str | None, HiddenPassword] = Field(
        None, min_length=1, description="Job database; unset = SQLite, jobs.db in `output_dir`."
    )
    max_queued: int = Field(
        10_000,
        ge=1,
        description="Most queued jobs. Above it, only keys below their fair share may add jobs, up to twice the limit.",
    )
    max_queued_per_key: int = Field(1000, ge=1, description="Most queued jobs of one API key.")
    runners: int = Field(1, ge=1, description="Job runner processes.")
    max_running: int = Field(64, ge=1, description="Most running jobs of each priority, per runner.")
    lease_s: float = Field(15.0, ge=1, le=3600, description="Time after which a silent runner loses its jobs, seconds.")
    max_attempts: int = Field(3, ge=1, description="Attempts per job; invalid requests are not retried.")
    retention_s: Seconds = Field(604_800.0, description="How long ended jobs and their files are kept, seconds.")
    orphan_after_s: Seconds = Field(86_400.0, description="Age at which unreferenced files are removed, seconds.")
    webhook_secret: Annotated[SecretStr, AfterValidator(check_signing_secret)] | None = Field(
        None, description="Signs webhooks (Standard Webhooks): `whsec_` and 24 to 64 bytes in base64; unset = unsigned."
    )
    webhook_allow_hosts: tuple[str, ...] = Field(
        (), description="Hosts with private addresses that webhooks may call, for example localhost."
    )


class StorageSettings(Section):
    """Storage of job files: an S3 bucket when `bucket` is set, otherwise `output_dir`."""

    bucket: str | None = Field(None, min_length=1, description="Bucket name; unset = local files.")
    prefix: Annotated[str, AfterValidator(trim_prefix)] = Field(
        "stable-audio/jobs",
        max_length=500,
        description="Prefix of object keys; leading and trailing slashes are ignored.",
    )
    max_bytes_per_key: int = Field(
        2_147_483_648,
        ge=1,
        description="Most bytes of kept uploads (fal storage) per client; a client is an API key, or without keys an "
        "address.",
    )
    endpoint_url: PlainUrl | None = Field(None, description="Endpoint of an S3-compatible service; unset = AWS.")
    region: str = Field("us-east-1", min_length=1, description="Region; auto for R2.")
    addressing: Literal["auto", "path", "virtual"] = Field(
        "auto", description="Place of the bucket in URLs: path or host name; auto = virtual for AWS, otherwise path."
    )
    links: Literal["bucket", "server"] = Field(
        "bucket",
        description="Target of download links: the bucket, or this server, for a bucket that clients cannot reach.",
    )
    public_base_url: PlainUrl | None = Field(
        None, description="Public base of download links; unset = presigned links."
    )
    presigned_url_expires_s: int = Field(3600, ge=1, le=604_800, description="Lifetime of a presigned link, seconds.")
    access_key_id: SecretStr | None = Field(
        None, min_length=1, description="Access key; unset = the AWS SDK's own search."
    )
    secret_access_key: SecretStr | None = Field(None, min_length=1, description="The access key's secret.")
    session_token: SecretStr | None = Field(None, min_length=1, description="Session token of a temporary access key.")

    @model_validator(mode="after")
    def _check_keys(self) -> StorageSettings:
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise ValueError("set both access_key_id and secret_access_key, or neither")
        return self
