"""`stable-audio-serve status`: what a running server does, from its one route for that.

Imports what it needs only when it runs.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stable_audio_serve.cli.endings import Ending
from stable_audio_serve.cli.remote import KeyFileOption, UrlOption, ask, connected

if TYPE_CHECKING:
    from stable_audio_serve.client import Client

_PATH = "/v1/status"


def status(
    url: UrlOption = None,
    key_file: KeyFileOption = None,
    *,
    watch: Annotated[bool, typer.Option("--watch", help="Repeat until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.5, max=3600, help="With --watch: seconds between two answers.")] = 2.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="As JSON, with everything there is; with --watch a line for each answer.")
    ] = False,
) -> None:
    """Show models, replicas, backlog and jobs of a server.

    Exit code 0: it is ready for requests. 1: it is not, or drains. 3: nobody answers. 4: no valid key.
    """
    with connected(url, key_file) as client:
        if watch:
            _watch(client, every_s=every, as_json=as_json)
            return
        found = ask(client, f"GET {_PATH}")
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        from stable_audio_serve.cli import status_report

        status_report.show(found)
    if not found["ready"]:
        raise typer.Exit(Ending.FAILED)


def _watch(client: Client, *, every_s: float, as_json: bool) -> None:
    """Until Ctrl-C. A server that does not answer now may answer again."""
    from stable_audio_serve.cli import status_report

    try:
        with status_report.live() as show:
            while True:
                found = _look(client)
                if as_json:
                    typer.echo(json.dumps(found))
                else:
                    show(found)
                time.sleep(every_s)
    except KeyboardInterrupt:
        return


def _look(client: Client) -> dict[str, Any]:
    from stable_audio_serve.core.errors import ForbiddenError, StableAudioError, UnauthorizedError

    try:
        found: dict[str, Any] = ask(client, f"GET {_PATH}")
    except (UnauthorizedError, ForbiddenError):
        raise
    except StableAudioError as error:
        return {"ready": False, "error": error.message}
    return found
