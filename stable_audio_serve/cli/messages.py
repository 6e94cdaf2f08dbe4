"""How commands report failures: one sentence on standard error and an exit code of the table in `docs/clients.md`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum

import typer

from stable_audio_serve.core import errors


class Ending(IntEnum):
    """The exit codes."""

    DONE = 0
    FAILED = 1
    REFUSED = 2
    NO_SERVER = 3
    KEY = 4
    NO_ROOM = 5
    OUT_OF_TIME = 6
    INTERRUPTED = 130


# Errors whose messages name fields of the API.
_OF_REQUESTS = (errors.InvalidRequestError, errors.InvalidUploadError, errors.UploadTooLargeError)
_ENDINGS: tuple[tuple[tuple[type[errors.StableAudioError], ...], Ending], ...] = (
    ((*_OF_REQUESTS, errors.NotFoundError, errors.ConflictError, errors.ConfigError), Ending.REFUSED),
    ((errors.UnreachableError,), Ending.NO_SERVER),
    ((errors.UnauthorizedError, errors.ForbiddenError), Ending.KEY),
    ((errors.OverloadedError, errors.ModelUnavailableError, errors.StoppingError), Ending.NO_ROOM),
    ((errors.DeadlineExceededError,), Ending.OUT_OF_TIME),
    ((errors.CancelledRequestError,), Ending.INTERRUPTED),
)
OPTIONS: Mapping[str, str] = {
    "model": "--model",
    "duration": "--duration",
    "steps": "--steps",
    "seed": "--seed",
    "cfg_scale": "--cfg-scale",
    "sampler_kwargs.sampler_type": "--sampler",
    "sampler_kwargs": "--sampler",
    "negative_prompt": "--negative-prompt",
    "batch_size": "--variations",
    "response_format": "--format",
    "priority": "--priority",
    "init_noise_level": "--noise",
    "inpaint_start_seconds": "the start of --region",
    "inpaint_end_seconds": "the end of --region",
    "keep": "--keep",
    "webhook_url": "--webhook",
    "bars": "--bars",
    "loop_type": "--kind",
    "style_strength": "--strength",
    "audio_file": "--audio",
    "prompt": "PROMPT",
    "audio": "AUDIO",
}
_PHRASES = (
    ("Input should be", "must be"),
    ("String should have at least 1 character", "must not be empty"),
    ("String should have", "must have"),
)
# The name of a field: the first word of a sentence, or any word with an underscore.
_NAME = re.compile(
    r"(?:(?<=^)|(?<=; )|(?<=: ))[a-z_.]+(?=:| must | is )|(?<![\w.])[a-z]+(?:_[a-z]+)+(?:\.[a-z_]+)?(?!\w)"
)


@contextmanager
def plain_errors(names: Mapping[str, str] | None = None) -> Iterator[None]:
    """End the command with a sentence and an exit code when an expected error is raised.

    `names` are the command's options for fields of the API, where they differ from `OPTIONS`.
    """
    try:
        yield
    except errors.StableAudioError as error:
        ending = next((ending for kinds, ending in _ENDINGS if isinstance(error, kinds)), Ending.FAILED)
        hint = "; set STABLE_AUDIO_API_KEY or --key-file" if isinstance(error, errors.UnauthorizedError) else ""
        message = in_options(error.message, names) if isinstance(error, _OF_REQUESTS) else error.message
        raise fail(f"{message}{hint}", ending) from error
    except OSError as error:
        raise fail(describe_os_error(error)) from error
    except ValueError as error:
        raise fail(str(error)) from error
    except KeyboardInterrupt as error:
        raise fail("interrupted", Ending.INTERRUPTED) from error


def fail(message: str, ending: Ending = Ending.REFUSED) -> typer.Exit:
    """Print an error message. Returns the exception that ends the command."""
    typer.echo(f"error: {plain(message)}", err=True)
    return typer.Exit(ending)


def plain(text: str, *, limit: int | None = None) -> str:
    """`text` on one line without control characters for the terminal, cut to `limit` characters."""
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in " ".join(text.split()))
    return shown if limit is None or len(shown) <= limit else f"{shown[: limit - 1]}\N{HORIZONTAL ELLIPSIS}"


def in_options(message: str, names: Mapping[str, str] | None = None) -> str:
    """Returns a message of the API with options in place of fields; `names` override `OPTIONS`."""
    for phrase, ours in _PHRASES:
        message = message.replace(phrase, ours)
    known = {**OPTIONS, **(names or {})}
    message = _NAME.sub(lambda found: known.get(found[0], found[0]), message)
    return re.sub(r"(^|; )([^:;]+): (?:\2 )?must\b", r"\1\2 must", message)  # the message may name the field twice


def describe_os_error(error: OSError) -> str:
    """Returns the file and the reason in words."""
    reason = "file not found" if isinstance(error, FileNotFoundError) else (error.strerror or str(error)).lower()
    return reason if error.filename is None else f"{error.filename}: {reason}"
