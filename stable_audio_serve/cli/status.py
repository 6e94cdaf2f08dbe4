"""`stable-audio-serve status`: show the state of a running server."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stable_audio_serve.cli.messages import ExitCode, print_json
from stable_audio_serve.cli.remote import JsonOption, KeyFileOption, UrlOption, ask, connected

if TYPE_CHECKING:
    from stable_audio_serve.client import Client

_ROUTE = "GET /v1/status"


def status(
    url: UrlOption = None,
    key_file: KeyFileOption = None,
    *,
    watch: Annotated[bool, typer.Option("--watch", help="Repeat until Ctrl-C; with --json one line each.")] = False,
    every: Annotated[float, typer.Option(min=0.5, max=3600, help="With --watch: seconds between requests.")] = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Show models, replicas, backlog and jobs of a server.

    Exit code 0: ready for requests. 1: not ready, or draining. 3: no answer. 4: no valid key.
    """
    from stable_audio_serve.cli import tables

    with connected(url, key_file) as client:
        if watch:
            _watch(client, every_s=every, as_json=as_json)
            return
        found = ask(client, _ROUTE)
        is_ready = found.get("ready")
        if as_json:
            print_json(found)
        else:
            tables.print_status(found)
    if not is_ready:
        raise typer.Exit(ExitCode.FAILED)


def _watch(client: Client, *, every_s: float, as_json: bool) -> None:
    """Show the status every `every_s` seconds until Ctrl-C, even if the server does not answer for a while."""
    from stable_audio_serve.cli import tables

    def print_line(found: Mapping[str, Any]) -> None:
        typer.echo(json.dumps(found))

    try:
        with nullcontext(print_line) if as_json else tables.live_status() as show:
            while True:
                show(_look(client))
                time.sleep(every_s)
    except KeyboardInterrupt:
        return


def _look(client: Client) -> dict[str, Any]:
    from stable_audio_serve.core.errors import ForbiddenError, StableAudioError, UnauthorizedError

    try:
        found: dict[str, Any] = ask(client, _ROUTE)
    except (UnauthorizedError, ForbiddenError):
        raise
    except StableAudioError as error:
        return {"ready": False, "error": error.message}
    return found
