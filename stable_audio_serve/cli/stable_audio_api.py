"""`stable-audio-api`: the start command of the Stable Audio 3 server, with its options and its models.

A `.env` and the variables of that server mean here what they mean there.
"""

from __future__ import annotations

from typing import Annotated

import typer

from stable_audio_serve.cli.serving import run_server

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; default: the file's, else 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port; default: the file's, else 8000.")] = None,
    *,
    reload: Annotated[bool, typer.Option("--reload", help="Refused: restart the server instead.")] = False,
) -> None:
    """Serve what serve_config.yaml here says, else the models of the Stable Audio 3 server, until Ctrl-C."""
    from stable_audio_serve.cli.configuration import read_configuration, refusing, say
    from stable_audio_serve.serving.serve_file import PACKAGED_FILE, find_serve_file, official_models

    if reload:
        typer.echo("error: --reload: not supported; restart the server after a change", err=True)
        raise typer.Exit(2)
    with refusing():
        if find_serve_file(None) == PACKAGED_FILE:
            say("no serve_config.yaml here: small-sfx, small-music and medium, as the Stable Audio 3 server has them")
            file = official_models()
        else:
            file = read_configuration(None)
    run_server(file, host=host, port=port)
