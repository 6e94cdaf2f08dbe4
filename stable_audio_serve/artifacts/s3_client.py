"""boto3's client for S3-compatible services, and the meaning of its errors.

boto3 is imported at first use, so a server with a local folder never loads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import structlog

from stable_audio_serve.core.errors import StorageError, StorageFullError
from stable_audio_serve.core.settings import StorageSettings

log = structlog.get_logger("stable_audio_serve.artifacts")

_CONNECT_TIMEOUT_S = 3.0
_READ_TIMEOUT_S = 20.0
_MAX_ATTEMPTS = 5
_MAX_CONNECTIONS = 32
_RETRY_S = 5.0
_INSUFFICIENT_STORAGE = 507  # HTTP status


def make_client(
    settings: StorageSettings,
    *,
    connect_timeout_s: float = _CONNECT_TIMEOUT_S,
    read_timeout_s: float = _READ_TIMEOUT_S,
    max_attempts: int = _MAX_ATTEMPTS,
) -> Any:
    """Returns a thread-safe client for the configured service. Does no I/O."""
    import boto3
    from botocore.config import Config

    config = Config(
        signature_version="s3v4",  # the SDK's default for links in us-east-1 is version 2
        connect_timeout=connect_timeout_s,
        read_timeout=read_timeout_s,
        retries={"mode": "standard", "total_max_attempts": max_attempts},
        max_pool_connections=_MAX_CONNECTIONS,
        # Signed bodies let the service reject corrupted uploads. Not every service supports the newer checksums.
        s3={"addressing_style": _addressing(settings), "payload_signing_enabled": True},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return boto3.session.Session().client(
        "s3",
        endpoint_url=settings.endpoint_url,
        region_name=settings.region,
        aws_access_key_id=_secret(settings.access_key_id),
        aws_secret_access_key=_secret(settings.secret_access_key),
        aws_session_token=_secret(settings.session_token),
        config=config,
    )


def s3_errors() -> tuple[type[Exception], ...]:
    """Returns the exceptions of the client when the service or the connection fails."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    return (BotoCoreError, ClientError, ResponseParserError, OSError)


def code_of(error: BaseException) -> str:
    """Returns the service's error code, for example NoSuchKey, or the exception's class name without a response."""
    return str(_answer(error).get("Error", {}).get("Code") or type(error).__name__)


def status_of(error: BaseException) -> int | None:
    """Returns the HTTP status of the service's response, None without a response."""
    status = _answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status if isinstance(status, int) else None


def is_missing(error: BaseException) -> bool:
    """Whether the error means that the object does not exist."""
    return code_of(error) in ("NoSuchKey", "404", "NotFound")


@contextmanager
def storage_errors(operation: str) -> Iterator[None]:
    """Turn the client's exceptions into StorageError and StorageFullError."""
    try:
        yield
    except s3_errors() as error:
        code = code_of(error)
        log.warning("the object storage failed", operation=operation, code=code, error=str(error))
        if status_of(error) == _INSUFFICIENT_STORAGE or "QuotaExceeded" in code or "StorageFull" in code:
            raise StorageFullError("the object storage is full") from error
        raise StorageError(f"the object storage cannot be used now ({code})", retry_after_s=_RETRY_S) from error


def _answer(error: BaseException) -> Mapping[str, Any]:
    """Returns the service's response, empty if there was none."""
    answer = getattr(error, "response", None)
    return answer if isinstance(answer, Mapping) else {}


def _addressing(settings: StorageSettings) -> str:
    """Returns the URL style of the bucket: AWS prefers one host name per bucket, which other services often lack."""
    if settings.addressing == "auto":
        return "path" if settings.endpoint_url else "virtual"
    return settings.addressing


def _secret(value: Any) -> str | None:
    return None if value is None else value.get_secret_value()
