"""How commands that talk to a server end: one sentence on standard error, and a code that scripts can use.

0 done, 1 the work failed, 2 refused as it was asked, 3 no server, 4 the key, 5 no room, 6 out of time, 130 Ctrl-C.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from stable_audio_serve.core import errors

INTERRUPTED = 130
_CODES: tuple[tuple[type[errors.StableAudioError], int], ...] = (
    (errors.InvalidRequestError, 2),
    (errors.InvalidUploadError, 2),
    (errors.UploadTooLargeError, 2),
    (errors.NotFoundError, 2),
    (errors.ConflictError, 2),
    (errors.ConfigError, 2),
    (errors.UnreachableError, 3),
    (errors.UnauthorizedError, 4),
    (errors.ForbiddenError, 4),
    (errors.OverloadedError, 5),
    (errors.ModelUnavailableError, 5),
    (errors.StoppingError, 5),
    (errors.DeadlineExceededError, 6),
    (errors.CancelledRequestError, INTERRUPTED),
)


@contextmanager
def said_plainly() -> Iterator[None]:
    """End the command when anything in it fails in a way that is expected."""
    try:
        yield
    except errors.StableAudioError as error:
        code = next((code for kind, code in _CODES if isinstance(error, kind)), 1)
        raise fail(error.message, code=code) from error
    except (OSError, ValueError) as error:
        raise fail(str(error), code=2) from error
    except KeyboardInterrupt as error:
        raise fail("interrupted", code=INTERRUPTED) from error


def fail(message: str, *, code: int) -> typer.Exit:
    """Say what went wrong, printable whatever the server wrote. Returns the end of the command."""
    from stable_audio_serve.cli.job_report import plain

    typer.echo(f"error: {plain(message, limit=None)}", err=True)
    return typer.Exit(code)
