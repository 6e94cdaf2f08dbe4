"""Create boto3 clients for S3-compatible services, interpret their errors, and check the bucket at the server's start.

boto3 is imported at first use, so a server that stores files in a local folder never loads it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import structlog

from stable_audio_serve.artifacts.keys import new_key
from stable_audio_serve.core.errors import ConfigError, StorageError, StorageFullError
from stable_audio_serve.core.settings import StorageSettings

log = structlog.get_logger("stable_audio_serve.artifacts")

_CONNECT_TIMEOUT_S = 3.0
_READ_TIMEOUT_S = 20.0
_MAX_ATTEMPTS = 5
_MAX_CONNECTIONS = 32
_RETRY_S = 5.0
_INSUFFICIENT_STORAGE = 507  # HTTP status

_CHECK_TIMEOUT_S = 3.0  # time limit for connecting, and also for reading a response
_CHECK_BUDGET_S = 4.0  # no attempt starts later than this after the check began, so the check takes at most 10 s
_CHECK_PAUSE_S = 0.2

_BUCKET = "storage.bucket (STABLE_AUDIO_STORAGE_BUCKET, AWS_S3_BUCKET, R2_BUCKET or R2_BUCKET_NAME)"
_ENDPOINT = (
    "storage.endpoint_url (STABLE_AUDIO_STORAGE_ENDPOINT_URL, AWS_ENDPOINT_URL_S3, R2_ENDPOINT_URL or AWS_ENDPOINT_URL)"
)
_REGION = "storage.region (STABLE_AUDIO_STORAGE_REGION, AWS_REGION or AWS_DEFAULT_REGION)"
_KEYS = (
    "storage.access_key_id (AWS_ACCESS_KEY_ID with AWS_SECRET_ACCESS_KEY, "
    "or R2_ACCESS_KEY_ID with R2_SECRET_ACCESS_KEY)"
)

_NO_KEYS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError"}
_BAD_KEYS = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "InvalidClientTokenId",
    "Unauthorized",
    "InvalidArgument",
    "401",
}
_BAD_REGION = {
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "InvalidRegionError",
    "PermanentRedirect",
    "TemporaryRedirect",
    "301",
}
_REDIRECTS = (301, 302, 307, 308)
_BAD_BUCKET = {"InvalidBucketName", "ParamValidationError", "400"}
_CHECK = b"check"


def make_client(
    settings: StorageSettings,
    *,
    connect_timeout_s: float = _CONNECT_TIMEOUT_S,
    read_timeout_s: float = _READ_TIMEOUT_S,
    max_attempts: int = _MAX_ATTEMPTS,
) -> Any:
    """Return a thread-safe client for the configured service. Does no I/O."""
    import boto3
    from botocore.config import Config

    config = Config(
        signature_version="s3v4",  # boto3 would sign links for us-east-1 with version 2, which not all services accept
        connect_timeout=connect_timeout_s,
        read_timeout=read_timeout_s,
        retries={"mode": "standard", "total_max_attempts": max_attempts},
        max_pool_connections=_MAX_CONNECTIONS,
        # The signature covers the body, so the service rejects a corrupted upload. boto3's newer checksums would also
        # detect corruption, but not every service supports these checksums.
        s3={"addressing_style": _addressing(settings), "payload_signing_enabled": True},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=settings.endpoint_url,
        region_name=settings.region,
        aws_access_key_id=_secret(settings.access_key_id),
        aws_secret_access_key=_secret(settings.secret_access_key),
        aws_session_token=_secret(settings.session_token),
        config=config,
    )
    client.meta.events.register("before-call.s3", partial(_limit_redirects, own_bucket=settings.bucket))
    for operation in ("PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"):
        client.meta.events.register(f"after-call.s3.{operation}", _require_stored)
    return client


def _require_stored(parsed: Mapping[str, Any], model: Any, **_: Any) -> None:
    """Raise ClientError if a success response did not come from an object storage, but for example from a proxy.

    boto3 accepts every response with status 200. The file would be lost without an error.
    """
    from botocore.exceptions import ClientError

    if "Error" not in parsed and not {"ETag", "UploadId"} & parsed.keys():
        raise ClientError({**parsed, "Error": {"Code": "MissingETag"}}, model.name)


def _limit_redirects(model: Any, context: dict[str, Any], *, own_bucket: str | None, **_: Any) -> None:
    """Let a request fail if botocore must not find the bucket's region and send the request there.

    The region of the configured bucket must be configured too, because links are signed for the configured region.
    botocore finds a region with HeadBucket. If it followed a redirect of HeadBucket, for example of a proxy that
    redirects every request, it would search until Python's stack is full.
    """
    redirect = context["s3_redirect"]
    redirect["redirected"] = redirect["bucket"] == own_bucket or model.name == "HeadBucket"


def s3_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that the client raises when the service or the connection fails."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    return (BotoCoreError, ClientError, ResponseParserError, OSError)


def code_of(error: BaseException) -> str:
    """Return the service's error code, for example NoSuchKey, or the exception's class name if there is none."""
    return str(_answer(error).get("Error", {}).get("Code") or type(error).__name__)


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of the service's response, or None without a response."""
    status = _answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status if isinstance(status, int) else None


