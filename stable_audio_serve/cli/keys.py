"""`stable-audio-serve keys`: create API keys, and check a file of keys before a server reads it.

The commands change no file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stable_audio_serve.cli.messages import fail, plain_errors
from stable_audio_serve.core.keys import (
    SCOPES,
    ApiKey,
    KeyLimits,
    format_key,
    hash_key,
    make_key,
    parse_key,
    parse_key_file,
    parse_key_hash,
    read_key_file,
)

app = typer.Typer(no_args_is_help=True, help="Make API keys, and check a file of keys.")

_SCOPE_HELP = f"Permission: {', '.join(SCOPES)}; may be repeated; default: generate and jobs."


@app.command()
def new(
    name: Annotated[
        str | None,
        typer.Argument(help="Name of the client. Keys with the same name share the client's jobs."),
    ] = None,
    *,
    scope: Annotated[list[str] | None, typer.Option(metavar="SCOPE", help=_SCOPE_HELP)] = None,
    audio_seconds_per_minute: Annotated[
        float | None, typer.Option(help="Limit of audio seconds in any minute.")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(help="Limit of synchronous requests at a time.")] = None,
) -> None:
    """Make a key.

    Prints a line for the server's configuration to standard output, and the key for the client to standard error.

    Add the line to the file that `api.key_file` (STABLE_AUDIO_API_KEY_FILE) names. A key without scopes and limits can
    also be put into `api.key_hashes` (STABLE_AUDIO_API_KEY_HASHES): add only the first word of the line there.
    """
    made = make_key()
    entry = f"{name}:{hash_key(made)}" if name is not None else hash_key(made)
    words = [entry]
    words += [f"scope={','.join(scope)}"] if scope else []
    words += [] if audio_seconds_per_minute is None else [f"audio-seconds-per-minute={audio_seconds_per_minute}"]
    words += [] if concurrency is None else [f"concurrency={concurrency}"]
    with plain_errors():
        parse_key_hash(entry)
        line = format_key(parse_key(" ".join(words)), is_named=name is not None)
    typer.echo(f"key of {name}: {made}" if name is not None else f"key: {made}", err=True)
    typer.echo(line)


@app.command()
def check(file: Annotated[Path, typer.Argument(help="File of keys.")]) -> None:
    """Check a file of keys.

    Prints client, scopes and limits of each key. Exit code 2: a line is invalid; the error message names the line.
    """
    try:
        keys = parse_key_file(read_key_file(str(file)))
    except OSError as error:
        raise fail(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise fail(f"{file}: {error}") from error
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
