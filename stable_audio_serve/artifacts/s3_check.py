"""Checks a bucket at the start of the server. Each error is one sentence that names the settings to change."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from stable_audio_serve.artifacts.keys import upload_key
from stable_audio_serve.artifacts.s3_client import code_of, make_client, s3_errors, status_of
from stable_audio_serve.core.clock import Clock, SystemClock
from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.settings import StorageSettings

_TIMEOUT_S = 3.0  # of one attempt, for the connection and for the response
_BUDGET_S = 4.0  # no attempt starts later, so that the check ends within ten seconds
_PAUSE_S = 0.2

_BUCKET = "storage.bucket (STABLE_AUDIO_STORAGE_BUCKET, AWS_S3_BUCKET, R2_BUCKET or R2_BUCKET_NAME)"
_ENDPOINT = "storage.endpoint_url (STABLE_AUDIO_STORAGE_ENDPOINT_URL, AWS_ENDPOINT_URL_S3 or R2_ENDPOINT_URL)"
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
    "301",
}
_BAD_BUCKET = {"InvalidBucketName", "ParamValidationError", "400"}
_CHECK = b"check"


def check_bucket(
    settings: StorageSettings, *, prefix: str, budget_s: float = _BUDGET_S, clock: Clock = SystemClock()
) -> None:
    """Write, read, list and delete a small object. No attempt starts after `budget_s`. Raises ConfigError."""
    try:
        client = make_client(settings, connect_timeout_s=_TIMEOUT_S, read_timeout_s=_TIMEOUT_S, max_attempts=1)
    except s3_errors() as error:
        raise _explain(error, settings, doing="using") from error
    except ValueError as error:  # not a URL
        raise _sentence(_ENDPOINT, f"{settings.endpoint_url} cannot be used: {error}") from error
    attempt = partial(_attempt, deadline=clock.monotonic() + budget_s, clock=clock)
    at = {"Bucket": settings.bucket, "Key": prefix + upload_key()}

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


def _attempt(call: Callable[[], Any], *, deadline: float, clock: Clock) -> None:
    """Repeat the call until the deadline while the service is unreachable or returns server errors."""
    while True:
        try:
            call()
        except s3_errors() as error:
            status = status_of(error)
            may_pass = code_of(error) not in _NO_KEYS | _BAD_BUCKET and (status is None or status >= 500)
            if not may_pass or clock.monotonic() + _PAUSE_S > deadline:
                raise
            time.sleep(_PAUSE_S)
        else:
            return


def _explain(error: Exception, settings: StorageSettings, *, doing: str) -> ConfigError:
    code, status = code_of(error), status_of(error)
    where = settings.endpoint_url or f"AWS S3 in {settings.region}"
    if code in _NO_KEYS:
        return _sentence(_KEYS, f"no access key for {where} was found")
    if code in _BAD_KEYS:
        return _sentence(_KEYS, f"{where} does not accept the access key ({code})")
    if code == "NoSuchBucket" or (status == 404 and doing == "writing"):
        return _sentence(_BUCKET, f"{where} has no bucket {settings.bucket!r}")
    if code in _BAD_BUCKET:
        return _sentence(_BUCKET, f"{where} does not accept the bucket name {settings.bucket!r}")
    if code in _BAD_REGION:
        return _sentence(_REGION, f"{settings.region} is not the region of bucket {settings.bucket!r} ({code})")
    if status == 403:
        return _sentence(_KEYS, f"{where} does not allow {doing} in bucket {settings.bucket!r} ({code})")
    if status is None:
        return _sentence(_ENDPOINT, f"{where} cannot be reached ({code})")
    return _sentence(_ENDPOINT, f"{doing} in bucket {settings.bucket!r} of {where} fails ({code}, status {status})")


def _sentence(named: str, problem: str) -> ConfigError:
    return ConfigError(f"{named}: {problem}", field=named.partition(" ")[0])
