"""Report failures of commands: one sentence on standard error, and an exit code from the table in `docs/clients.md`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import typer

from stable_audio_serve.core import errors


class ExitCode(IntEnum):
    """The exit codes of all commands."""

    DONE = 0
    FAILED = 1
    REFUSED = 2
    NO_SERVER = 3
    KEY = 4
    NO_ROOM = 5
    OUT_OF_TIME = 6
    INTERRUPTED = 130


# Errors whose messages contain names of API fields.
_REQUEST_ERRORS = (errors.InvalidRequestError, errors.InvalidUploadError, errors.UploadTooLargeError)
_EXIT_CODES: tuple[tuple[tuple[type[errors.StableAudioError], ...], ExitCode], ...] = (
    ((*_REQUEST_ERRORS, errors.NotFoundError, errors.ConflictError, errors.ConfigError), ExitCode.REFUSED),
    ((errors.UnreachableError,), ExitCode.NO_SERVER),
    ((errors.UnauthorizedError, errors.ForbiddenError), ExitCode.KEY),
    ((errors.OverloadedError, errors.ModelUnavailableError, errors.StoppingError), ExitCode.NO_ROOM),
    ((errors.DeadlineExceededError,), ExitCode.OUT_OF_TIME),
    ((errors.CancelledRequestError,), ExitCode.INTERRUPTED),
)
_SAME_NAMES = (  # fields that options are named after
    *("model", "duration", "steps", "seed", "cfg_scale", "negative_prompt", "bitrate", "bit_depth", "sample_rate"),
    *("loudness", "priority", "lora_stacking", "keep", "idempotency_key", "loop", "bpm", "bars"),
)
OPTIONS: Mapping[str, str] = {
    **{name: f"--{name.replace('_', '-')}" for name in _SAME_NAMES},
    "seeds": "--seed",
    "prompts": "--prompt",
    "sampler_kwargs.sampler_type": "--sampler",
    "sampler_kwargs": "--sampler",
    "batch_size": "--variations",
    "response_format": "--format",
    "target_lufs": "--loudness",
    "true_peak_dbtp": "--true-peak",
    "fade_in_s": "--fade-in",
    "fade_out_s": "--fade-out",
    "loras": "--lora",
    "strength": "the strength of --lora",
    "lora_name": "NAME",
    "lora_path": "PATH",
    "init_noise_level": "--noise",
    "extend_before_s": "--before",
    "extend_after_s": "--after",
    "inpaint_start_seconds": "the start of --region",
    "inpaint_end_seconds": "the end of --region",
    "sections": "--section",
    "overlap_s": "--overlap",
    "webhook_url": "--webhook",
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
    ("upload the source files of the recipe", "name the source files of the recipe with --source"),
)
_OF_SECTION = re.compile(r"\bsections\.(\d+)\.(duration|prompt)\b")
# Matches names of API fields in a message: the first word of a sentence, any word with an underscore, and `bpm` and
# `bars` after `with`.
_NAME = re.compile(
    r"(?:(?<=^)|(?<=; )|(?<=: ))[a-z_.]+(?=:| must | is )|(?<![\w.])[a-z]+(?:_[a-z]+)+(?:\.[a-z_]+)?(?!\w)"
    r"|(?<=with )(?:bpm|bars)\b|(?<=with bpm and )bars\b"
)


@contextmanager
def plain_errors() -> Iterator[None]:
    """If the block raises an expected error, print its message and end the command with an exit code.

    In the message, the names of API fields are replaced by the command's options.
    """
    try:
        yield
    except errors.StableAudioError as error:
        code = next((code for kinds, code in _EXIT_CODES if isinstance(error, kinds)), ExitCode.FAILED)
        hint = "; set STABLE_AUDIO_API_KEY or --key-file" if isinstance(error, errors.UnauthorizedError) else ""
        message = in_options(error.message) if isinstance(error, _REQUEST_ERRORS) else error.message
        raise fail(f"{message}{hint}", code) from error
    except BrokenPipeError:  # the reader of standard output has ended, such as `head`
        raise
    except OSError as error:
        raise fail(describe_os_error(error)) from error
    except ValueError as error:
        raise fail(str(error)) from error
    except KeyboardInterrupt as error:
        raise fail("interrupted", ExitCode.INTERRUPTED) from error


def fail(message: str, code: ExitCode = ExitCode.REFUSED) -> typer.Exit:
    """Print an error message. Returns an exception that the caller must raise to end the command."""
    typer.echo(f"error: {plain(message)}", err=True)
    return typer.Exit(code)


def plain(text: str, *, limit: int | None = None) -> str:
    """Return `text` on one line, without control characters, and cut to `limit` characters."""
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in " ".join(text.split()))
    return shown if limit is None or len(shown) <= limit else f"{shown[: limit - 1]}\N{HORIZONTAL ELLIPSIS}"


def print_json(value: Any) -> None:
    """Print JSON values to standard output, without control characters, which `json` escapes."""
    typer.echo(json.dumps(value, indent=2))


def in_options(message: str) -> str:
    """Return a message of the API in which `OPTIONS` replace field names."""
    for phrase, ours in _PHRASES:
        message = message.replace(phrase, ours)
    parts = {"duration": "length", "prompt": "prompt"}
    message = _OF_SECTION.sub(lambda found: f"the {parts[found[2]]} of --section {int(found[1]) + 1}", message)
    message = _NAME.sub(lambda found: OPTIONS.get(found[0], found[0]), message)
    message = re.sub(r"(^|; )([^:;]+: )\2", r"\1\2", message)
    # "--steps: --steps must" and "--steps: must" become "--steps must".
    return re.sub(r"(^|; )([^:;]+): (?:\2 )?must\b", r"\1\2 must", message)


def describe_os_error(error: OSError) -> str:
    """Return the reason of the error as text, after the name of the file if it is known."""
    reason = (error.strerror or str(error)).lower().replace("no such file or directory", "file not found")
    return reason if error.filename is None else f"{error.filename}: {reason}"
