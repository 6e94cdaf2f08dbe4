"""Every error this project raises on purpose. Knows nothing of HTTP: each dialect maps kinds to its own answers.

StableAudioError
├── InvalidRequestError        invalid            a field is missing, of the wrong type or out of range
│   └── UnknownModelError      unknown_model      the request names a model that is not served
├── InvalidUploadError         invalid_upload     an uploaded file is empty or cannot be decoded
├── UploadTooLargeError        upload_too_large   an uploaded file or body is above its size limit
├── UnauthorizedError          unauthorized       keys are configured and the request brought none of them
├── ForbiddenError             forbidden          from a web page, or to a name, that this server does not serve
├── ConflictError              conflict           contradicts what is stored, for example a key used for something else
├── OverloadedError            overloaded         no room now; retry after some seconds
│   └── QuotaError             quota              this caller has too much waiting already
├── DeadlineExceededError      deadline_exceeded  the request's own time budget ran out
│   └── StartTimeoutError      start_timeout      it had a time to start in, and had to wait longer
├── CancelledRequestError      cancelled          the caller gave the request up
├── ModelUnavailableError      unavailable        the model is not loaded or its replica died; retry
├── StoppingError              unavailable        the server is stopping and takes nothing new; retry
├── GenerationError            generation_failed  the model produced something unusable
├── StorageError               storage            a file or job could not be kept or read now; retry
│   ├── StorageFullError       storage_full       there is no room left for files or jobs
│   ├── StoreMovedError        storage            files or jobs are not where they were at the start
│   └── DamagedFileError       storage            a stored file is not what it was when it was stored
├── CheckpointError            checkpoint         files missing, corrupt, gated or with wrong keys
├── StartError                 start              what the server runs on did not start; stops the start
└── ConfigError                config             settings that cannot be used; stops the start
"""

from __future__ import annotations

from typing import ClassVar


class StableAudioError(Exception):
    """Base of the tree.

    `message` is safe to show to a client. `field` names the request field at fault, `allowed` its range in words,
    `retry_after_s` (seconds) is set when trying again later may help.
    """

    kind: ClassVar[str] = "error"

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        allowed: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.allowed = allowed
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process boundaries; the default protocol would drop the keyword-only arguments.
        return (type(self), (self.message,), dict(vars(self)))


class InvalidRequestError(StableAudioError):
    """A field is missing, of the wrong type or out of range."""

    kind = "invalid"


class UnknownModelError(InvalidRequestError):
    """The request names a model that is not served."""

    kind = "unknown_model"


class InvalidUploadError(StableAudioError):
    """An uploaded file is empty or cannot be decoded."""

    kind = "invalid_upload"


class UploadTooLargeError(StableAudioError):
    """An uploaded file or a whole body is above its size limit."""

    kind = "upload_too_large"


class UnauthorizedError(StableAudioError):
    """Keys are configured and the request brought none of them."""

    kind = "unauthorized"


class ForbiddenError(StableAudioError):
    """A web page wants to use the server, or calls it by a name, that the operator does not allow."""

    kind = "forbidden"


class ConflictError(StableAudioError):
    """The request contradicts what is stored: an id or idempotency key of something else, a job that is over.

    `code` tells clients which: `id_in_use`, `idempotency_key_reused` or `job_is_over`.
    """

    kind = "conflict"

    def __init__(self, message: str, *, code: str = "conflict", field: str | None = None) -> None:
        super().__init__(message, field=field)
        self.code = code


class OverloadedError(StableAudioError):
    """There is no room for this work now; `retry_after_s` says when there should be."""

    kind = "overloaded"


class QuotaError(OverloadedError):
    """This caller has as much waiting as one caller may have."""

    kind = "quota"


class DeadlineExceededError(StableAudioError):
    """The request's own time budget ran out before it finished."""

    kind = "deadline_exceeded"


class StartTimeoutError(DeadlineExceededError):
    """The request's own time to start in ran out while it waited."""

    kind = "start_timeout"


class CancelledRequestError(StableAudioError):
    """The caller gave the request up."""

    kind = "cancelled"


class ModelUnavailableError(StableAudioError):
    """The model cannot answer now: still loading, or its replica died."""

    kind = "unavailable"


class StoppingError(StableAudioError):
    """The server is stopping and takes nothing new; after its restart the same request will do."""

    kind = "unavailable"


class GenerationError(StableAudioError):
    """The model produced something unusable, for example non-finite values."""

    kind = "generation_failed"


class StorageError(StableAudioError):
    """A file or a job could not be kept or read now; trying again later may help."""

    kind = "storage"


class StorageFullError(StorageError):
    """There is no room left for files or jobs."""

    kind = "storage_full"


class StoreMovedError(StorageError):
    """The files or the job database are no longer where they were, or others lie there."""


class DamagedFileError(StorageError):
    """A stored file is not what it was when it was stored: bytes are missing, or others."""


class CheckpointError(StableAudioError):
    """Model files are missing, gated, corrupt or do not fit the network; the message says what to do."""

    kind = "checkpoint"


class StartError(StableAudioError):
    """What the server runs on did not start; the message says what to do."""

    kind = "start"


class ConfigError(StableAudioError):
    """Settings that cannot be used; stops the start with a message naming the key."""

    kind = "config"
