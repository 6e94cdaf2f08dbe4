"""Every error this project raises on purpose. Knows nothing of HTTP: each dialect maps kinds to its own answers.

StableAudioError
├── InvalidRequestError        invalid            a field is missing, of the wrong type or out of range
│   └── UnknownModelError      unknown_model      the request names a model that is not served
├── InvalidUploadError         invalid_upload     an uploaded file is empty or cannot be decoded
├── UploadTooLargeError        upload_too_large   an uploaded file or body is above its size limit
├── UnauthorizedError          unauthorized       keys are configured and the request brought none of them
├── ForbiddenError             forbidden          from a web page, or for a host name, that is not allowed
├── NotFoundError              not_found          there is no such job or file for this caller
├── ConflictError              conflict           contradicts what is stored, for example a reused key
├── OverloadedError            overloaded         no room now; retry in a few seconds
│   └── QuotaError             quota              this caller already has too much waiting
├── DeadlineExceededError      deadline_exceeded  the request's own time budget ran out
│   └── StartTimeoutError      start_timeout      it did not start within the time it allows
├── CancelledRequestError      cancelled          the caller cancelled the request
├── ModelUnavailableError      unavailable        the model is not loaded or its replica died; retry
├── StoppingError              unavailable        the server is stopping and accepts nothing new; retry
├── KeysUnavailableError       unavailable        the file of keys has never been read, so nobody is known; retry
├── GenerationError            generation_failed  the model produced something unusable
├── UnreachableError           unreachable        a client got no answer from its server; retry
│   └── NotConnectedError      unreachable        no connection was made: nobody listens there, or no such name
├── StorageError               storage            a file or job cannot be stored or read now; retry
│   ├── StorageFullError       storage_full       there is no room left for files or jobs
│   │   └── UploadQuotaError   storage_full       this client keeps as many bytes as one client may
│   ├── StoreMovedError        storage            files or jobs were moved or replaced since the start
│   └── DamagedFileError       storage            a stored file has changed or lost bytes
├── CheckpointError            checkpoint         files missing, corrupt, gated or with wrong keys
├── QualityError               quality            a loaded model does not sound as it should; ends its start
├── QualityReportError         quality_report     a stored report of a model's sound is missing or cannot be used
├── StartError                 start              Ray, the proxy or the like did not start; ends the start
└── ConfigError                config             unusable settings; ends the start
"""

from __future__ import annotations

from typing import ClassVar


class StableAudioError(Exception):
    """Base of the tree.

    `message` is safe to show to a client. `field` names the request field at fault, `allowed` its range in words,
    `retry_after_s` (seconds) is set where trying again later may help.
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
    """The operator does not allow this web page to use the server, or this host name for it."""

    kind = "forbidden"


class NotFoundError(StableAudioError):
    """There is no such job or file, or not for this caller."""

    kind = "not_found"


class ConflictError(StableAudioError):
    """The request contradicts what is stored: the id or idempotency key has another use, or the job has ended.

    `code` tells clients which it is: `id_in_use`, `idempotency_key_reused` or `job_is_over`.
    """

    kind = "conflict"

    def __init__(self, message: str, *, code: str = "conflict", field: str | None = None) -> None:
        super().__init__(message, field=field)
        self.code = code


class OverloadedError(StableAudioError):
    """There is no room for this work now; `retry_after_s` says when there should be."""

    kind = "overloaded"


class QuotaError(OverloadedError):
    """This caller already has as much work waiting as one caller may have."""

    kind = "quota"


class DeadlineExceededError(StableAudioError):
    """The request's own time budget ran out before it finished."""

    kind = "deadline_exceeded"


class StartTimeoutError(DeadlineExceededError):
    """The request did not start within the time it allows."""

    kind = "start_timeout"


class CancelledRequestError(StableAudioError):
    """The caller cancelled the request."""

    kind = "cancelled"


class ModelUnavailableError(StableAudioError):
    """The model cannot answer now: still loading, or its replica died."""

    kind = "unavailable"


class StoppingError(StableAudioError):
    """The server is stopping and accepts nothing new; the same request can be sent again after the restart."""

    kind = "unavailable"


class KeysUnavailableError(StableAudioError):
    """The file of keys has never been read since the start, so nobody is known."""

    kind = "unavailable"


class GenerationError(StableAudioError):
    """The model produced something unusable, for example non-finite values."""

    kind = "generation_failed"


class UnreachableError(StableAudioError):
    """A client could not reach its server, or lost the connection before the answer came."""

    kind = "unreachable"


class NotConnectedError(UnreachableError):
    """No connection was made: the server was not asked for anything."""


class StorageError(StableAudioError):
    """A file or a job cannot be stored or read now; trying again later may help."""

    kind = "storage"


class StorageFullError(StorageError):
    """There is no room left for files or jobs."""

    kind = "storage_full"


class UploadQuotaError(StorageFullError):
    """This client keeps as many bytes as one client may."""


class StoreMovedError(StorageError):
    """The files or the job database have been moved or replaced since the start."""


class DamagedFileError(StorageError):
    """A stored file has changed since it was stored, or bytes of it are missing."""


class CheckpointError(StableAudioError):
    """Model files are missing, gated, corrupt or do not fit the network; the message says what to do."""

    kind = "checkpoint"


class QualityError(StableAudioError):
    """What a loaded model makes of its golden requests is not what it should be: it must not serve."""

    kind = "quality"


class QualityReportError(StableAudioError):
    """A stored report of what a model sounds like is missing or cannot be used; the message names it."""

    kind = "quality_report"


class StartError(StableAudioError):
    """Something that the server needs, such as Ray or the proxy, did not start; the message says what to do."""

    kind = "start"


class ConfigError(StableAudioError):
    """The settings cannot be used; the message names the key."""

    kind = "config"
