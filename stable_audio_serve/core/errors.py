"""Every error that this project raises on purpose. Each HTTP dialect maps the errors' kinds to its own responses.

The columns are class, `kind` and meaning. "retry" means that the same request may succeed later.

StableAudioError
├── InvalidRequestError        invalid            a field is missing, of the wrong type or out of range
│   └── UnknownModelError      unknown_model      the request names a model that is not served
├── InvalidUploadError         invalid_upload     an uploaded file is empty or cannot be decoded
├── UploadTooLargeError        upload_too_large   an uploaded file or body is above its size limit
├── UnauthorizedError          unauthorized       keys are configured and the request has no valid one
├── ForbiddenError             forbidden          the key, the web page or the host name is not allowed to do this
├── NotFoundError              not_found          this caller has no such job or file
├── ConflictError              conflict           the request contradicts stored state, for example a reused key
├── OverloadedError            overloaded         no capacity now; retry in a few seconds
│   └── QuotaError             quota              this caller has reached its limit of waiting requests or jobs
├── DeadlineExceededError      deadline_exceeded  the request's time budget ran out
│   └── StartTimeoutError      start_timeout      the request did not start in time
├── CancelledRequestError      cancelled          the caller cancelled the request
├── ModelUnavailableError      unavailable        the model is not loaded or its replica died; retry
│   └── ModelRestartingError   unavailable        all replicas died and new ones have failed to start so far; retry
├── StoppingError              unavailable        the server is stopping and accepts nothing new; retry
├── KeysUnavailableError       unavailable        the file of API keys was never readable since the start; retry
├── GenerationError            generation_failed  the model produced unusable audio
├── UnreachableError           unreachable        a client got no response from its server; retry
│   └── NotConnectedError      unreachable        the connection failed: no server listens, or the host is unknown
├── StorageError               storage            a file or job cannot be stored or read now; retry
│   ├── StorageFullError       storage_full       there is no room left for files or jobs
│   │   └── UploadQuotaError   storage_full       this client has reached its limit of uploaded bytes
│   ├── StoreMovedError        storage            files or jobs were moved or replaced since the start
│   └── DamagedFileError       storage            a stored file has changed or lost bytes
├── CheckpointError            checkpoint         model files are missing, corrupt, gated or have wrong tensors
├── QualityError               quality            a model's audio differs from its quality report; it is not served
├── QualityReportError         quality_report     a stored quality report is missing or cannot be used
├── StartError                 start              a part of the server, for example Ray or HAProxy, did not start
└── ConfigError                config             invalid settings; the server does not start
"""

from __future__ import annotations

from typing import Any, ClassVar

_RETRY_S = 5.0


class StableAudioError(Exception):
    """Base of all errors.

    `message` is safe to show to a client. `field` names the invalid request field, and `allowed` describes the field's
    valid values. `retry_after_s` is set if a retry after this many seconds may succeed.
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
        # Errors are pickled to cross process boundaries. By default, pickling would drop the keyword-only arguments.
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
    """An uploaded file or the request body exceeds its size limit."""

    kind = "upload_too_large"


class UnauthorizedError(StableAudioError):
    """API keys are configured, and the request has no valid key."""

    kind = "unauthorized"


class ForbiddenError(StableAudioError):
    """The API key, the web page or the host name of a request does not permit what the request asks for."""

    kind = "forbidden"


class NotFoundError(StableAudioError):
    """No such job or file exists for this caller."""

    kind = "not_found"


class ConflictError(StableAudioError):
    """The request contradicts stored state. `code` names the reason, for example `id_in_use` or `job_is_over`."""

    kind = "conflict"

    def __init__(self, message: str, *, code: str = "conflict", field: str | None = None) -> None:
        super().__init__(message, field=field)
        self.code = code


class OverloadedError(StableAudioError):
    """There is no capacity for this work now. `retry_after_s` is the expected wait in seconds.

    An engine that is full also sets `full_for_s`, the seconds until it accepts such a request, and `work_s`, the
    seconds of device time that the refused request would take. `retry_after_s` is longer than `full_for_s`, because
    clients that were refused earlier should get the free capacity first.
    """

    kind = "overloaded"

    def __init__(self, message: str, *, full_for_s: float = 0.0, work_s: float = 0.0, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.full_for_s = full_for_s
        self.work_s = work_s


class QuotaError(OverloadedError):
    """This caller has reached its limit of waiting requests or jobs."""

    kind = "quota"


class DeadlineExceededError(StableAudioError):
    """The request's time budget ran out before it finished."""

    kind = "deadline_exceeded"


class StartTimeoutError(DeadlineExceededError):
    """The request did not start within `GenerationRequest.start_within_s`."""

    kind = "start_timeout"


class CancelledRequestError(StableAudioError):
    """The caller cancelled the request."""

    kind = "cancelled"


class ModelUnavailableError(StableAudioError):
    """The model cannot serve requests now: it is still loading, or its replica died."""

    kind = "unavailable"


class ModelRestartingError(ModelUnavailableError):
    """All replicas of the model died, and new ones have failed to start. The server goes on starting them."""


class StoppingError(StableAudioError):
    """The server is stopping and accepts no new work. Clients can retry after the restart."""

    kind = "unavailable"


class KeysUnavailableError(StableAudioError):
    """The file of API keys was never readable since the server started, so no key can be checked."""

    kind = "unavailable"


class GenerationError(StableAudioError):
    """The model produced unusable audio, for example non-finite values."""

    kind = "generation_failed"


class UnreachableError(StableAudioError):
    """A client could not reach its server, or lost the connection before the response arrived."""

    kind = "unreachable"


class NotConnectedError(UnreachableError):
    """The connection failed, so the server did not receive the request."""


class StorageError(StableAudioError):
    """A file or a job cannot be stored or read now; a retry may succeed."""

    kind = "storage"


class StorageFullError(StorageError):
    """No space is left for files or jobs."""

    kind = "storage_full"


class UploadQuotaError(StorageFullError):
    """This client has reached its limit of uploaded bytes."""


class StoreMovedError(StorageError):
    """The files or the job database were moved or replaced since the start."""


class DamagedFileError(StorageError):
    """A stored file has changed, or bytes of it are missing."""


class CheckpointError(StableAudioError):
    """Model files are missing, gated, corrupt or do not match the network. The message says what to do."""

    kind = "checkpoint"


class QualityError(StableAudioError):
    """A loaded model's audio differs too much from its quality report, so the replica must not serve requests."""

    kind = "quality"


class QualityReportError(StableAudioError):
    """A stored quality report is missing or cannot be used. The message names the report."""

    kind = "quality_report"


class StartError(StableAudioError):
    """A part of the server, for example Ray or HAProxy, did not start; the message says what to do."""

    kind = "start"


class ConfigError(StableAudioError):
    """The settings are invalid. The message names the key or the environment variable."""

    kind = "config"


def engine_stopped() -> ModelUnavailableError:
    """Return the error of requests whose engine stops. Another replica, or the one that replaces it, can run them."""
    return ModelUnavailableError("the model is shutting down or its engine stopped; retry", retry_after_s=_RETRY_S)