def is_missing(error: BaseException) -> bool:
    """Whether the error means that the object does not exist."""
    return code_of(error) in ("NoSuchKey", "404", "NotFound")


def is_timeout(error: BaseException) -> bool:
    """Whether the service did not answer in time."""
    from botocore.exceptions import ConnectTimeoutError, ReadTimeoutError

    return isinstance(error, ConnectTimeoutError | ReadTimeoutError)


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
    """Return the service's response, or an empty mapping if there was none."""
    answer = getattr(error, "response", None)
    return answer if isinstance(answer, Mapping) else {}


def _addressing(settings: StorageSettings) -> str:
    """Return where URLs contain the name of the bucket: "virtual" (in the host name, for AWS) or "path"."""
    if settings.addressing == "auto":
        return "path" if settings.endpoint_url else "virtual"
    return settings.addressing


def _secret(value: Any) -> str | None:
    return None if value is None else value.get_secret_value()


def check_bucket(settings: StorageSettings, *, prefix: str, budget_s: float = _CHECK_BUDGET_S) -> None:
    """Check the bucket: write, read, list and delete a small object.

    Failed operations are repeated for up to `budget_s` seconds in total. Raises ConfigError with one sentence that
    names the settings to change.
    """
    try:
        client = make_client(
            settings, connect_timeout_s=_CHECK_TIMEOUT_S, read_timeout_s=_CHECK_TIMEOUT_S, max_attempts=1
        )
    except s3_errors() as error:
        raise _explain(error, settings, doing="using") from error
    except ValueError as error:  # the endpoint is not a URL
        raise _sentence(_ENDPOINT, f"{settings.endpoint_url} cannot be used: {error}") from error
    attempt = partial(_attempt, deadline=time.monotonic() + budget_s)
    at = {"Bucket": settings.bucket, "Key": prefix + new_key("uploads")}

    def read() -> None:
        if client.get_object(**at)["Body"].read() != _CHECK:
            raise ConfigError(
                f"{_BUCKET}: an object that was read back differs from what was written", field="storage.bucket"
            )

    for doing, call in (
        ("writing", lambda: client.put_object(**at, Body=_CHECK)),
        ("reading", read),
        ("listing", lambda: client.list_objects_v2(Bucket=settings.bucket, Prefix=prefix, MaxKeys=1)),
        ("deleting", lambda: client.delete_object(**at)),
    ):
        try:
            attempt(call)
        except s3_errors() as error:
            raise _explain(error, settings, doing=doing) from error


def _attempt(call: Callable[[], Any], *, deadline: float) -> None:
    """Run `call`. Run it again until the deadline while the service is unreachable or returns server errors."""
    while True:
        try:
            call()
        except s3_errors() as error:
            status = status_of(error)
            is_temporary = code_of(error) not in _NO_KEYS | _BAD_BUCKET and (status is None or status >= 500)
            if not is_temporary or time.monotonic() + _CHECK_PAUSE_S > deadline:
                raise
            time.sleep(_CHECK_PAUSE_S)
        else:
            return


def _explain(error: Exception, settings: StorageSettings, *, doing: str) -> ConfigError:
    code, status = code_of(error), status_of(error)
    where = settings.endpoint_url or f"AWS S3 in {settings.region}"
    if code in _NO_KEYS:
        return _sentence(_KEYS, f"no access key for {where} was found")
    if code in _BAD_KEYS:
        return _sentence(_KEYS, f"{where} does not accept the access key ({code})")
    if code == "RequestTimeTooSkewed":
        return ConfigError(f"{where} refuses requests with the time of this machine: correct its clock ({code})")
    if code == "NoSuchBucket" or (status == 404 and doing == "writing"):
        return _sentence(_BUCKET, f"{where} has no bucket {settings.bucket!r}")
    if code in _BAD_BUCKET:
        return _sentence(_BUCKET, f"{where} does not accept the bucket name {settings.bucket!r}")
    if settings.endpoint_url and status in _REDIRECTS:
        return _sentence(_ENDPOINT, f"{where} redirects requests; set the address to which it redirects")
    if code in _BAD_REGION:
        return _sentence(_REGION, f"{settings.region} is not the region of bucket {settings.bucket!r} ({code})")
    if status == 403:
        return _sentence(_KEYS, f"{where} does not allow {doing} in bucket {settings.bucket!r} ({code})")
    if status is None:
        return _sentence(_ENDPOINT, f"{where} cannot be reached ({code})")
    return _sentence(_ENDPOINT, f"{doing} in bucket {settings.bucket!r} of {where} fails ({code}, status {status})")


def _sentence(named: str, problem: str) -> ConfigError:
    return ConfigError(f"{named}: {problem}", field=named.partition(" ")[0])
