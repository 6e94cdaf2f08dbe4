"""`stable-audio-serve keys`: makes API keys, and checks a file of them before a server reads it. Changes no file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stable_audio_serve.cli.configuration import refusing
from stable_audio_serve.core.errors import ConfigError
from stable_audio_serve.core.keys import (
    SCOPES,
    ApiKey,
    KeyLimits,
    format_key,
    hash_key,
    make_key,
    parse_key,
    parse_key_hash,
)

app = typer.Typer(no_args_is_help=True, help="Make API keys, and check a file of them.")

_SCOPE_HELP = f"What it may do: {', '.join(SCOPES)}; several times for several; unset = generate and jobs."


@app.command()
def new(
    name: Annotated[
        str | None,
        typer.Argument(help="The client it belongs to: a client's next key finds the jobs of its last one."),
    ] = None,
    *,
    scope: Annotated[list[str] | None, typer.Option(metavar="SCOPE", help=_SCOPE_HELP)] = None,
    audio_seconds_per_minute: Annotated[
        float | None, typer.Option(help="Most seconds of audio in any minute; unset = no limit.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Most synchronous requests at a time; unset = no limit.")
    ] = None,
) -> None:
    """Make a key.

    Prints its line, which the server needs, to standard output, and the key itself to standard error.

    The line belongs into the file of `api.key_file` (STABLE_AUDIO_API_KEY_FILE). Its first word alone, without scopes
    and limits, may also stand in `api.key_hashes` (STABLE_AUDIO_API_KEY_HASHES).
    """
    made = make_key()
    entry = f"{name}:{hash_key(made)}" if name is not None else hash_key(made)
    words = [entry]
    words += [f"scope={','.join(scope)}"] if scope else []
    words += [] if audio_seconds_per_minute is None else [f"audio-seconds-per-minute={audio_seconds_per_minute}"]
    words += [] if concurrency is None else [f"concurrency={concurrency}"]
    with refusing():
        try:
            parse_key_hash(entry)
            line = format_key(parse_key(" ".join(words)), is_named=name is not None)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    typer.echo(f"key:  {made}", err=True)
    typer.echo(line)


@app.command()
def check(file: Annotated[Path, typer.Argument(help="File of keys.")]) -> None:
    """Check a file of keys.

    Prints whose they are and what they may do. Exit code 2: the message names the line at fault.
    """
    from stable_audio_serve.core.key_file import load_key_file

    with refusing():
        try:
            _, keys = load_key_file(str(file))
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{file}: {error}") from error
    for key in keys:
        typer.echo(_describe(key))


def _describe(key: ApiKey) -> str:
    scopes = ",".join(scope for scope in SCOPES if scope in key.scopes)
    return f"{key.client}\t{scopes}\t{_describe_limits(key.limits)}"


def _describe_limits(limits: KeyLimits) -> str:
    rate = limits.audio_seconds_per_minute
    words = [] if rate is None else [f"{rate:g} audio seconds per minute"]
    words += [] if limits.concurrency is None else [f"{limits.concurrency} at a time"]
    return ", ".join(words) or "no limits"
