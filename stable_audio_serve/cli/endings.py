"""How commands end: one sentence on standard error, and a code that scripts can use, as `docs/cli.md` explains it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum

import typer

from stable_audio_serve.cli.wording import describe_os_error, in_options
from stable_audio_serve.core import errors


class Ending(IntEnum):
    """Every exit code there is."""

    DONE = 0
    FAILED = 1
    REFUSED = 2  # as it was asked
    NO_SERVER = 3
    KEY = 4
    NO_ROOM = 5
    OUT_OF_TIME = 6
    INTERRUPTED = 130


_ENDINGS: tuple[tuple[type[errors.StableAudioError], Ending], ...] = (
    (errors.InvalidRequestError, Ending.REFUSED),
    (errors.InvalidUploadError, Ending.REFUSED),
    (errors.UploadTooLargeError, Ending.REFUSED),
    (errors.NotFoundError, Ending.REFUSED),
    (errors.ConflictError, Ending.REFUSED),
    (errors.ConfigError, Ending.REFUSED),
    (errors.UnreachableError, Ending.NO_SERVER),
    (errors.UnauthorizedError, Ending.KEY),
    (errors.ForbiddenError, Ending.KEY),
    (errors.OverloadedError, Ending.NO_ROOM),
    (errors.ModelUnavailableError, Ending.NO_ROOM),
    (errors.StoppingError, Ending.NO_ROOM),
    (errors.DeadlineExceededError, Ending.OUT_OF_TIME),
    (errors.CancelledRequestError, Ending.INTERRUPTED),
)


# Errors whose messages name fields of the API.
_OF_REQUESTS = (errors.InvalidRequestError, errors.InvalidUploadError, errors.UploadTooLargeError)


@contextmanager
def said_plainly(names: Mapping[str, str] | None = None) -> Iterator[None]:
    """End the command when anything in it fails in a way that is expected.

    `names` are the options that a command has for fields of the API, where they differ from those of other commands.
    """
    try:
        yield
    except errors.StableAudioError as error:
        ending = next((ending for kind, ending in _ENDINGS if isinstance(error, kind)), Ending.FAILED)
        hint = "; set STABLE_AUDIO_API_KEY or --key-file" if isinstance(error, errors.UnauthorizedError) else ""
        message = in_options(error.message, names) if isinstance(error, _OF_REQUESTS) else error.message
        raise fail(f"{message}{hint}", ending) from error
    except OSError as error:
        raise fail(describe_os_error(error), Ending.REFUSED) from error
    except ValueError as error:
        raise fail(str(error), Ending.REFUSED) from error
    except KeyboardInterrupt as error:
        raise fail("interrupted", Ending.INTERRUPTED) from error


def fail(message: str, ending: Ending = Ending.REFUSED) -> typer.Exit:
    """Say what went wrong, printable whatever the server wrote. Returns the end of the command."""
    from stable_audio_serve.cli.job_report import plain

    typer.echo(f"error: {plain(message, limit=None)}", err=True)
    return typer.Exit(ending)
